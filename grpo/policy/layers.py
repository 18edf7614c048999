"""A transformers model's layers in fewer passes over memory, for training: norms, attention's products and rotary
embedding, gated MLPs, adapted 4-bit layers."""

import contextlib
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP, Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

from grpo.policy.lora import (
    Adapted,
    FusedLinear4bit,
    adapters,
    flattened,
    fuse_adapters,
    gradient_of_shrunk,
    gradient_of_x,
    gradients_of_adapters,
    handed_out,
    lora_products,
    products,
    unflattened,
)
from grpo_kernels.rope import rope
from grpo_kernels.swiglu import swiglu, swiglu_backward_

NORMS = (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm)
MLPS = (LlamaMLP, MistralMLP, Phi3MLP, Qwen2MLP)
ATTENTIONS = (LlamaAttention, MistralAttention, Phi3Attention, Qwen2Attention)
MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2")
"""of a transformers config: models whose layers are of these classes"""
SILU = (nn.SiLU, type(ACT2FN["silu"]))


class Fused(NamedTuple):
    """How many layers of each kind were taken over."""

    adapters: int
    norms: int
    mlps: int
    attentions: int


def fuse_layers(model: PeftModel) -> Fused:
    """Take over the forward of the layers whose classes are known exactly; others stay as they are.

    RMSNorm by torch's own kernel: transformers writes the activations in fp32 several times. silu(gate) * up by
    `grpo_kernels.swiglu`, the rotary embedding by `grpo_kernels.rope`. Adapted 4-bit layers by `fuse_adapters`, which
    raises ValueError for another PEFT than it knows; where all of a gated MLP's or of queries, keys and values are
    such, by one autograd function. Values are rounded where vLLM rounds them: as transformers does, but adapters and
    the rotary embedding less often. Parameters, names and files stay as they are. A second call finds nothing left."""
    norms = [m for m in model.modules() if type(m) in NORMS]
    mlps = [m for m in model.modules() if type(m) in MLPS and isinstance(_activation(m), SILU)]
    for norm in norms:
        norm.__class__ = _subclass(type(norm), _norm)
    for mlp in mlps:
        mlp.__class__ = _subclass(type(mlp), _mlp)
    attentions = [m for m in model.modules() if type(m) in ATTENTIONS]
    for attention in attentions:
        attention.__class__ = _subclass(type(attention), _attention(type(attention)))
    return Fused(fuse_adapters(model), len(norms), len(mlps), len(attentions))


def _subclass(kind: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """Of the same name. (A `forward` of the instance's own would be a cycle, and keep the weights after the model.)"""
    return type(kind.__name__, (kind,), {"forward": forward})


def _activation(mlp: Any) -> Any:
    return mlp.activation_fn if isinstance(mlp, Phi3MLP) else mlp.act_fn


def _norm(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != norm.weight.dtype:  # transformers then returns the wider of the two
        return super(type(norm), norm).forward(x)
    with torch.autocast(x.device.type, enabled=False):  # which may ask for fp32, as the kernel computes in anyway
        # Rounded before the weight as well, as transformers and vLLM do: one rounding less is further from the sampler.
        return F.rms_norm(x, norm.weight.shape, None, norm.variance_epsilon) * norm.weight


def _adapted(layers: Sequence[Any]) -> list[Adapted] | None:
    """None unless all of them are adapted 4-bit layers in their usual state."""
    if torch.is_inference_mode_enabled():  # in which layers decode, each by itself
        return None
    found = []
    for layer in layers:
        adapted = layer.adapted() if isinstance(layer, FusedLinear4bit) else None
        if adapted is None:
            return None
        found.append(adapted)
    return found


def _attention(kind: type[nn.Module]) -> Callable[..., Any]:
    forward = _with_rope(kind)

    def attend(attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The three products at once, for transformers' own forward to ask its layers for."""
        made: Any = contextlib.nullcontext()
        if kind is not Phi3Attention:
            layers = (attention.q_proj, attention.k_proj, attention.v_proj)
            adapted = _adapted(layers)
            if adapted is not None:
                made = handed_out(layers, hidden_states, lora_products(hidden_states, adapted))
        with made:
            return forward(attention, hidden_states, *args, **kwargs)

    return attend


def _with_rope(kind: type[nn.Module]) -> Callable[..., Any]:
    """transformers' forward of that class, by whose name for the rotary embedding `rope` is found: a function of the
    same code with globals of its own, so that no other model sees it."""
    forward: Any = inspect.unwrap(kind.forward)
    name = "apply_rotary_pos_emb"
    if name not in forward.__code__.co_names:
        raise ValueError(f"{kind.__name__}.forward calls no {name} in this release of transformers; pass fused=False")
    theirs = forward.__globals__[name]

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q, k: [batch, heads, time, dim]"""
        if not q.dtype == k.dtype == cos.dtype:
            return theirs(q, k, cos, sin)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    own = types.FunctionType(
        forward.__code__, forward.__globals__ | {name: turned}, name, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    first = (mlp.gate_up_proj,) if isinstance(mlp, Phi3MLP) else (mlp.gate_proj, mlp.up_proj)
    layers = (*first, mlp.down_proj)
    adapted = _adapted(layers)
    if adapted and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return _GatedMLP.apply(x, adapted, mlp.down_proj.result_is_read, *adapters(adapted))
    gate, up = _gate_and_up([layer(x) for layer in first])
    if gate.dtype != up.dtype:  # one in 4 bits, one not: torch takes the wider
        return mlp.down_proj(F.silu(gate) * up)
    return mlp.down_proj(swiglu(gate, up))


def _gate_and_up(made: Sequence[Tensor]) -> Sequence[Tensor]:
    return made if len(made) == 2 else made[0].chunk(2, dim=-1)


class _GatedMLP(torch.autograd.Function):
    """x: [..., hidden]; layers: gate and up, or both as one, and down. silu(gate) * up is made again in the backward
    pass rather than kept, in the place of its gradient, as gate's and up's are in theirs: a layer's backward pass is
    fullest here. So there is one backward pass, and a second is refused. read: whether the result's values matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Adapted], read: bool, *adapters: Tensor) -> Tensor:
        flat = flattened(x)
        *first, down = layers
        made, saved = products(flat, first)
        [y], saved_down = products(swiglu(*_gate_and_up(made)), [down], read=read)
        ctx.save_for_backward(flat, *made, *saved, *saved_down)
        ctx.layers, ctx.like = layers, (x.shape, x.dtype)
        return unflattened(y, x.shape, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        *first, down = ctx.layers
        needs_x, _, _, *needs = ctx.needs_input_grad
        x, *rest = ctx.saved_tensors
        made, saved, saved_down = rest[: len(first)], rest[len(first) : -3], rest[-3:]
        flat = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_shrunk = gradient_of_shrunk([flat], [down], saved_down)
        hidden = gradient_of_x([flat], grad_shrunk, [down], saved_down)
        gate, up = _gate_and_up(made)
        swiglu_backward_(gate, up, hidden)
        found_down = gradients_of_adapters([flat], grad_shrunk, hidden, [down], saved_down, needs[-2:])
        del hidden  # as large as what is left
        grad_shrunk = gradient_of_shrunk(made, first, saved)
        grad_x = gradient_of_x(made, grad_shrunk, first, saved) if needs_x else None
        found = gradients_of_adapters(made, grad_shrunk, x, first, saved, needs[:-2])
        return None if grad_x is None else unflattened(grad_x, *ctx.like), None, None, *found, *found_down
