"""What training takes of a card, by part, known from the config alone; and two ways of staying below a limit."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from grpo.batch import MicroBatch
from grpo.logprobs import completion_logps
from grpo.policy.models import adapter_shapes, linear_layers, trainable_parameters, weightless

GIB = 1 << 30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""of a weight: its code, a byte of scale for 64 of them, and a float for 256 of those (double quantization)"""


class Dims(NamedTuple):
    """What of a model decides the size of its KV cache and of its work buffers."""

    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_dim: int
    vocab: int


def dims(config: Any) -> Dims:
    """Of a transformers config."""
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
    """The parameters of a policy, counted on a model without weights."""

    parameters: int
    """of the base model"""
    quantized: int
    """of those, the ones kept in 4 bits: linear layers but the head, and but what the checkpoint leaves out"""
    largest: int
    """of the largest 4-bit layer: what dequantizing needs room for"""
    trainable: int
    """of the adapter"""
    reference: int = 0
    """of its frozen copy, where a trained adapter is trained further"""

    @property
    def quantized_bytes(self) -> int:
        return int(self.quantized * NF4_BYTES)

    @property
    def dense_bytes(self) -> int:
        """embeddings, head and norms in 16 bits"""
        return 2 * (self.parameters - self.quantized)

    @property
    def adapter_bytes(self) -> int:
        """master weights and gradients, fp32, and the frozen copy"""
        return 8 * self.trainable + 4 * self.reference

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments, fp32"""
        return 8 * self.trainable


def policy_size(
    config: Any,
    modules: list[str],
    *,
    lora_rank: int,
    load_in_4bit: bool = True,
    adapter: str | Path | None = None,
) -> PolicySize:
    """modules: full names of the adapted ones (`grpo.policy.models.target_modules`). Parameters that are shared (a tied head)
    count once. adapter: a trained adapter's folder: its own sizes count, and twice, for its copy is the reference."""
    skeleton = weightless(config)
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings:  # a checkpoint that is already quantized is loaded as it is
        load_in_4bit = bool(settings.get("load_in_4bit"))
    left_out = list(settings.get("llm_int8_skip_modules") or ())
    quantized = largest = trainable = 0
    adapted = set(modules)
    for name, module in linear_layers(skeleton).items():
        if load_in_4bit and should_convert_module(name, left_out):
            quantized += module.weight.numel()
            largest = max(largest, module.weight.numel())
        if name in adapted:
            trainable += lora_rank * (module.in_features + module.out_features)
    reference = 0
    if adapter:
        reference = trainable = sum(math.prod(shape) for shape in adapter_shapes(adapter).values())
    return PolicySize(sum(p.numel() for p in skeleton.parameters()), quantized, largest, trainable, reference)


def training_bytes(
    model: Dims, size: PolicySize, *, tokens: int, completion_tokens: int, offload: bool, fused: bool = True
) -> int:
    """The most that the forward and backward pass of one micro-batch takes beside weights, adapter and optimizer.

    tokens: padded tokens of the micro-batch. completion_tokens: of them, those whose log-probabilities are taken.
    fused: whether `grpo.policy.layers` takes the layers over.
    The sum, in bf16 under gradient checkpointing, of: each layer's input (two layers' if `offload`: the others wait
    in the host's memory); what one layer holds where its backward pass is fullest, within its MLP (10 hidden values a
    token, and gate, up and their product, of which it keeps gradients in their places; not fused 14 hidden and 8
    intermediate values); its largest weight dequantized (not fused: twice); and for the head a gradient factor and the
    row blocks of `linear_logprob` (4 hidden values a completion token, 0.1 GiB)."""
    inputs = (2 if offload else model.layers) * tokens * model.hidden * 2
    values = 10 * model.hidden + 3.25 * model.intermediate if fused else 14 * model.hidden + 8 * model.intermediate
    head = completion_tokens * model.hidden * 4 * 2 + GIB // 10
    return inputs + int(2 * tokens * values) + (2 if fused else 4) * size.largest + head


def kept_bytes(model: Dims, *, tokens: int) -> int:
    """What a layer that keeps its activations takes from its forward to its backward pass, beside its input.

    In bf16 and for the layers that `grpo.policy.layers` takes over, a token's: both norms' results, the second one's input,
    queries, attention's result, keys and values, gate and up; where one product makes queries, keys and values (Phi-3),
    that as well, and attention's result in another order; a twentieth more for the adapters'."""
    values = 7 * model.hidden + 3 * model.kv_heads * model.head_dim + 2 * model.intermediate
    return int(1.05 * 2 * tokens * values)


LATER_BYTES = GIB // 8
"""what CUDA and compiled kernels may take of a card after `hold_memory`: 22 MB beyond the limit were seen"""


def hold_memory(limit_gb: float | None, device: torch.device) -> None:
    """From here on PyTorch takes no more of the card than keeps everything on it within `limit_gb` GiB, as nvidia-smi
    shows it: it gives cached blocks back first, and raises OutOfMemoryError after that. None, or no GPU: no limit.

    Call it when all else (the CUDA context, an engine at rest) is there: what those take, PyTorch does not see. For
    kernels that are loaded later, `LATER_BYTES` are left."""
    if limit_gb is None or device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(limit_gb * GIB) - LATER_BYTES - (total - free) + torch.cuda.memory_reserved(device)
    if allowed <= 0:
        raise ValueError(
            f"--gpu-memory-gib {limit_gb:g}: {(total - free) / GIB:.1f} GiB of the card are in use already"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def preflight(
    model: nn.Module,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    micro_batch_tokens: int,
    offload: bool = False,
    entropy_grad: bool = False,
) -> float:
    """Forward and backward of the largest micro-batch that can come, beside AdamW's moments to come: what does not fit
    fails now and not at step 200. Nothing is learnt from it: gradients are dropped, and no random number is drawn.

    Returns the peak of PyTorch's memory in GiB (0 on a CPU). Raises ValueError, naming flags, if it does not fit."""
    device = next(model.parameters()).device
    parameters = trainable_parameters(model)
    rows = max(1, micro_batch_tokens // (prompt_tokens + completion_tokens))
    mask = torch.ones(rows, completion_tokens, device=device)
    batch = MicroBatch(
        ids=torch.zeros(rows, prompt_tokens + completion_tokens, dtype=torch.int64, device=device),
        prompt_lengths=torch.full((rows,), prompt_tokens, device=device),
        mask=mask,
        sampler_logps=torch.zeros_like(mask),
        advantages=torch.ones(rows, device=device),
        sequences=list(range(rows)),
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        moments = torch.empty(8 * sum(p.numel() for p in parameters), dtype=torch.uint8, device=device)
        logps, entropy = completion_logps(model, batch, entropy_grad=entropy_grad, offload=offload)
        (logps.sum() + (entropy.sum() if entropy_grad else 0.0)).backward()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a micro-batch of {rows} x ({prompt_tokens} + {completion_tokens}) tokens does not fit into the memory "
            f"there is; lower --micro-batch-tokens or --max-completion-tokens, or raise --gpu-memory-gib ({error})"
        ) from error
    del moments
    for parameter in parameters:
        parameter.grad = None
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0
