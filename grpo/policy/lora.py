"""The trainer's linear layers, NF4 weight and LoRA adapter in one step, in place of PEFT's forward pass."""

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from grpo_kernels.nf4.dequantize import BLOCK, absmax_of, nf4_dequantize, triton
from grpo_kernels.nf4.linear import choose_backend, nf4_linear
from grpo_kernels.nf4.prologue import Lora, new_counters

PEFT = "0.21"
"""the release whose `lora.Linear4bit` this stands in for"""


def fuse_adapters(model: PeftModel) -> int:
    """Let every adapted NF4 layer compute y = x W^T + bias + scaling * x A^T B^T as one step; returns how many do.

    PEFT passes six times more over y: it copies the base layer's result, scales the adapter's and adds the two, each
    out of place. Here the adapter's product is added by the matrix product itself, in the forward pass to y and in the
    backward pass to the gradient of x, and the scaling is part of B, as in the sampler, rounded once. Under
    `torch.inference_mode`, in which the torch engine decodes, it is `nf4_linear` with the adapter in it where that
    reads the weight once, and PEFT's way where not. Where a layer is asked for anything else (adapters off or several,
    merged weights, dropout, a variant of LoRA), PEFT's own forward runs. A layer becomes one of a subclass: parameters,
    names and files stay PEFT's. A second call finds none left, and returns 0.

    Raises ValueError for another PEFT than it was written for."""
    version = importlib.metadata.version("peft")
    if not version.startswith(PEFT + "."):
        raise ValueError(
            f"fuse_adapters was written for peft {PEFT}.* and found {version}; install that, or leave it out"
        )
    layers = [m for m in model.modules() if type(m) is Linear4bit and _is_nf4(m.get_base_layer())]
    for layer in layers:
        layer.__class__ = FusedLinear4bit
    return len(layers)


def _is_nf4(base: Any) -> bool:
    state = base.weight.quant_state
    known = state is not None and (state.quant_type, state.blocksize, base.weight.dtype) == ("nf4", BLOCK, torch.uint8)
    return known and state.shape[1] % BLOCK == 0


def _on_nvidia(x: Tensor) -> bool:
    """Where `grpo_kernels.nf4.linear` has Triton kernels."""
    return x.is_cuda and triton is not None and not torch.version.hip


class Adapted(NamedTuple):
    """What the product of an adapted NF4 layer is made of."""

    base: Any
    """bitsandbytes' layer"""
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scaling: float


class FusedLinear4bit(Linear4bit):
    """Not a `forward` of the instance's own: that would be a cycle, and keep the weights after the model."""

    result_is_read = True

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Within it the result's values are anything, and its gradients what they always are: for a second forward
        pass, whose last product no one reads."""
        self.result_is_read = False
        try:
            yield
        finally:
            self.result_is_read = True

    def adapted(self) -> Adapted | None:
        """None where PEFT's own forward is to run."""
        modules: dict[str, Any] = self._modules  # nn.Module's own look-up is slow, and there are ten
        base, low = modules["base_layer"], modules["lora_A"]._modules
        names = self.active_adapters
        name: Any = names[0] if len(names) == 1 else None
        if (
            not isinstance(base, bnb.nn.Linear4bit)  # in a copy whose weights were dequantized
            or name not in low
            or self.disable_adapters
            or self.merged
            or self.lora_variant
            or getattr(modules["lora_dropout"]._modules[name], "p", 0.0) != 0.0
        ):
            return None
        b = modules["lora_B"]._modules[name]._parameters
        if b["bias"] is not None:
            return None
        return Adapted(base, low[name]._parameters["weight"], b["weight"], self.scaling[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        of, y = self.__dict__.pop("ready", (None, None))  # see `handed_out`
        if of is x and not (args or kwargs):
            return y
        adapted = None if args or kwargs else self.adapted()
        if adapted and torch.is_inference_mode_enabled():
            flat = flattened(x)
            if choose_backend(flat, len(flat), flat.shape[1]) == "fused":
                return unflattened(_read_once(flat, adapted), x.shape, x.dtype)
            adapted = None
        if adapted is None:
            return super().forward(x, *args, **kwargs)
        return lora_products(x, [adapted], read=self.result_is_read)[0]


@contextlib.contextmanager
def handed_out(layers: Sequence[FusedLinear4bit], x: Tensor, results: Sequence[Tensor]) -> Iterator[None]:
    """Within it each layer's forward returns its result, made before, if it is asked first for x, this very tensor."""
    for layer, y in zip(layers, results):
        layer.__dict__["ready"] = (x, y)  # nn.Module's own assignment is slow
    del results, y  # a layer's is gone when it has been handed out and used
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("ready", None)


def flattened(x: Tensor) -> Tensor:
    """[tokens, width], in the dtype of products: autocast's, or x's own."""
    device = x.device.type
    flat = x.reshape(-1, x.shape[-1])
    return flat.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else flat


def unflattened(y: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """[tokens, width] as [..., width] with the leading dimensions of `shape`."""
    return y.view(*shape[:-1], y.shape[1]).to(dtype)


def lora_products(x: Tensor, layers: Sequence[Adapted], *, read: bool = True) -> tuple[Tensor, ...]:
    """Each layer's y = x W^T + bias + scaling * x A^T B^T: [..., out], for one x: [..., in], in its dtype.

    Differentiable in x, whose gradients are summed in place, and the adapters. read: whether the values matter."""
    return _LoraLinears.apply(x, layers, read, *adapters(layers))


def adapters(layers: Sequence[Adapted]) -> list[Tensor]:
    """A and B of each: what autograd must see among a function's arguments."""
    return [p for layer in layers for p in (layer.a, layer.b)]


_counters = functools.cache(new_counters)
"""of all layers, whose products run one after the other: zeroed once, not at each"""


def _read_once(x: Tensor, layer: Adapted) -> Tensor:
    """For few rows, without gradient: the 4-bit weight is not dequantized to memory first."""
    weight = layer.base.weight
    state = weight.quant_state
    shape = (state.shape[0], state.shape[1])
    lora = Lora(layer.a.to(x.dtype), _scaled(layer, x.dtype), shape[:1], _counters(x.device))
    return nf4_linear(x, weight.data, absmax_of(state), shape, _bias(layer, x.dtype), lora=lora)


def _bias(layer: Adapted, dtype: torch.dtype) -> Tensor | None:
    bias = layer.base.bias
    return None if bias is None else bias.to(dtype)


def _scaled(layer: Adapted, dtype: torch.dtype) -> Tensor:
    """scaling * B, in one pass, and rounded once."""
    b = layer.b
    return b.to(dtype) if layer.scaling == 1 else torch.mul(b, layer.scaling, out=torch.empty_like(b, dtype=dtype))


def products(x: Tensor, layers: Sequence[Adapted], *, read: bool = True) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Each layer's x W^T + bias + scaling * x A^T B^T: [tokens, out] for x: [tokens, in], all in x's dtype; not
    differentiable. And what the gradients need beside x: x A^T for the As one below the other, these, and each
    scaling * B. read: whether the results' values matter; if not, they are not computed."""
    lows = [layer.a for layer in layers]
    low = (lows[0] if len(lows) == 1 else torch.cat(lows)).to(x.dtype)
    shrunk = F.linear(x, low)
    scaled = [_scaled(layer, x.dtype) for layer in layers]
    results = []
    for layer, b, part in zip(layers, scaled, _parts(shrunk, layers, 1)):
        if read:
            results.append(F.linear(x, _weight(layer.base, x.dtype), _bias(layer, x.dtype)).addmm_(part, b.t()))
        else:
            results.append(x.new_empty(len(x), len(b)))
    return results, (shrunk, low, *scaled)


def _parts(joined: Tensor, layers: Sequence[Adapted], dim: int) -> Sequence[Tensor]:
    """Views: each layer's ranks."""
    if len(layers) == 1:
        return (joined,)
    return joined.split_with_sizes([layer.a.shape[0] for layer in layers], dim)  # `split` asks first what it was given


def gradient_of_shrunk(grads: Sequence[Tensor], layers: Sequence[Adapted], saved: Sequence[Tensor]) -> Tensor:
    """Of x A^T, for the As one below the other.

    grads: of each layer's y, [tokens, out], in the dtype of products. saved: what `products` said."""
    shrunk, _, *scaled = saved
    grad_shrunk = torch.empty_like(shrunk)
    for grad, b, part in zip(grads, scaled, _parts(grad_shrunk, layers, 1)):
        torch.mm(grad, b, out=part)
    return grad_shrunk


def gradient_of_x(
    grads: Sequence[Tensor], grad_shrunk: Tensor, layers: Sequence[Adapted], saved: Sequence[Tensor]
) -> Tensor:
    """Of x, from all the layers' products of it, summed in place."""
    grad_x = torch.mm(grads[0], _weight(layers[0].base, grads[0].dtype))
    for grad, layer in zip(grads[1:], layers[1:]):
        grad_x.addmm_(grad, _weight(layer.base, grad.dtype))
    return grad_x.addmm_(grad_shrunk, saved[1])


def gradients_of_adapters(
    grads: Sequence[Tensor],
    grad_shrunk: Tensor,
    x: Tensor,
    layers: Sequence[Adapted],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of each layer's A and B in turn; None where `needs` says no."""
    of_a: Sequence[Tensor | None] = [None] * len(layers)
    if any(needs[::2]):
        of_a = _parts(mm_in(grad_shrunk.t(), x, layers[0].a.dtype), layers, 0)
    found: list[Tensor | None] = []
    for i, (grad, layer, grad_a, part) in enumerate(zip(grads, layers, of_a, _parts(saved[0], layers, 1))):
        grad_b = mm_in(grad.t(), part, layer.b.dtype) if needs[2 * i + 1] else None
        if grad_b is not None and layer.scaling != 1:
            grad_b.mul_(layer.scaling)
        found += (grad_a if needs[2 * i] else None, grad_b)
    return found


class _LoraLinears(torch.autograd.Function):
    """See `lora_products`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Adapted], read: bool, *adapters: Tensor) -> tuple[Tensor, ...]:
        flat = flattened(x)
        results, saved = products(flat, layers, read=read)
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


def mm_in(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in a dtype that may be wider than theirs: its sums are not rounded to theirs first."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """[out, in], dequantized."""
    weight = base.weight
    state = weight.quant_state
    with torch._C.DisableTorchFunctionSubclass():  # or each look at bitsandbytes' kind of tensor takes the host 2 us
        if _on_nvidia(weight):
            return nf4_dequantize(weight.data, absmax_of(state), tuple(state.shape), dtype)
        return bnb.functional.dequantize_4bit(weight.view(-1, 1), state).to(dtype)
