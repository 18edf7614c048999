"""Everything that touches vLLM's insides, for the releases in `engine.SUPPORTED`. The engine uses public doors alone.

docs/rollout.md has the table of what is done here, and through which door. This file imports vLLM, so it is imported
only when an engine is made, after the version has been checked and the environment set (`engine.set_environment`).
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm import LLM
from vllm.device_allocator.cumem import CuMemAllocator, unmap_and_release
from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from grpo.errors import UserError
from grpo_kernels.nf4.linear import FUSED_ROWS, nf4_linear
from grpo_kernels.nf4.prologue import Lora, new_counters
from grpo_kernels.nf4.tiles import FEW_ROWS_TILE
from grpo_kernels.token_logprob import token_logprob
from grpo_rollout.vllm.fused_nf4 import fused_product, plain_product, takes_adapters
from grpo_rollout.vllm.lora_slots import Slot, layers_of
from grpo_rollout.vllm.shared_weights import Dense, MergedLinears, Quantized, dequantize

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu.sample import logprob
    from vllm.v1.worker.gpu_worker import Worker

METHOD = "grpo_shared"
"""name of the quantization method and of the load format that this file registers with vLLM"""
ADAPTER_ID = 1
"""vLLM's number for the policy's adapter, the only one there is"""

# ---- the weights: a quantization method and a model loader, both registered with vLLM


class SharedLinearMethod(LinearMethodBase):
    """How vLLM's linear layers multiply: by products over the trainer's storage."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        # SharedLoader puts the trainer's tensors here. Until then vLLM's LoRA layers ask `weight` for its device.
        layer.register_parameter("weight", nn.Parameter(torch.empty(0), requires_grad=False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        parts = [product(flat) for product in layer.products]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


@register_quantization_config(METHOD)
class SharedConfig(QuantizationConfig):
    """The quantization method that tells vLLM to multiply by `SharedLinearMethod`, whatever the checkpoint's own is."""

    @classmethod
    def get_name(cls) -> Any:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SharedConfig":
        return cls()

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> Any:
        return METHOD if user_quant == METHOD else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        return SharedLinearMethod() if isinstance(layer, LinearBase) else None


@dataclass(frozen=True)
class TrainerWeights:
    """The trainer's weights, and how vLLM's layers multiply by them."""

    base: Any
    """the trainer's causal LM, below PEFT's wrapper"""
    merged: MergedLinears
    dense: bool
    """whether vLLM's layers get 16-bit copies of the 4-bit weights"""
    fused_nf4: bool
    """whether 4-bit products go through `nf4_linear`"""
    fused_lora: bool
    """whether `nf4_linear` adds the adapter's product too"""

    def share_with(self, sampler: Any, dtype: torch.dtype) -> None:
        """Make every parameter of vLLM's model the trainer's tensor. dtype: vLLM's.

        Raises UserError, naming the layer, where the two models differ."""
        tensors = {
            ".".join(part for part in name.split(".") if part != "base_layer"): tensor
            for name, tensor in self.base.named_parameters(remove_duplicate=False)
        }
        modules: list[tuple[str, Any]] = list(sampler.named_modules())
        for name, module in modules:
            if isinstance(module, LinearBase):
                self._share_linear(name, module, layers_of(name, sampler.packed_modules_mapping), dtype)
            else:
                _share_parameters(name, module, tensors)
        head = self.base.get_output_embeddings()
        left = {name for name, layer in self.merged.linears.items() if layer is not head} - self.merged.taken
        if left:
            raise UserError(f"vLLM's model has no layer for the trainer's {min(left)}; take --engine torch")

    def _share_linear(self, name: str, module: Any, layers: list[str], dtype: torch.dtype) -> None:
        """Give a linear layer of vLLM's the weights and biases of the trainer's `layers`."""
        weights, bias = self.merged.take(layers)
        rows, cols = sum(w.shape[0] for w in weights), weights[0].shape[1]
        if (rows, cols) != (module.output_size, module.input_size):
            raise UserError(
                f"{name} is [{rows}, {cols}] in the trainer, [{module.output_size}, {module.input_size}] in vLLM; "
                "take --engine torch"
            )
        if self.dense:
            weights = [Dense(dequantize(w, dtype)) for w in weights]
        first = weights[0]
        storage = first.packed if isinstance(first, Quantized) else first.weight
        module.weight = nn.Parameter(storage, requires_grad=False)
        module.products = [self._product(w) for w in weights]
        if bias is not None:
            module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        if self.fused_lora and len(weights) == 1 and isinstance(first, Quantized) and takes_adapters(first):
            module.nf4 = first  # `fuse_adapters` looks for it

    def _product(self, weight: Quantized | Dense) -> Callable[[torch.Tensor], torch.Tensor]:
        """x [tokens, cols] -> x W^T [tokens, rows]."""
        if isinstance(weight, Dense):
            return functools.partial(nn.functional.linear, weight=weight.weight)
        return functools.partial(fused_product if self.fused_nf4 else plain_product, weight)


def _share_parameters(name: str, module: Any, tensors: dict[str, nn.Parameter]) -> None:
    """Replace the parameters of a module of vLLM's that is not linear (embeddings, norms) by the trainer's."""
    for leaf, old in list(module.named_parameters(recurse=False)):
        full = f"{name}.{leaf}"
        if full not in tensors:
            raise UserError(
                f"vLLM's model has a parameter {full} that the trainer's model does not have; take --engine torch"
            )
        new = tensors[full].data.to(old.dtype)  # the same tensor where the dtypes agree
        if new.shape[1:] != old.shape[1:] or new.shape[0] > old.shape[0]:  # vLLM pads the vocabulary
            raise UserError(
                f"{full} is {list(new.shape)} in the trainer, {list(old.shape)} in vLLM; take --engine torch"
            )
        setattr(module, leaf, nn.Parameter(new, requires_grad=False))


@register_model_loader(METHOD)
class SharedLoader(BaseModelLoader):
    """Loads no file: vLLM's model gets the trainer's weights."""

    weights: ClassVar[TrainerWeights | None] = None
    """weights of the engine that is being made; a class attribute, since vLLM makes the loader itself"""

    def download_model(self, model_config: Any) -> None:
        pass

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        if self.weights is None:
            raise RuntimeError("vLLM loads weights outside `loading`")
        self.weights.share_with(model, model_config.dtype)


@contextlib.contextmanager
def loading(weights: TrainerWeights) -> Iterator[None]:
    """A block in which vLLM loads these weights."""
    SharedLoader.weights = weights
    try:
        yield
    finally:
        SharedLoader.weights = None


# ---- the worker: what happens between the loading of the model and the capture of graphs


class AdapterWorker(Worker):
    """vLLM's worker, with the adapter's products fused before graphs are captured; vLLM makes it by `WORKER`, its name.

    Between the model with its adapter layers and the captured graphs vLLM has no door but `load_lora_model`."""

    def load_model(self, **settings: Any) -> None:
        runner = self.model_runner
        load_lora_model = runner.load_lora_model
        runner.load_lora_model = lambda *arguments: fuse_adapters(load_lora_model(*arguments))
        # Skip capturing graphs without LoRA: every request uses the adapter, and each capture costs about a second.
        if 0 in getattr(runner, "lora_capture_cases", []):
            runner.lora_capture_cases = [case for case in runner.lora_capture_cases if case]
        super().load_model(**settings)


WORKER = f"{__name__}.{AdapterWorker.__name__}"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
"""names of vLLM's classes whose forward is down_proj(act_fn(gate_up_proj(x))), with a SiluAndMul as act_fn"""


def fuse_adapters(model: Any) -> Any:
    """Let every layer that has an attribute `nf4` add its adapter within its NF4 product; returns the model.

    All requests carry the one adapter, so vLLM's mapping from tokens to adapters is not consulted: launching its
    kernels, which are made for many adapters, takes the host longer than they take the card. The A matrices of a merged
    layer become views of one matrix, and so do its B matrices."""
    modules = model.lora_manager.modules  # in the order in which they run
    weights = {name: getattr(module.base_layer, "nf4", None) for name, module in modules.items()}
    fused: dict[str, Quantized] = {name: weight for name, weight in weights.items() if weight is not None}
    for (name, weight), after in itertools.zip_longest(fused.items(), list(fused.values())[1:]):
        module = modules[name]
        lora = _merge_slots(name, module, weight.rows)
        parent, _, leaf = name.rpartition(".")
        # gate_up's product prefetches nothing: between it and down's the memory is never idle, and nothing was gained.
        prefetch = None if after is None or leaf == GATE_UP else after.packed
        mlp = model.get_submodule(parent)
        gated_mlp = (
            type(mlp).__name__ in GATED_MLPS
            and type(mlp.act_fn).__name__ == "SiluAndMul"
            and {f"{parent}.{GATE_UP}", f"{parent}.{DOWN}"} <= fused.keys()
        )
        module.apply = functools.partial(apply_with_adapter, weight, lora, gated_mlp and leaf == GATE_UP, prefetch)
        if gated_mlp and leaf == DOWN:
            mlp.act_fn.forward = functools.partial(_activate_long_steps, mlp.act_fn.forward)
    return model


def _merge_slots(name: str, module: Any, rows: int) -> Lora:
    """The adapter buffers of one of vLLM's layers as one A and one B; the layer's own become views of them."""
    a, b = (torch.cat([t[0, 0] for t in stacked]) for stacked in (module.lora_a_stacked, module.lora_b_stacked))
    ends = tuple(itertools.accumulate(t.shape[2] for t in module.lora_b_stacked))
    if ends[-1] != rows or module.lora_a_stacked[0].shape[:2] != (1, 1):
        raise RuntimeError(f"vLLM keeps the adapter of {name} in a layout that is not known here")
    module.lora_a_stacked = tuple(t[None, None] for t in a.chunk(len(ends)))
    module.lora_b_stacked = tuple(t[None, None] for t in b.tensor_split(ends[:-1]))
    return Lora(a, b, ends, new_counters(a.device))


def apply_with_adapter(
    weight: Quantized,
    lora: Lora,
    gate_up: bool,
    prefetch: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `apply` of one of vLLM's layers with an adapter.

    gate_up: whether silu(gate) * up is to be computed from the result. In steps of up to `FUSED_ROWS` tokens a product
    does it: this one where the kernel for few rows runs, else the one after it, which then sees twice its columns. In
    longer steps vLLM's own activation does (`_activate_long_steps`)."""
    gated: Any = None
    if gate_up and _in_short_step(x) and x.numel() <= FEW_ROWS_TILE * x.shape[-1]:
        gated = "y"
    elif x.shape[-1] == 2 * weight.cols:
        gated = "x"
    return nf4_linear(
        x, weight.packed, weight.absmax, weight.shape, bias, lora=lora, gated=gated, prefetch_next=prefetch
    )


def _activate_long_steps(activate: Callable, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up by vLLM's `activate`, except in short steps, where a product computes it."""
    return x if _in_short_step(x) else activate(x)


def _in_short_step(x: torch.Tensor) -> bool:
    """Whether x [..., columns] has so few rows that the activation is part of a product."""
    return x.numel() <= FUSED_ROWS * x.shape[-1]


def quick_logprobs(vllms: Callable) -> Callable:
    """vLLM's log-probabilities of given tokens, by `token_logprob` where one token per row is asked for.

    vLLM's kernel reads each row of logits twice, 1,024 values at a time: about 100 us per decode step instead of 13."""

    def compute_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """logits [rows, vocabulary], token_ids [rows, tokens] -> [rows, tokens]"""
        if token_ids.shape[1] == 1:
            return token_logprob(logits, token_ids[:, 0])[:, None]
        return vllms(logits, token_ids)

    return compute_token_logprobs


if not current_platform.is_cpu():
    logprob.compute_token_logprobs = quick_logprobs(logprob.compute_token_logprobs)

# ---- sleeping: the KV cache comes and goes


class KVCacheOnly:
    """A sleep-mode backend: asleep, the KV cache has no memory, and everything else stays as it is.

    vLLM's own backend would copy to the host what vLLM allocated itself (the adapter's buffers, norms), and drop the
    rest."""

    @classmethod
    def is_supported(cls) -> bool:
        return True

    def suspend(self, level: int = 1) -> None:
        for data in CuMemAllocator.get_instance().pointer_to_data.values():
            if data.tag == "kv_cache" and not data.is_asleep:
                unmap_and_release(data.handle)
                data.is_asleep = True

    def resume(self, tags: list[str] | None = None) -> None:
        CuMemAllocator.get_instance().wake_up(["kv_cache"])


BACKEND = "grpo_kv_cache_only"
SleepModeBackendFactory.register_backend(BACKEND, __name__, KVCacheOnly.__name__)


def sleep_by_our_backend(llm: LLM) -> None:
    """Select `KVCacheOnly`. No argument of LLM does in 0.26, and the worker reads the setting when it first sleeps."""
    llm.llm_engine.vllm_config.model_config.sleep_mode_backend = BACKEND


# ---- the adapter's buffers, and the end


def open_slot(rank: int, model: Any) -> dict[str, Slot]:
    """Register an adapter of zeros as `ADAPTER_ID`, pin it in a slot, and return that slot's buffers by layer.

    From then on vLLM finds the adapter loaded and active, and never reads a file. model: vLLM's, with LoRA layers."""
    manager: Any = model.lora_manager
    manager.add_adapter(manager.create_dummy_lora(ADAPTER_ID, rank, {}))
    manager.activate_adapter(ADAPTER_ID)
    manager.pin_adapter(ADAPTER_ID)
    index = manager.lora_index_to_id.index(ADAPTER_ID)
    found: dict[str, Slot] = {}
    for name, module in manager.modules.items():
        layers = layers_of(name, manager.packed_modules_mapping)
        if not len(layers) == len(module.lora_a_stacked) == len(module.lora_b_stacked):
            raise RuntimeError(f"vLLM keeps the adapter of {name} in a layout that is not known here")
        for layer, a, b in zip(layers, module.lora_a_stacked, module.lora_b_stacked):
            found[layer] = Slot(a[index, 0], b[index, 0])
    return found


def shut_down(llm: LLM) -> None:
    """End the engine core. Its allocator gives its memory pools back then, which must find nothing alive in them."""
    llm.collective_rpc(_forget_adapters)
    llm.llm_engine.engine_core.shutdown()


def _forget_adapters(worker: Any) -> None:
    """Drop everything that holds the adapter's buffers: the managers, the layers' replaced `apply`, and the tables of
    pointers in vLLM's kernels, which keep the tensors of layers that are not merged."""
    model = worker.model_runner.get_model()
    for module in model.lora_manager.modules.values():
        module.__dict__.pop("apply", None)
        module.lora_a_stacked = module.lora_b_stacked = ()
    del worker.model_runner.lora_manager, model.lora_manager
    tables = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    if tables is not None:
        tables._LORA_A_PTR_DICT.clear()
        tables._LORA_B_PTR_DICT.clear()
