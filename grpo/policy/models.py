"""The policy: a 4-bit language model with a LoRA adapter, and the reference policy that the same weights hold."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grpo.errors import UserError
from grpo.lazy import torch
from grpo.policy.sources import load_from_hub, resolve_model

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

REFERENCE = "reference"
"""name of the second adapter, the frozen copy of a continued one, against which its KL divergence is measured"""


@dataclass(frozen=True)
class Policy:
    """Flags of the policy: the language model and its adapter."""

    model: str
    """name on the Hugging Face hub, transformers folder (quantized or not), or .gguf file"""
    lora_rank: int = 16
    """rank of the adapter"""
    lora_alpha: int = 32
    """numerator of the adapter's scaling, which is alpha / rank"""
    lora_targets: str = "all-linear"
    """names of the modules to adapt, separated by commas, wildcards allowed; "all-linear" is all but the head"""
    adapter: Path | None = None
    """folder of a trained adapter to train further; its rank and modules count, and a frozen copy is the reference"""
    load_in_4bit: bool = True
    """whether to quantize the weights to NF4; a checkpoint that is already quantized is loaded as it is"""

    @property
    def source(self) -> Path | list[str]:
        """What stands for the model in a run's record: its folder, whose files are hashed, or its name on the hub."""
        folder = Path(resolve_model(self.model))
        return folder if folder.is_dir() else [self.model]


def load_policy(
    policy: Policy,
    *,
    kept_layers: int | None = None,
    offload: bool = False,
    fused: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PeftModel:
    """The model to train: frozen NF4 weights (or 16- and 32-bit ones) and a trainable LoRA adapter in fp32.

    On CUDA the weights are multiplied in bf16 (autocast; the adapter's master weights stay fp32, since an update of
    1e-5 is lost in bf16), on the CPU in fp32. The adapter has no dropout: the ratio of new to old policy must not be
    noise.

    kept_layers: None: every layer keeps its activations for the backward pass. A number: activation checkpointing, in
        which a layer keeps its input alone and runs forward a second time in the backward pass; the last `kept_layers`
        layers, whose memory is free again first, keep their activations nevertheless.
    offload: whether the inputs of checkpointed layers wait in host memory, in each forward pass that records gradients.
    fused: whether norms, gated MLPs, rotary embeddings and adapted 4-bit layers pass over memory less often than those
        of transformers and PEFT, and checkpointed layers take fewer steps (`grpo.policy.patches`).
    seed: random seed for the adapter's A (its B is 0, so the policy starts as the base model).
    Raises UserError, before a weight is read, for a model, target or adapter that does not exist."""
    from torch import nn

    from grpo.policy.patches import checkpoint_layers, fuse_layers, offload_inputs

    folder, config, modules = check_policy(policy)
    base = _load_base(policy, folder, config, torch.device(device))
    if kept_layers is not None:
        _checkpoint_activations(base, kept_layers)
    base.requires_grad_(False)
    model = _with_adapter(base, policy, modules, seed)
    for module in model.modules():  # a base model, or an adapter from elsewhere, may ask for dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if fused:
        fuse_layers(model)
        checkpoint_layers(model)
    if offload:
        offload_inputs(base.base_model)
    model.train()
    return model


def _load_base(policy: Policy, folder: str, config: Any, device: torch.device) -> Any:
    """The transformers model on its device: linear layers in NF4, everything else in the dtype of its products."""
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    quantized = {}  # stays empty for a quantized checkpoint: even None would override what its config says
    if policy.load_in_4bit and getattr(config, "quantization_config", None) is None:
        quantized["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base: Any = load_from_hub(
        "weights",
        policy.model,
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, **quantized
        ),
    )
    # A quantized checkpoint may ask for dtypes that this device does not compute in, and transformers 5.23 heeds it
    # over `dtype`.
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    set_compute_dtype(base, dtype)
    return base


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the 4-bit layers multiply in `dtype`, with and without gradients.

    A checkpoint may ask for another one; and without gradients bitsandbytes repacks the weights to multiply in bf16
    where a CPU has AVX512-BF16."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            cast(Any, module.weight).quant_state.dtype = dtype
            module.support_avx512bf16_for_cpu = False


def _checkpoint_activations(base: Any, kept_layers: int) -> None:
    """Turn on transformers' activation checkpointing for all layers but the last `kept_layers`."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers before 5.2x has only the second name, and later releases warn about it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    # torch's reentrant variant has no hooks around each saved tensor, and with preserve_rng_state=False it saves no
    # random state, which nothing in a layer uses: a seventh less work for the host, which is what bounds small
    # micro-batches. It needs an input that requires a gradient.
    enable({"use_reentrant": True, "preserve_rng_state": False})
    base.enable_input_require_grads()
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[max(0, len(layers) - kept_layers) :]:
        layer.gradient_checkpointing = False


def _with_adapter(base: Any, policy: Policy, modules: list[str], seed: int) -> PeftModel:
    """The base model with a new adapter on `modules`, or with a trained one and its frozen copy."""
    from peft import LoraConfig, PeftModel, get_peft_model

    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 for an attribute by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        if policy.adapter:
            model = PeftModel.from_pretrained(base, str(policy.adapter), is_trainable=True)
            model.load_adapter(str(policy.adapter), adapter_name=REFERENCE, is_trainable=False)
            model.set_adapter("default")
            return model
        torch.manual_seed(seed)
        config = LoraConfig(
            r=policy.lora_rank,
            lora_alpha=policy.lora_alpha,
            target_modules=modules,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        return cast(PeftModel, get_peft_model(base, config))


def check_policy(policy: Policy) -> tuple[str, Any, list[str]]:
    """The model's folder or name on the hub, its config, and the full names of the modules to adapt.

    Reads no weight: `load_policy` calls it first, and a plan can be made from its results.
    Raises UserError for a model, target or adapter that does not exist, and for an adapter of another model."""
    from transformers import AutoConfig

    folder = resolve_model(policy.model)
    config = load_from_hub("config", policy.model, lambda: AutoConfig.from_pretrained(folder))
    if policy.lora_rank < 1:
        raise UserError(f"--lora-rank {policy.lora_rank} must be at least 1")
    modules = target_modules(config, policy.lora_targets)
    if policy.adapter:
        _check_adapter(Path(policy.adapter), config)
    return folder, config, modules


def _check_adapter(adapter: Path, config: Any) -> None:
    """Raise UserError, naming the layer, where the folder holds no adapter, or one of another model."""
    from torch import nn

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"--adapter {adapter}: no adapter_config.json in there; give a PEFT adapter's folder")
    shapes = {name: m.weight.shape for name, m in meta_model(config).named_modules() if isinstance(m, nn.Linear)}
    for key, shape in adapter_shapes(adapter).items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        side = 1 if part == "A.weight" else 0  # A is [rank, in], B is [out, rank]; a linear layer's weight [out, in]
        layer = shapes.get(name)
        if layer is None or layer[side] != shape[side]:
            problem = "has no such layer" if layer is None else f"has {list(layer)} there"
            raise UserError(f"--adapter {adapter}: {key} does not fit: --model {problem}; give the adapter's own model")


def adapter_shapes(adapter: str | Path) -> dict[str, list[int]]:
    """Tensor name -> shape of the adapter in a PEFT folder, read from the header of its safetensors file.

    Empty for an old adapter that was saved as .bin, which is not opened: reading one means unpickling."""
    from safetensors import safe_open

    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        return {}
    with safe_open(weights, "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no mapping)


def meta_model(config: Any) -> Any:
    """The causal language model of a config on the meta device, where parameters have shapes but no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Full name -> linear layer, for all but the head: the layers that are quantized and adapted."""
    from torch import nn

    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def target_modules(config: Any, targets: str) -> list[str]:
    """Full names of the linear layers that --lora-targets stands for, in the model's order.

    Raises UserError, naming the pattern that matches nothing and the names there are."""
    linear = list(linear_layers(meta_model(config)))
    if targets.strip() == "all-linear":
        return linear
    chosen: set[str] = set()
    for pattern in (p.strip() for p in targets.split(",")):
        matched = [n for n in linear if n.split(".")[-1] == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not matched:
            kinds = ", ".join(sorted({n.split(".")[-1] for n in linear}))
            raise UserError(f"--lora-targets: {pattern!r} matches no linear module of this model; it has {kinds}")
        chosen.update(matched)
    return [n for n in linear if n in chosen]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for the optimizer. Raises ValueError where there are none: such a run would learn nothing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter: load it with load_policy, which adds an adapter")
    return parameters


@contextlib.contextmanager
def reference_policy(model: PeftModel) -> Iterator[None]:
    """Within the block `model` is the reference policy, and no gradient is recorded: the base model, or, where a
    trained adapter is trained further, the frozen copy of that adapter."""
    with torch.no_grad():
        if REFERENCE not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter("default")  # which also makes it trainable again
