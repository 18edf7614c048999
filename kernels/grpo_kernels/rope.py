"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864) of queries and keys: one kernel launch for
both, and one for their gradients."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grpo_kernels.backend import triton_or_torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""dtypes that the kernel takes; it computes in float32"""
PAIRS = 2048
"""pairs of elements per program"""


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: Literal["triton", "torch"] | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x_i, x_{i + rotary / 2}) of each head of q and k by the angles of their token.

    Transformers' `apply_rotary_pos_emb` takes ten passes over memory, and twenty in the backward pass. It also rounds
    each product; here values and gradients are rounded once, after the sum, as in vLLM 0.26, so that the sampler and
    the trainer compute the same policy.

    q, k: [batch, time, heads, dim]; the numbers of heads may differ. They may have any strides (views of projections,
        and slices of one merged qkv projection), but are copied where the last stride is not 1.
    cos, sin: [batch or 1, time, rotary], two equal halves as transformers makes them (the kernel reads the first
        half), in q's dtype. Elements from rotary on pass unchanged (partial rotary embedding). They get no gradient.
    backend: None picks Triton on CUDA (not on ROCm, and only for 16 and 32 bits) and torch elsewhere.
    Returns both in their shapes, contiguous; differentiable once. Raises ValueError, naming the argument that does not
    fit."""
    _check(q, k, cos, sin)
    supported = triton is not None and not torch.version.hip and q.dtype in DTYPES
    backend = triton_or_torch(backend, q, supported, "needs Triton on CUDA, and 16 or 32 bits")
    if backend == "torch":
        return rope_reference(q, k, cos, sin)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rope.apply(q, k, cos, sin)
    q, k = _rotate((q, k), cos, sin, backward=False)
    return q, k


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, in float32 or, for float64 inputs, in float64."""
    rotary = cos.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.unsqueeze(2).to(dtype), sin.unsqueeze(2).to(dtype)

    def rotate(x: Tensor) -> Tensor:
        turning, rest = x[..., :rotary].to(dtype), x[..., rotary:]
        first, second = turning.chunk(2, -1)
        turned = (turning * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
        return (torch.cat((turned, rest), -1) if rest.shape[-1] else turned).contiguous()

    return rotate(q), rotate(k)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError where the kernel would read beyond a tensor or misread it."""
    if q.dim() != 4 or k.dim() != 4 or (k.shape[:2], k.shape[3]) != (q.shape[:2], q.shape[3]):
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}: both must be [batch, time, heads, dim], and differ in heads only"
        )
    batch, time, _, dim = q.shape
    rotary = cos.shape[-1]
    shapes = ((1, time, rotary), (batch, time, rotary))
    if cos.shape not in shapes or sin.shape != cos.shape or rotary % 2 or not 2 <= rotary <= dim:
        raise ValueError(
            f"cos is {list(cos.shape)}, sin {list(sin.shape)}: both must be [{batch} or 1, {time}, rotary], with "
            f"an even rotary from 2 to q's dim, {dim}"
        )
    if any(x.dtype != q.dtype for x in (k, cos, sin)):
        raise ValueError(f"k is {k.dtype}, cos {cos.dtype}, sin {sin.dtype}: they must be {q.dtype}, as q is (.to(q))")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # Not `save_for_backward`: all layers share these tensors, and hooks on saved tensors (offloading, say) would
        # copy them once per layer.
        ctx.tables = cos, sin
        q, k = _rotate((q, k), cos, sin, backward=False)
        return q, k

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = [grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad)]
        rotated = iter(_rotate([grad for grad in needed if grad is not None], *ctx.tables, backward=True))
        return *(None if grad is None else next(rotated) for grad in needed), None, None


def _rotate(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, *, backward: bool) -> list[Tensor]:
    """Rotate q and k, or one of them, or their gradients (`backward`)."""
    xs = [x if x.stride(3) == 1 else x.contiguous() for x in xs]
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    if not xs or not out[0].numel():
        return out
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    q, k = xs[0], xs[-1]  # one tensor alone is q to the kernel, which then has no program for k
    batch, time, heads, dim = q.shape
    half = cos.shape[2] // 2
    half_tile = _power_of_2(half)
    rows = max(PAIRS // half_tile, 1)
    programs = [-(-batch * time * x.shape[2] // rows) for x in xs]
    table_batch, table_time, _ = cos.stride()
    _rope_kernel[(sum(programs),)](
        q, k, cos, sin, out[0], out[-1], *q.stride()[:3], *k.stride()[:3],
        table_batch if len(cos) > 1 else 0, table_time, batch * time, time, programs[0],
        Q_HEADS=heads, K_HEADS=k.shape[2], DIM=dim, HALF=half, HALF_TILE=half_tile,
        REST_TILE=_power_of_2(dim - 2 * half), ROWS=rows, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return out


def _power_of_2(x: int) -> int:
    """Smallest power of two that is not below x; 0 for 0."""
    return 1 << (x - 1).bit_length() if x else 0


if triton is not None:

    @triton.jit(do_not_specialize=["tokens", "time", "q_programs"])
    def _rope_kernel(
        q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_batch_stride, q_time_stride, q_head_stride,
        k_batch_stride, k_time_stride, k_head_stride, table_batch_stride, table_time_stride, tokens, time, q_programs,
        Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HALF_TILE: tl.constexpr,
        REST_TILE: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        """The first programs rotate q, the others k: each ROWS rows, which are the heads of one token after another."""
        program = tl.program_id(0)
        if program < q_programs:
            _rotate_rows(
                q_ptr, q_out_ptr, cos_ptr, sin_ptr, program, q_batch_stride, q_time_stride, q_head_stride,
                table_batch_stride, table_time_stride, tokens, time,
                Q_HEADS, DIM, HALF, HALF_TILE, REST_TILE, ROWS, BACKWARD,
            )  # fmt: skip
        else:
            _rotate_rows(
                k_ptr, k_out_ptr, cos_ptr, sin_ptr, program - q_programs, k_batch_stride, k_time_stride, k_head_stride,
                table_batch_stride, table_time_stride, tokens, time,
                K_HEADS, DIM, HALF, HALF_TILE, REST_TILE, ROWS, BACKWARD,
            )  # fmt: skip

    @triton.jit
    def _rotate_rows(
        x_ptr, out_ptr, cos_ptr, sin_ptr, block, batch_stride, time_stride, head_stride,
        table_batch_stride, table_time_stride, tokens, time,
        HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HALF_TILE: tl.constexpr,
        REST_TILE: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        """first' = first cos - second sin, second' = second cos + first sin.

        The gradient's map is the transpose: as the two halves of cos and of sin are equal, the same with -sin."""
        row = block * ROWS + tl.arange(0, ROWS)
        token = row // HEADS
        inside = (token < tokens)[:, None]
        batch, step = (token // time).to(tl.int64), (token % time).to(tl.int64)
        x_row = (x_ptr + batch * batch_stride + step * time_stride + (row % HEADS).to(tl.int64) * head_stride)[:, None]
        out_row = (out_ptr + row.to(tl.int64) * DIM)[:, None]
        table_row = (batch * table_batch_stride + step * table_time_stride)[:, None]

        column = tl.arange(0, HALF_TILE)[None, :]
        turning = inside & (column < HALF)
        first = tl.load(x_row + column, mask=turning, other=0.0)
        second = tl.load(x_row + HALF + column, mask=turning, other=0.0)
        cos = tl.load(cos_ptr + table_row + column, mask=turning, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + table_row + column, mask=turning, other=0.0).to(tl.float32)
        dtype: tl.constexpr = first.dtype
        first, second = first.to(tl.float32), second.to(tl.float32)
        if BACKWARD:
            sin = -sin
        tl.store(out_row + column, (first * cos - second * sin).to(dtype), mask=turning)
        tl.store(out_row + HALF + column, (second * cos + first * sin).to(dtype), mask=turning)

        if REST_TILE > 0:
            column = 2 * HALF + tl.arange(0, REST_TILE)[None, :]
            resting = inside & (column < DIM)
            tl.store(out_row + column, tl.load(x_row + column, mask=resting), mask=resting)
