"""What training takes of a card, by part, computed from the model's config alone; and the test that it really fits.

Every quantity is in bytes. GiB (2^30 bytes, as nvidia-smi's MiB are 2^20) appear at the flag --gpu-memory-gib only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.batch import MicroBatch, StepTotals
from grpo.errors import UserError
from grpo.lazy import torch
from grpo.logprobs import completion_logps
from grpo.policy.models import Policy, adapter_shapes, linear_layers, meta_model, trainable_parameters
from grpo.sampler import Rollout

if TYPE_CHECKING:
    from torch import nn

    from grpo_rollout.fit.plan import Card, Plan

GIB = 1 << 30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""bytes per weight: its code, one byte of scale per 64 weights, and one float per 256 scales (double quantization)"""
LATE_BYTES = GIB // 8
"""bytes that CUDA and compiled kernels may take of the card after `cap_gpu_memory`: 22 MB beyond the limit were seen"""


class Dims(NamedTuple):
    """The sizes of a model that decide how large its KV cache and its work buffers are."""

    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_dim: int
    vocab: int


def dims(config: Any) -> Dims:
    """The sizes that a transformers config names or implies."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    return Dims(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
    )


class PolicySize(NamedTuple):
    """Numbers of parameters of a policy, counted on a model without weights."""

    parameters: int
    """parameters of the base model"""
    quantized: int
    """base parameters kept in 4 bits: linear layers, except the head and what a quantized checkpoint leaves out"""
    largest: int
    """parameters of the largest 4-bit layer, which is dequantized as a whole"""
    trainable: int
    """parameters of the adapter"""
    reference: int = 0
    """parameters of the adapter's frozen copy, where a trained adapter is trained further"""

    @property
    def quantized_bytes(self) -> int:
        """The 4-bit weights with their scales."""
        return int(self.quantized * NF4_BYTES)

    @property
    def dense_bytes(self) -> int:
        """Embeddings, head and norms, in 16 bits."""
        return 2 * (self.parameters - self.quantized)

    @property
    def adapter_bytes(self) -> int:
        """The adapter's master weights and gradients, and its frozen copy, in fp32."""
        return 8 * self.trainable + 4 * self.reference

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments, in fp32."""
        return 8 * self.trainable


def policy_size(config: Any, modules: list[str], policy: Policy) -> PolicySize:
    """Count the parameters of the policy that `load_policy` would make. Shared parameters (a tied head) count once.

    config, modules: the results of `grpo.policy.models.check_policy`.
    With a trained adapter (`policy.adapter`) the sizes of its own tensors count rather than rank and modules; and they
    count twice, since its frozen copy is the reference policy."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skeleton = meta_model(config)
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    # A checkpoint that is already quantized is loaded as it is.
    four_bit = bool(settings.get("load_in_4bit")) if settings else policy.load_in_4bit
    left_out = list(settings.get("llm_int8_skip_modules") or ())
    quantized = largest = trainable = 0
    adapted = set(modules)
    for name, module in linear_layers(skeleton).items():
        if four_bit and should_convert_module(name, left_out):
            quantized += module.weight.numel()
            largest = max(largest, module.weight.numel())
        if name in adapted:
            trainable += policy.lora_rank * (module.in_features + module.out_features)
    reference = 0
    if policy.adapter:
        reference = trainable = sum(math.prod(shape) for shape in adapter_shapes(policy.adapter).values())
    return PolicySize(sum(p.numel() for p in skeleton.parameters()), quantized, largest, trainable, reference)


def training_bytes(
    model: Dims, size: PolicySize, *, tokens: int, completion_tokens: int, offload: bool, fused: bool = True
) -> int:
    """The most that forward and backward pass of one micro-batch take beside weights, adapter and optimizer.

    tokens: padded tokens of the micro-batch. completion_tokens: those of them whose log-probabilities are taken.
    fused: whether `grpo.policy.layers` replaces the layers' forward.
    In bf16 under activation checkpointing it is the sum of: the input of every layer (of two layers with `offload`,
    since the others wait in host memory); what one layer holds where its backward pass is fullest, in its MLP (10
    hidden values per token, and gate, up and their product, whose gradients overwrite them; 14 hidden and 8
    intermediate values if not fused); its largest weight, dequantized (twice if not fused); and for the head a gradient
    factor and the row blocks of `linear_logprob` (4 hidden values per completion token, 0.1 GiB)."""
    inputs = (2 if offload else model.layers) * tokens * model.hidden * 2
    values = 10 * model.hidden + 3.25 * model.intermediate if fused else 14 * model.hidden + 8 * model.intermediate
    head = completion_tokens * model.hidden * 4 * 2 + GIB // 10
    return inputs + int(2 * tokens * values) + (2 if fused else 4) * size.largest + head


def kept_bytes(model: Dims, *, tokens: int) -> int:
    """What a layer that keeps its activations holds from its forward to its backward pass, beside its input.

    In bf16, for the layers that `grpo.policy.layers` replaces, it holds per token: the results of both norms and the
    input of the second; queries, keys, values and the result of attention; gate and up. Where one product makes
    queries, keys and values (Phi-3), it holds that product, too, and the result of attention in another layout. The
    adapters' activations are a twentieth more."""
    values = 7 * model.hidden + 3 * model.kv_heads * model.head_dim + 2 * model.intermediate
    return int(1.05 * 2 * tokens * values)


# ------------------------------------------------------------------------------------------------------- on the card


def fit_test(model: nn.Module, rollout: Rollout, card: Card, plan: Plan, *, entropy_grad: bool = False) -> None:
    """Run the largest micro-batch that can come, within the memory that the card and --gpu-memory-gib allow: what does
    not fit fails here rather than at step 200.

    It caps PyTorch's memory for the rest of the run (`cap_gpu_memory`), so call it when the engine is made. On a CPU
    there is no card to fill, and it returns at once. entropy_grad: whether the loss has an entropy bonus.
    Raises UserError, naming flags, where the micro-batch does not fit."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return
    cap_gpu_memory(card.gpu_memory_gib, device)
    try_micro_batch(model, largest_micro_batch(rollout, plan.micro_batch_tokens, device), entropy_grad=entropy_grad)


def cap_gpu_memory(limit_gib: float | None, device: torch.device) -> None:
    """Let PyTorch take no more of the card than keeps everything on it within `limit_gib`, as nvidia-smi shows it.
    Near the limit PyTorch first frees cached blocks, and then raises OutOfMemoryError. None, or no GPU: no limit.

    Call it when everything else is on the card (the CUDA context, an engine at rest), because PyTorch does not see what
    that takes. `LATE_BYTES` stay free for kernels that are loaded later."""
    if limit_gib is None or device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    used_bytes = total_bytes - free_bytes
    others_bytes = used_bytes - torch.cuda.memory_reserved(device)
    cap_bytes = int(limit_gib * GIB) - LATE_BYTES - others_bytes
    if cap_bytes <= 0:
        raise UserError(
            f"--gpu-memory-gib {limit_gib:g}: {used_bytes / GIB:.1f} GiB of the card are in use already; raise it, or "
            "end what else runs on the card"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes), device)


def largest_micro_batch(rollout: Rollout, micro_batch_tokens: int, device: torch.device | str = "cpu") -> MicroBatch:
    """As many sequences as fit into `micro_batch_tokens`, and one at least: each has a prompt and a completion at their
    limits, and a gradient."""
    prompt_tokens, completion_tokens = rollout.max_prompt_tokens, rollout.max_completion_tokens
    rows = max(1, micro_batch_tokens // (prompt_tokens + completion_tokens))
    mask = torch.ones(rows, completion_tokens, device=device)
    return MicroBatch(
        ids=torch.zeros(rows, prompt_tokens + completion_tokens, dtype=torch.int64, device=device),
        prompt_lengths=torch.full((rows,), prompt_tokens, device=device),
        mask=mask,
        sampler_logps=torch.zeros_like(mask),
        advantages=torch.ones(rows, device=device),
        sequences=list(range(rows)),
        step=StepTotals(rows * completion_tokens, rows, completion_tokens),
    )


def try_micro_batch(model: nn.Module, micro: MicroBatch, *, entropy_grad: bool = False) -> None:
    """Forward and backward pass of a micro-batch, beside the memory that AdamW's moments will take.

    It leaves nothing behind: gradients are dropped, no weight changes, and no random number is drawn.
    Raises UserError, naming flags, where the memory does not suffice."""
    parameters = trainable_parameters(model)
    try:
        moments = torch.empty(8 * sum(p.numel() for p in parameters), dtype=torch.uint8, device=micro.ids.device)
        logps, entropy = completion_logps(model, micro, entropy_grad=entropy_grad)
        (logps.sum() + (entropy.sum() if entropy_grad else 0.0)).backward()
    except torch.OutOfMemoryError as error:
        rows, completion_tokens = micro.mask.shape
        raise UserError(
            f"a micro-batch of {rows} x ({micro.ids.shape[1] - completion_tokens} + {completion_tokens}) tokens does "
            f"not fit into the memory that is left; lower --micro-batch-tokens or --max-completion-tokens, or raise "
            f"--gpu-memory-gib ({error})"
        ) from error
    del moments
    for parameter in parameters:
        parameter.grad = None
