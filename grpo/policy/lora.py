"""The adapted NF4 layer, y = x W^T + bias + scaling * x A^T B^T, in fewer passes over memory than PEFT takes.

PEFT passes six times more over y: it copies the base layer's result, scales the adapter's and adds the two, each out of
place. Here the matrix product itself adds the adapter's part, to y in the forward pass and to the gradient of x in the
backward pass. The scaling is multiplied into B, and that is rounded once, as in the sampler. Layers of one input
(queries, keys and values; gate and up) share the product with their As, which are stacked along the rank.

`shrunk` is x A^T, after vLLM's name for this product. Everything here is a function of tensors and `Adapted` records;
`grpo.policy.patches` puts it into PEFT's layers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.nf4.dequantize import absmax_of, nf4_dequantize, triton
from grpo_kernels.nf4.linear import nf4_linear
from grpo_kernels.nf4.prologue import Lora, new_counters


class Adapted(NamedTuple):
    """One adapted NF4 layer."""

    base: Any
    """bitsandbytes' layer, with W [out, in] in 4 bits and a bias, or None for it"""
    a: Tensor
    """[rank, in] float32"""
    b: Tensor
    """[out, rank] float32"""
    scaling: float


def lora_products(x: Tensor, layers: Sequence[Adapted], *, skip_output: bool = False) -> tuple[Tensor, ...]:
    """Each layer's y = x W^T + bias + scaling * x A^T B^T for one x, differentiable in x and the adapters.

    x: [..., in]. skip_output: leave the results uninitialized, for a caller who needs their gradients alone.
    Returns [..., out] for each layer, in x's dtype."""
    return _LoraLinears.apply(x, layers, skip_output, *adapter_weights(layers))


def adapter_weights(layers: Sequence[Adapted]) -> list[Tensor]:
    """A and B of each layer in turn, which autograd must see among a function's arguments."""
    return [p for layer in layers for p in (layer.a, layer.b)]


class _LoraLinears(torch.autograd.Function):
    """See `lora_products`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Adapted], skip_output: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        flat = flattened(x)
        results, saved = products(flat, layers, skip_output=skip_output)
        ctx.save_for_backward(flat, *saved)
        ctx.layers, ctx.like = layers, (x.shape, x.dtype)
        return tuple(unflattened(y, x.shape, x.dtype) for y in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        flat = [grad.reshape(-1, grad.shape[-1]).to(x.dtype) for grad in grads]
        grad_shrunk = gradient_of_shrunk(flat, ctx.layers, saved)
        grad_x = gradient_of_x(flat, grad_shrunk, ctx.layers, saved) if needs_x else None
        found = gradients_of_adapters(flat, grad_shrunk, x, ctx.layers, saved, needs)
        return None if grad_x is None else unflattened(grad_x, *ctx.like), None, None, *found


def flattened(x: Tensor) -> Tensor:
    """x [..., width] as [tokens, width], in the dtype of products: autocast's where that is on, else x's own."""
    device = x.device.type
    flat = x.reshape(-1, x.shape[-1])
    return flat.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else flat


def unflattened(y: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """y [tokens, width] as [..., width], with the leading dimensions of `shape`."""
    return y.view(*shape[:-1], y.shape[1]).to(dtype)


def products(
    x: Tensor, layers: Sequence[Adapted], *, skip_output: bool = False
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The layers' results for one x, without autograd, and what their gradients need beside x.

    x: [tokens, in]. skip_output: leave the results uninitialized.
    Returns the results, [tokens, out] each, and `saved`: x A^T for the stacked As [tokens, sum of ranks], the stacked
    As [sum of ranks, in], and each layer's scaling * B [out, rank]; all in x's dtype."""
    as_ = [layer.a for layer in layers]
    stacked_a = (as_[0] if len(as_) == 1 else torch.cat(as_)).to(x.dtype)
    shrunk = F.linear(x, stacked_a)
    scaled = [_scaled_b(layer, x.dtype) for layer in layers]
    results = []
    for layer, b, part in zip(layers, scaled, _by_layer(shrunk, layers, 1)):
        if skip_output:
            results.append(x.new_empty(len(x), len(b)))
        else:
            results.append(F.linear(x, dense_weight(layer.base, x.dtype), _bias(layer, x.dtype)).addmm_(part, b.t()))
    return results, (shrunk, stacked_a, *scaled)


def gradient_of_shrunk(grads: Sequence[Tensor], layers: Sequence[Adapted], saved: Sequence[Tensor]) -> Tensor:
    """The gradient of x A^T for the stacked As: [tokens, sum of ranks].

    grads: gradient of each layer's y, [tokens, out], in the dtype of products. saved: second result of `products`."""
    shrunk, _, *scaled = saved
    grad_shrunk = torch.empty_like(shrunk)
    for grad, b, part in zip(grads, scaled, _by_layer(grad_shrunk, layers, 1)):
        torch.mm(grad, b, out=part)
    return grad_shrunk


def gradient_of_x(
    grads: Sequence[Tensor], grad_shrunk: Tensor, layers: Sequence[Adapted], saved: Sequence[Tensor]
) -> Tensor:
    """The gradient of x [tokens, in], summed in place over the layers. Arguments as for `gradient_of_shrunk`."""
    grad_x = torch.mm(grads[0], dense_weight(layers[0].base, grads[0].dtype))
    for grad, layer in zip(grads[1:], layers[1:]):
        grad_x.addmm_(grad, dense_weight(layer.base, grad.dtype))
    return grad_x.addmm_(grad_shrunk, saved[1])


def gradients_of_adapters(
    grads: Sequence[Tensor],
    grad_shrunk: Tensor,
    x: Tensor,
    layers: Sequence[Adapted],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of each layer's A and B in turn, in the adapter's dtype; None where `needs` says False.

    x: [tokens, in]. The other arguments are those of `gradient_of_shrunk`."""
    grad_as: Sequence[Tensor | None] = [None] * len(layers)
    if any(needs[::2]):
        grad_as = _by_layer(mm_in(grad_shrunk.t(), x, layers[0].a.dtype), layers, 0)
    found: list[Tensor | None] = []
    for i, (grad, layer, grad_a, part) in enumerate(zip(grads, layers, grad_as, _by_layer(saved[0], layers, 1))):
        grad_b = mm_in(grad.t(), part, layer.b.dtype) if needs[2 * i + 1] else None
        if grad_b is not None and layer.scaling != 1:
            grad_b.mul_(layer.scaling)
        found += (grad_a if needs[2 * i] else None, grad_b)
    return found


def _by_layer(stacked: Tensor, layers: Sequence[Adapted], dim: int) -> Sequence[Tensor]:
    """Views of a tensor whose dimension `dim` is the stacked ranks: one view per layer."""
    if len(layers) == 1:
        return (stacked,)
    # `split` does the same, but first looks at the type of its argument, which takes the host longer.
    return stacked.split_with_sizes([layer.a.shape[0] for layer in layers], dim)


def _scaled_b(layer: Adapted, dtype: torch.dtype) -> Tensor:
    """scaling * B [out, rank] in dtype, in one pass and rounded once."""
    b = layer.b
    return b.to(dtype) if layer.scaling == 1 else torch.mul(b, layer.scaling, out=torch.empty_like(b, dtype=dtype))


def _bias(layer: Adapted, dtype: torch.dtype) -> Tensor | None:
    bias = layer.base.bias
    return None if bias is None else bias.to(dtype)


def mm_in(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix product a b in `dtype`, which may be wider than the dtype of a and b: its sums are not rounded to the
    narrower one first."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def dense_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """W [out, in] of bitsandbytes' layer, dequantized to `dtype`."""
    weight = base.weight
    state = weight.quant_state
    # bitsandbytes' subclass of Tensor would cost the host 2 us at each access to an attribute.
    with torch._C.DisableTorchFunctionSubclass():
        if weight.is_cuda and triton is not None and not torch.version.hip:
            return nf4_dequantize(weight.data, absmax_of(state), tuple(state.shape), dtype)
        return bnb.functional.dequantize_4bit(weight.view(-1, 1), state).to(dtype)


_counters = functools.cache(new_counters)
"""The kernel's counters of one device. All layers share them, since their products run one after the other; the kernel
leaves them zeroed."""


def fused_product(x: Tensor, layer: Adapted) -> Tensor:
    """The layer's y [tokens, out] for x [tokens, in] of few rows, without gradient: the kernel reads the 4-bit weight
    once, and W is not dequantized to memory."""
    weight = layer.base.weight
    state = weight.quant_state
    shape = (state.shape[0], state.shape[1])
    lora = Lora(layer.a.to(x.dtype), _scaled_b(layer, x.dtype), shape[:1], _counters(x.device))
    return nf4_linear(x, weight.data, absmax_of(state), shape, _bias(layer, x.dtype), lora=lora)
