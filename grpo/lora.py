"""The trainer's linear layers, NF4 weight and LoRA adapter in one step, in place of PEFT's forward pass."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn

from grpo_kernels.nf4_linear import BLOCK, Lora, absmax_of, choose_backend, nf4_dequantise, nf4_linear, triton

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
    """Where `grpo_kernels.nf4_linear` has Triton kernels."""
    return x.is_cuda and triton is not None and not torch.version.hip


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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name: Any = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        base: Any = self.get_base_layer()
        usual = (
            isinstance(base, bnb.nn.Linear4bit)  # not so in a copy whose weights were dequantised
            and name in self.lora_A
            and not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
            and getattr(self.lora_dropout[name], "p", 0.0) == 0.0
            and self.lora_B[name].bias is None
        )
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        decoding = torch.is_inference_mode_enabled()
        if decoding and choose_backend(flat, len(flat), x.shape[-1]) != "fused":
            usual = False
        if not usual:
            return super().forward(x, *args, **kwargs)
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        operands = (flat, a, b, self.scaling[name], base)
        y = _read_once(*operands) if decoding else _LoraLinear.apply(*operands, self.result_is_read)
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def _read_once(x: Tensor, a: Tensor, b: Tensor, scaling: float, base: Any) -> Tensor:
    """For few rows, without gradient: the 4-bit weight is not dequantised to memory first."""
    low, scaled, bias = _operands(a, b, scaling, base, x.dtype)
    state = base.weight.quant_state
    shape = (state.shape[0], state.shape[1])
    return nf4_linear(x, base.weight.data, absmax_of(state), shape, bias, lora=Lora(low, scaled, shape[:1]))


def _operands(a: Tensor, b: Tensor, scaling: float, base: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """A, B with the scaling in it, and the bias, in the products' dtype."""
    return a.to(dtype), (b * scaling).to(dtype), None if base.bias is None else base.bias.to(dtype)


class _LoraLinear(torch.autograd.Function):
    """x: [tokens, in], a: [rank, in], b: [out, rank]; products in x's dtype, gradients of a and b in theirs.
    read: whether the result's values matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, base: Any, read: bool) -> Tensor:
        low, scaled, bias = _operands(a, b, scaling, base, x.dtype)
        shrunk = x @ low.T
        if read:
            y = nn.functional.linear(x, _weight(base, x.dtype), bias).addmm_(shrunk, scaled.T)
        else:
            y = x.new_empty(len(x), len(b))
        ctx.save_for_backward(x, shrunk, low, scaled)
        ctx.scaling, ctx.base, ctx.dtypes = scaling, base, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, shrunk, low, scaled = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        grad_shrunk = grad @ scaled
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _weight(ctx.base, grad.dtype)).addmm_(grad_shrunk, low)
        if ctx.needs_input_grad[1]:
            grad_a = _product(grad_shrunk.T, x, ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            grad_b = _product(grad.T, shrunk, ctx.dtypes[1]).mul_(ctx.scaling)
        return grad_x, grad_a, grad_b, None, None, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, summed over the tokens, in the parameters' dtype rather than rounded to the activations' first."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """[out, in], dequantised."""
    state = base.weight.quant_state
    if _on_nvidia(base.weight):
        return nf4_dequantise(base.weight.data, absmax_of(state), tuple(state.shape), dtype)
    return bnb.functional.dequantize_4bit(base.weight.view(-1, 1), state).to(dtype)
