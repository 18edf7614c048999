"""Where this package reaches into the objects of other libraries, beyond their public interface.

| what runs differently             | how                                             | door                          |
| --------------------------------- | ----------------------------------------------- | ----------------------------- |
| RMSNorm, gated MLP and attention  | the module becomes an instance of a subclass of | `_swap_forward`, for          |
| of transformers                   | its own class, with another `forward`           | `fuse_layers`                 |
| rotary embedding in attention     | a copy of transformers' `forward` with its own  | `_with_fused_rope`            |
|                                   | globals, where `apply_rotary_pos_emb` is ours   |                               |
| PEFT's adapted 4-bit layer        | the module becomes a `FusedLinear4bit`          | `fuse_adapters`               |
| queries, keys, values in one step | results wait in the three layers' `precomputed` | `precomputed_results`         |
|                                   | until transformers' attention calls the layers  |                               |
| activation checkpointing          | the layer's `_gradient_checkpointing_func`      | `checkpoint_layers`           |
| the unused last product of a      | `output_skipped` of the down projection, while  | `FusedLinear4bit.skip_output` |
| checkpointed layer's second pass  | the layer is recomputed                         |                               |
| offloading of the layers' inputs  | two hooks around the backbone's forward pass    | `offload_inputs`              |
| dtype of bitsandbytes' products   | attributes of layer and quantization state      | `models.set_compute_dtype`    |
| dropout, which must be off        | `p` of each dropout module is set to 0          | `models.load_policy`          |
| one line of bitsandbytes' log     | a filter on its logger                          | `grpo/policy/__init__.py`     |

Parameters, names and files stay those of the libraries. Only classes that are known exactly are patched, and what a
patch does not handle is left to the library's own code. tests/test_patches.py has a test of each door.

A class is swapped, rather than `module.forward` assigned, because a function that is stored on a module and knows the
module is a reference cycle: the weights would stay on the GPU after the model is dropped.

State passes from one layer to another in two places, both attributes of `FusedLinear4bit`: `precomputed` and
`output_skipped`. transformers' own code runs in between, and takes no argument of ours.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, Phi3MLP, Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm

from grpo.policy.layers import gate_and_up, gated_mlp, rms_norm
from grpo.policy.lora import Adapted, flattened, fused_product, lora_products, unflattened
from grpo.policy.recompute import ActivationCheckpoint, offloading
from grpo_kernels.nf4.dequantize import BLOCK
from grpo_kernels.nf4.linear import choose_backend
from grpo_kernels.rope import rope
from grpo_kernels.swiglu import swiglu

# A class of another architecture goes into these lists, and its model_type into MODEL_TYPES of grpo/policy/layers.py.
NORMS = (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm)
MLPS = (LlamaMLP, MistralMLP, Phi3MLP, Qwen2MLP)
ATTENTIONS = (LlamaAttention, MistralAttention, Phi3Attention, Qwen2Attention)
DECODER_LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Phi3DecoderLayer, Qwen2DecoderLayer)
"""layers that return one tensor, the residual plus the result of `mlp.down_proj`, so that the gradient of their output
does not depend on that result"""
SILU = (nn.SiLU, type(ACT2FN["silu"]))
PEFT = "0.21"
"""the release of PEFT whose `lora.Linear4bit` the patch was written for"""


class Patched(NamedTuple):
    """Number of modules of each kind that were patched."""

    adapters: int
    norms: int
    mlps: int
    attentions: int


def fuse_layers(model: PeftModel) -> Patched:
    """Let norms, gated MLPs, rotary embeddings and adapted 4-bit layers pass over memory less often.

    Values are rounded where vLLM rounds them: as in transformers, but adapters and rotary embeddings less often. A
    second call finds nothing left to patch. Raises ValueError for an unknown release of PEFT (`fuse_adapters`)."""
    norms = [m for m in model.modules() if type(m) in NORMS]
    mlps = [m for m in model.modules() if type(m) in MLPS and isinstance(_activation(m), SILU)]
    attentions = [m for m in model.modules() if type(m) in ATTENTIONS]
    for norm in norms:
        _swap_forward(norm, _norm_forward)
    for mlp in mlps:
        _swap_forward(mlp, _mlp_forward)
    for attention in attentions:
        kind: Any = type(attention)
        _swap_forward(attention, _attention_forward(kind))
    return Patched(fuse_adapters(model), len(norms), len(mlps), len(attentions))


def _swap_forward(module: Any, forward: Callable[..., Any]) -> None:
    """Give this one module another forward."""
    kind: Any = type(module)
    module.__class__ = _subclass(kind, forward)


@functools.cache
def _subclass(kind: type[Any], forward: Callable[..., Any]) -> type[Any]:
    """A subclass of `kind` of the same name, since names show up in printed models and in files."""
    return type(kind.__name__, (kind,), {"forward": forward})


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != norm.weight.dtype:  # some checkpoints keep norms in fp32; transformers returns the wider of the two
        return super(type(norm), norm).forward(x)
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _activation(mlp: Any) -> Any:
    return mlp.activation_fn if isinstance(mlp, Phi3MLP) else mlp.act_fn


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    first = (mlp.gate_up_proj,) if isinstance(mlp, Phi3MLP) else (mlp.gate_proj, mlp.up_proj)
    layers = (*first, mlp.down_proj)
    adapted = _all_adapted(layers)
    if adapted and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return gated_mlp(x, adapted, skip_output=mlp.down_proj.output_skipped)
    gate, up = gate_and_up([layer(x) for layer in first])
    if gate.dtype != up.dtype:  # one of them in 4 bits, one not: torch takes the wider
        return mlp.down_proj(F.silu(gate) * up)
    return mlp.down_proj(swiglu(gate, up))


def _all_adapted(layers: Sequence[Any]) -> list[Adapted] | None:
    """The layers as `Adapted` where all of them are adapted 4-bit layers in their usual state, else None."""
    if torch.is_inference_mode_enabled():  # the torch engine decodes in it; `FusedLinear4bit.forward` serves it
        return None
    found = []
    for layer in layers:
        adapted = layer.adapted() if isinstance(layer, FusedLinear4bit) else None
        if adapted is None:
            return None
        found.append(adapted)
    return found


@functools.cache
def _attention_forward(kind: type[Any]) -> Callable[..., Any]:
    """The forward of an attention class, with a fused rotary embedding, and queries, keys and values in one step."""
    forward = _with_fused_rope(kind)

    def attend(attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        results: Any = contextlib.nullcontext()
        if kind is not Phi3Attention:  # whose queries, keys and values are one layer already
            layers = (attention.q_proj, attention.k_proj, attention.v_proj)
            adapted = _all_adapted(layers)
            if adapted is not None:
                results = precomputed_results(layers, hidden_states, lora_products(hidden_states, adapted))
        with results:
            return forward(attention, hidden_states, *args, **kwargs)

    return attend


def _with_fused_rope(kind: type[Any]) -> Callable[..., Any]:
    """A copy of the class's forward in which `apply_rotary_pos_emb` is `grpo_kernels.rope`. The copy has its own
    globals, so other models keep transformers' function."""
    forward: Any = inspect.unwrap(kind.forward)
    name = "apply_rotary_pos_emb"
    if name not in forward.__code__.co_names:
        raise ValueError(f"{kind.__name__}.forward calls no {name} in this release of transformers; pass fused=False")
    transformers_rope = forward.__globals__[name]

    def fused_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q, k: [batch, heads, time, dim]. cos, sin: [batch or 1, time, rotary]."""
        if not q.dtype == k.dtype == cos.dtype:
            return transformers_rope(q, k, cos, sin)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    copy = types.FunctionType(
        forward.__code__, forward.__globals__ | {name: fused_rope}, name, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def fuse_adapters(model: PeftModel) -> int:
    """Make every adapted NF4 layer a `FusedLinear4bit`; returns their number. A second call finds none left.

    Raises ValueError for another release of PEFT than the patch was written for."""
    version = importlib.metadata.version("peft")
    if not version.startswith(PEFT + "."):
        raise ValueError(
            f"fuse_adapters was written for peft {PEFT}.* and found {version}; install that, or pass fused=False"
        )
    layers = [m for m in model.modules() if type(m) is Linear4bit and _is_nf4(m.get_base_layer())]
    for layer in layers:
        layer.__class__ = FusedLinear4bit
    return len(layers)


def _is_nf4(base: Any) -> bool:
    """Whether our kernels read the weight of this layer of bitsandbytes."""
    state = base.weight.quant_state
    known = state is not None and (state.quant_type, state.blocksize, base.weight.dtype) == ("nf4", BLOCK, torch.uint8)
    return known and state.shape[1] % BLOCK == 0


class FusedLinear4bit(Linear4bit):
    """PEFT's adapted 4-bit layer with a forward pass that adds the adapter within the products (`grpo.policy.lora`).

    Under `torch.inference_mode`, in which the torch engine decodes, it is the kernel that reads the weight once, where
    that applies. Where the layer is asked for anything unusual (adapters off or several of them, merged weights,
    dropout, a variant of LoRA), PEFT's forward runs."""

    output_skipped = False
    """whether to leave the result uninitialized, see `skip_output`"""

    @contextlib.contextmanager
    def skip_output(self) -> Iterator[None]:
        """Within it the layer does not compute its result, but records the gradient as ever. For the second forward
        pass of a checkpointed layer, in which the result of its last product is not needed."""
        self.output_skipped = True
        try:
            yield
        finally:
            self.output_skipped = False

    def adapted(self) -> Adapted | None:
        """The layer as our functions take it; None where PEFT's forward is to run."""
        # `_modules` and `_parameters` rather than attributes, which nn.Module finds slowly; there are ten here.
        modules: dict[str, Any] = self._modules
        base, lora_a = modules["base_layer"], modules["lora_A"]._modules
        names = self.active_adapters
        name: Any = names[0] if len(names) == 1 else None
        if (
            not isinstance(base, bnb.nn.Linear4bit)  # in the torch engine's dense copy it is torch's
            or name not in lora_a
            or self.disable_adapters
            or self.merged
            or self.lora_variant
            or getattr(modules["lora_dropout"]._modules[name], "p", 0.0) != 0.0
        ):
            return None
        b = modules["lora_B"]._modules[name]._parameters
        if b["bias"] is not None:
            return None
        return Adapted(base, lora_a[name]._parameters["weight"], b["weight"], self.scaling[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made_for, y = self.__dict__.pop("precomputed", (None, None))  # see `precomputed_results`
        if made_for is x and not (args or kwargs):
            return y
        adapted = None if args or kwargs else self.adapted()
        if adapted and torch.is_inference_mode_enabled():
            flat = flattened(x)
            if choose_backend(flat, len(flat), flat.shape[1]) == "fused":
                return unflattened(fused_product(flat, adapted), x.shape, x.dtype)
            adapted = None
        if adapted is None:
            return super().forward(x, *args, **kwargs)
        return lora_products(x, [adapted], skip_output=self.output_skipped)[0]


@contextlib.contextmanager
def precomputed_results(layers: Sequence[FusedLinear4bit], x: Tensor, results: Sequence[Tensor]) -> Iterator[None]:
    """Within it each layer's next forward pass returns its result from `results`, if it is called with this very x.

    So queries, keys and values are made together, though transformers' attention calls the three layers one by one."""
    for layer, y in zip(layers, results):
        layer.__dict__["precomputed"] = (x, y)  # rather than an attribute, which nn.Module sets slowly
    del results, y  # so that a result's memory is free as soon as its layer has returned it and it was used
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("precomputed", None)


def checkpoint_layers(model: PeftModel) -> int:
    """Let checkpointed layers of known classes use our `ActivationCheckpoint`; returns their number.

    Other layers, and those that keep their activations, stay as they are. The adapters must be in place."""
    layers: list[Any] = [m for m in model.modules() if type(m) in DECODER_LAYERS and m.gradient_checkpointing]
    for layer in layers:
        last = layer.mlp.down_proj
        skip_output = last.skip_output if isinstance(last, FusedLinear4bit) else contextlib.nullcontext
        layer._gradient_checkpointing_func = ActivationCheckpoint(skip_output)
    return len(layers)


def offload_inputs(backbone: nn.Module) -> None:
    """From here on each forward pass of the backbone that records gradients keeps the inputs of its layers in host
    memory until the backward pass (`grpo.policy.recompute.offloading`).

    The second forward pass of a checkpointed layer runs the layer alone and not the backbone, so no hook sees it."""
    hooks = _OffloadHooks()
    backbone.register_forward_pre_hook(hooks.before_forward)
    backbone.register_forward_hook(hooks.after_forward, always_call=True)  # after an error, too


class _OffloadHooks:
    """Enters `offloading` before a forward pass of the backbone, and leaves it afterwards."""

    def __init__(self) -> None:
        self.entered = contextlib.ExitStack()

    def before_forward(self, backbone: nn.Module, args: Any) -> None:
        self.entered.close()  # torch calls no hook after a KeyboardInterrupt, so the last pass may have left it open
        if torch.is_grad_enabled():
            self.entered.enter_context(offloading(backbone, next(backbone.parameters()).device))

    def after_forward(self, backbone: nn.Module, args: Any, output: Any) -> None:
        self.entered.close()
