"""silu(gate) * up of a gated MLP (SwiGLU, https://arxiv.org/abs/2002.05202) and its gradients, in one pass each."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.backend import triton_or_torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None


def swiglu(gate: Tensor, up: Tensor, *, backend: Literal["triton", "torch"] | None = None) -> Tensor:
    """silu(gate) * up, contiguous, in the shape and dtype of gate; differentiable.

    Torch passes over memory twice forward (silu, product) and six times backward. silu is rounded to the dtype before
    the product, as torch's operations and vLLM's kernels round it: with one rounding less the trainer would be more
    exact, but further from the policy that its sampler computes.

    gate, up: [..., columns] of one shape and floating dtype; they may be views, such as the halves of one matrix.
    backend: None picks Triton on CUDA and torch elsewhere. Raises ValueError where gate and up differ."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {list(gate.shape)}, up {up.dtype} {list(up.shape)}: they must be alike")
    if triton_or_torch(backend, gate, triton is not None) == "torch":
        return swiglu_reference(gate, up)
    columns = gate.shape[-1]
    return _SwiGLU.apply(gate.reshape(-1, columns), up.reshape(-1, columns)).view(gate.shape)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.silu(gate) * up


def swiglu_backward_(
    gate: Tensor, up: Tensor, grad: Tensor, *, backend: Literal["triton", "torch"] | None = None
) -> None:
    """The backward pass of `swiglu` in place: gate and up become their gradients, and grad becomes swiglu's result.

    This serves a backward pass that kept only gate and up: the gradients of the matrix product after swiglu need its
    result again, and here it takes no memory beyond the three tensors. The change counts as an in-place operation, so
    autograd refuses to use a saved gate or up afterwards.

    gate, up: as for `swiglu`. grad: gradient of swiglu's result, contiguous, of their shape and dtype.
    backend: as for `swiglu`. Raises ValueError where the three do not fit."""
    if gate.shape != up.shape or gate.shape != grad.shape or not grad.is_contiguous():
        raise ValueError(
            f"gate is {list(gate.shape)}, up {list(up.shape)}, grad {list(grad.shape)} with strides {grad.stride()}: "
            "they must be of one shape, and grad contiguous"
        )
    if triton_or_torch(backend, gate, triton is not None) == "torch":
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        with torch.enable_grad():
            out = swiglu_reference(*leaves)
        grad_gate, grad_up = torch.autograd.grad(out, leaves, grad)
        gate.copy_(grad_gate), up.copy_(grad_up), grad.copy_(out.detach())
        return
    columns = gate.shape[-1]
    gates, ups, grads = (x.view(-1, columns) for x in (gate, up, grad))  # views: a copy would not be in place
    if gates.stride(1) != 1 or ups.stride(1) != 1:
        raise ValueError(f"gate and up have strides {gate.stride()} and {up.stride()}: their last stride must be 1")
    _backward(grads, gates, ups, gates, ups, grads)
    torch.autograd.graph.increment_version((gate, up, grad))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = _rows(gate), _rows(up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if out.numel():
            _forward_kernel[_grid(out)](
                gate, up, out, gate.stride(0), up.stride(0), out.shape[1], BLOCK=BLOCK, num_warps=4
            )
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad = _rows(grad)
        grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        _backward(grad, gate, up, grad_gate, grad_up, None)
        return grad_gate, grad_up


BLOCK = 1024
"""columns per program"""


def _rows(x: Tensor) -> Tensor:
    """x [rows, columns] with contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[int, int]:
    return len(x), triton.cdiv(x.shape[1], BLOCK)


def _backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, out: Tensor | None) -> None:
    """Launch the backward kernel; all tensors are [rows, columns] with contiguous rows.

    out: where swiglu's result is written, which may be grad itself; None writes none."""
    if grad.numel():
        _backward_kernel[_grid(grad)](
            grad, gate, up, grad_gate, grad_up, out, grad.stride(0), gate.stride(0), up.stride(0), grad_gate.stride(0),
            grad_up.stride(0), grad.shape[1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def gate_times_up(gate, up):
        """silu(gate) * up in their dtype; silu is rounded to it before the product."""
        gate32 = gate.to(tl.float32)
        silu = (gate32 * tl.sigmoid(gate32)).to(gate.dtype).to(tl.float32)
        return (silu * up.to(tl.float32)).to(gate.dtype)

    @triton.jit
    def _forward_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0)
        tl.store(out_ptr + row * columns + column, gate_times_up(gate, up), mask=inside)

    @triton.jit
    def _backward_kernel(
        grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, out_ptr, grad_stride, gate_stride, up_stride,
        grad_gate_stride, grad_up_stride, columns, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """With s = sigmoid(gate): d up = grad gate s, d gate = grad up (s + gate s (1 - s)).

        out_ptr: where silu(gate) * up is written, or None; it may be grad_ptr, as the gradients may replace gate and
            up:
        a program reads each value before it writes to its place."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        rounded = silu.to(grad_up_ptr.dtype.element_ty).to(tl.float32)
        grad_gate = grad * up * (s + silu * (1 - s))
        grad_up = (grad * rounded).to(grad_up_ptr.dtype.element_ty)
        tl.store(grad_up_ptr + row * grad_up_stride + column, grad_up, mask=inside)
        grad_gate = grad_gate.to(grad_gate_ptr.dtype.element_ty)
        tl.store(grad_gate_ptr + row * grad_gate_stride + column, grad_gate, mask=inside)
        if out_ptr is not None:
            out = (rounded * up).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * grad_stride + column, out, mask=inside)
