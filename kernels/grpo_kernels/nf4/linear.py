"""y = x W^T + bias on NF4 weights in bitsandbytes' layout, with a LoRA adapter's product and an MLP's activation.

The weight [N, K] is as in `nf4_dequantize`. README.md in this folder says which kernel serves what, with drawings.

    rows of x   computed by
    1 to 16     `nf4_few_rows`, fused: for x in 16 bits
    17 to 256   `nf4_scaled`, fused: for bfloat16 x and double-quantized scales
    others      the weight is dequantized into a buffer, in parts if it is large, for the vendor's matrix product
    no Triton   the whole weight is dequantized in torch: the reference

The fused kernels, for Hopper and for K a multiple of 256, read the 4-bit codes once and decode them in registers, about
three integer instructions per weight. They compute y^T = W x^T, so that W's rows fill the long side of the tensor
cores' tiles, however few rows x has. Where several programs share a sum over k, the last one to finish adds their fp32
parts in order, so the result is deterministic. An adapter's product is added to y after y is rounded to x's dtype: the
trainer's separate products round there too, and the two policies differ by less.
"""

import functools
import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.nf4.dequantize import BLOCK, NestedAbsmax, nf4_dequantize, nf4_dequantize_reference
from grpo_kernels.nf4.few_rows import nf4_few_rows
from grpo_kernels.nf4.prologue import COUNTERS, Lora, lora_fits
from grpo_kernels.nf4.scaled import nf4_scaled
from grpo_kernels.nf4.tiles import FEW_ROWS_TILE, Tiles, choose_tiles
from grpo_kernels.swiglu import swiglu

try:
    import triton
except ImportError:  # no Triton on macOS
    triton = None

FUSED_ROWS = 256
"""number of rows of x up to which a fused kernel is faster than dequantizing (on an H100, docs/performance.md)"""
CHUNK_BYTES = 256 << 20
"""largest size of the buffer into which a weight is dequantized"""


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    gated: Literal["x", "y"] | None = None,
    prefetch_next: Tensor | None = None,
    backend: Literal["fused", "dequantize", "torch"] | None = None,
) -> Tensor:
    """x W^T + bias for a frozen NF4 weight, plus an adapter's product. Without lora differentiable in x and bias.

    Args:
        x: [..., K] bfloat16, float16 or float32, any strides.
        packed: [N * K / 2, 1] (or any shape of as many bytes) uint8, contiguous, in bitsandbytes' layout.
        absmax: [N * K / 64] floating point, contiguous, or a `NestedAbsmax`, which the kernels decode.
        shape: (N, K) of the weight. K must be a multiple of 64.
        bias: [N], or None.
        lora: adapter (https://arxiv.org/abs/2106.09685) whose product is added; forward pass only. The fused kernels
            add it without a launch of its own if its rank is at most 64, and it has at most three slices, which end at
            multiples of the kernel's tile of W's rows (16, 64 or 128). Else two small products per slice follow.
        gated: "x": x is [..., 2 K], gate and up side by side, and silu(gate) * up is multiplied, rounded as by
            `swiglu`. "y": the N columns of the result are gate and up, and silu(gate) * up is returned. In a forward
            pass without gradient the fused kernels compute it themselves: that of x above 16 rows, that of y up to 16.
        prefetch_next: packed weight of the product that comes next, contiguous uint8. It is a hint: the fused kernel
            for up to 16 rows prefetches its first 12 MiB into the L2 cache at times when the memory would be idle.
        backend: "fused" (a fused kernel of Triton's), "dequantize" (by a Triton kernel, then the vendor's product) or
            "torch" (everything in torch). None picks by device, dtypes and number of rows, as in the table above.

    Returns:
        [..., N], or [..., N / 2] if "y" is gated, in x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit, no fused kernel serves the arguments but backend is "fused", or lora
            is given where a gradient is needed; the message names the argument.
    """
    _check(x, packed, absmax, shape, bias, gated, prefetch_next)
    if lora is not None:
        _check_lora(x, shape, bias, lora)
    rows = math.prod(x.shape[:-1])
    serves = _fused_kernel_serves(x, rows, packed, absmax, shape[1])
    if backend is None:
        backend = choose_backend(x, rows, shape[1])
        if backend == "fused" and not serves:
            backend = "dequantize"
    elif backend not in ("fused", "dequantize", "torch") or (backend != "torch" and triton is None):
        raise ValueError(f"backend {backend!r}: choose 'fused' or 'dequantize' (need Triton), 'torch' or None")
    elif backend == "fused" and not serves:
        raise ValueError(
            f"backend 'fused' needs a 16-bit x, K a multiple of 256 and, above {FEW_ROWS_TILE} rows, bfloat16 and a "
            f"NestedAbsmax; x is {x.dtype} of {rows} rows, K = {shape[1]}: take 'dequantize' or None"
        )
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias))
    if gated == "x" and (backend != "fused" or differentiated):
        x, gated = swiglu(*x.chunk(2, -1)), None
    flat = x.reshape(rows, x.shape[-1])
    if backend == "fused" and not differentiated:
        y = _fused(flat, packed, absmax, shape, bias, lora=lora, gated=gated, prefetch_next=prefetch_next)
    else:
        y = _NF4Linear.apply(flat, packed, absmax, shape, bias, backend)
        if lora is not None:
            y = _add_lora(y, flat, lora)
        if gated:
            y = swiglu(*y.chunk(2, -1))
    return y.view(*x.shape[:-1], y.shape[-1])


def nf4_linear_reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    lora: Lora | None = None,
) -> Tensor:
    """The same in plain torch, with the weight in x's dtype (float64 included)."""
    y = F.linear(x, nf4_dequantize_reference(packed, absmax, shape, x.dtype), bias)
    if lora is None:
        return y
    return y + torch.cat([F.linear(F.linear(x, a), b) for _, a, b in lora.slices()], -1)


def choose_backend(x: Tensor, rows: int, k: int) -> Literal["fused", "dequantize", "torch"]:
    """The backend of `nf4_linear` for x (of which the dtype and device count) with `rows` rows of k columns.

    A weight whose scales no fused kernel takes for that many rows is dequantized all the same."""
    if triton is None or not x.is_cuda or torch.version.hip:
        return "torch"
    return "fused" if rows <= FUSED_ROWS and _is_fused_shape(x, rows, k) and is_hopper(x.device) else "dequantize"


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU, the only one on which the fused kernels were run and their tiles measured.

    These take up to 105 KiB of shared memory. `nf4_scaled` needs its TMA and wgmma, and both kernels use its
    programmatic dependent launch (starting before the kernel ahead has ended), which saves 1 to 2 us per product."""
    return torch.cuda.get_device_capability(device)[0] == 9


def _is_fused_shape(x: Tensor, rows: int, k: int) -> bool:
    """Whether a fused kernel takes x's dtype for so many rows, and k columns."""
    dtypes = (torch.bfloat16, torch.float16) if rows <= FEW_ROWS_TILE else (torch.bfloat16,)
    return x.dtype in dtypes and k % 256 == 0


def _fused_kernel_serves(x: Tensor, rows: int, packed: Tensor, absmax: Tensor | NestedAbsmax, k: int) -> bool:
    """Whether a fused kernel takes these arguments.

    `nf4_scaled` needs double-quantized scales, as their second level bounds them, and loads 16 bytes of codes at once.
    In float16 its three roundings would lose a bit against dequantizing."""
    if rows <= FEW_ROWS_TILE:
        return _is_fused_shape(x, rows, k)
    scales_fit = isinstance(absmax, NestedAbsmax) and packed.data_ptr() % 16 == 0
    return _is_fused_shape(x, rows, k) and scales_fit and (not x.is_cuda or is_hopper(x.device))


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, shape, bias, backend):
        ctx.set_materialize_grads(False)
        ctx.weight = (packed, absmax, shape)  # frozen
        ctx.backend, ctx.dtype = backend, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if backend == "fused":
            return _fused(x, packed, absmax, shape, bias)
        if backend == "torch":
            return nf4_linear_reference(x, packed, absmax, shape, bias)
        return _by_chunks(x, packed, absmax, shape, bias)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None, None, None
        packed, absmax, shape = ctx.weight
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.backend == "torch":
                grad_x = grad @ nf4_dequantize_reference(packed, absmax, shape, ctx.dtype)
            else:
                grad_x = _gradient_by_chunks(grad, packed, absmax, shape)
        grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_bias, None


def _check(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None,
    gated: Literal["x", "y"] | None,
    prefetch_next: Tensor | None,
) -> None:
    """Raise ValueError where a kernel would read beyond a tensor or misread it; torch and Triton find the rest."""
    n, k = shape
    if k % BLOCK or not k:
        raise ValueError(f"shape is (N, K) = {tuple(shape)}: K must be a multiple of {BLOCK}; dequantize this weight")
    if gated not in (None, "x", "y") or (gated == "y" and n % 2):
        raise ValueError(f"gated is {gated!r}, N = {n}: gated must be 'x', 'y' (with an even N) or None")
    columns = 2 * k if gated == "x" else k
    if x.shape[-1:] != (columns,) or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, must be bfloat16, float16 or float32 [..., {columns}] for a weight "
            f"{tuple(shape)} and gated={gated!r}"
        )
    if packed.dtype != torch.uint8 or packed.numel() != n * k // 2 or not packed.is_contiguous():
        raise ValueError(
            f"packed is {packed.dtype} {list(packed.shape)}, must be contiguous uint8 of {n * k // 2} elements; "
            "view another bnb_4bit_quant_storage as torch.uint8"
        )
    _check_scales(absmax, n * k // BLOCK)
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias is {list(bias.shape)}, must be [N] = [{n}]")
    if prefetch_next is not None and (prefetch_next.dtype != torch.uint8 or not prefetch_next.is_contiguous()):
        raise ValueError(f"prefetch_next is {prefetch_next.dtype}, must be contiguous uint8")


def _check_scales(absmax: Tensor | NestedAbsmax, blocks: int) -> None:
    outer = -(-blocks // 256)
    if isinstance(absmax, NestedAbsmax):
        scales, fits = absmax.quantized, absmax.quantized.dtype == torch.uint8
        fits &= absmax.absmax.shape == (outer,) and absmax.offset.shape in ((), (outer,))
    else:
        scales, fits = absmax, absmax.is_floating_point()
    if not fits or scales.numel() != blocks or not scales.is_contiguous():
        raise ValueError(
            f"absmax must be {blocks} contiguous floating-point scales, or a NestedAbsmax of {blocks} contiguous uint8 "
            f"codes, {outer} second-level scales and one offset or {outer} (see absmax_of); it has {scales.dtype} "
            f"{list(scales.shape)}"
        )


def _check_lora(x: Tensor, shape: tuple[int, int], bias: Tensor | None, lora: Lora) -> None:
    """Raise ValueError as `_check` does, and where a gradient is needed."""
    n, k = shape
    ends = lora.ends
    if not ends or ends[-1] != n or any(i >= j for i, j in itertools.pairwise((0, *ends))):
        raise ValueError(f"lora.ends is {ends}, must be the rows of W at which slices end, rising, the last N = {n}")
    rank = lora.b.shape[-1]
    for name, tensor, size in (("a", lora.a, (len(ends) * rank, k)), ("b", lora.b, (n, rank))):
        if tensor.shape != size or not rank or tensor.dtype != x.dtype or not tensor.is_contiguous():
            meaning = "[slices * rank, K]" if name == "a" else "[N, rank]"
            raise ValueError(
                f"lora.{name} is {tensor.dtype} {list(tensor.shape)}, must be contiguous {x.dtype} {meaning} = "
                f"{list(size)}"
            )
    zeros = lora.counters
    if zeros is not None and (zeros.shape != (COUNTERS,) or zeros.dtype != torch.int32):
        raise ValueError(f"lora.counters is {zeros.dtype} {list(zeros.shape)}, must be int32 zeros [{COUNTERS}]")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, lora.a, lora.b)):
        raise ValueError(
            "nf4_linear has no gradient with lora: call it under torch.no_grad(), or add the adapter after it"
        )


def _add_lora(y: Tensor, x: Tensor, lora: Lora) -> Tensor:
    """y with the adapter's product added in place, by two products per slice."""
    for rows, a, b in lora.slices():
        y[:, rows].addmm_(x @ a.T, b.T)
    return y


def _by_chunks(
    x: Tensor, packed: Tensor, absmax: Tensor | NestedAbsmax, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """x W^T + bias in chunks of W's rows, each of which is dequantized into the same buffer."""
    n, k = shape
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    step = min(n, max(1, CHUNK_BYTES // (k * x.element_size() * 256)) * 256)  # 256: products of odd sizes are slow
    buffer = torch.empty(step, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        chunk = nf4_dequantize(packed, absmax, shape, x.dtype, rows=rows, out=buffer[: rows.stop - start])
        if bias is None:
            torch.mm(x, chunk.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows].to(x.dtype), x, chunk.T, out=y[:, rows])
    return y


def _gradient_by_chunks(grad: Tensor, packed: Tensor, absmax: Tensor | NestedAbsmax, shape: tuple[int, int]) -> Tensor:
    """grad @ W in chunks of W's columns, so that no sum is split."""
    n, k = shape
    grad_x = torch.empty(len(grad), k, dtype=grad.dtype, device=grad.device)
    step = min(k, max(1, CHUNK_BYTES // (n * grad.element_size() * 256)) * 256)
    buffer = torch.empty(n * step, dtype=grad.dtype, device=grad.device)
    for start in range(0, k, step):
        columns = slice(start, min(start + step, k))
        out = buffer[: n * (columns.stop - start)].view(n, -1)
        chunk = nf4_dequantize(packed, absmax, shape, grad.dtype, columns=columns, out=out)
        torch.mm(grad, chunk, out=grad_x[:, columns])
    return grad_x


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _fused(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None,
    tiles: Tiles | None = None,
    lora: Lora | None = None,
    gated: Literal["x", "y"] | None = None,
    prefetch_next: Tensor | None = None,
) -> Tensor:
    """`nf4_linear` by a fused kernel, and in torch whatever of lora and gated it cannot do.

    x: [rows, K] in 16 bits, or [rows, 2 K] if it is gated. tiles: None chooses them."""
    n, k = shape
    if not len(x):
        return x.new_empty(0, n // 2 if gated == "y" else n)
    multiprocessors = _multiprocessors(x.device)
    if tiles is None:
        tiles = choose_tiles(len(x), n, k, multiprocessors)
        tiles = tiles._replace(pdl=x.is_cuda and is_hopper(x.device))
    few = tiles.n == FEW_ROWS_TILE
    lora_is_fused = lora is None or lora_fits(lora, tiles.n)
    if gated == "x" and (few or not lora_is_fused):
        x, gated = swiglu(*x.chunk(2, -1)), None
    halves = lora is None or all(end in (n // 2, n) for end in lora.ends)  # no slice has columns of both gate and up
    if gated == "y" and not (few and lora_is_fused and halves):
        return swiglu(*_fused(x, packed, absmax, shape, bias, tiles, lora, prefetch_next=prefetch_next).chunk(2, -1))
    if lora is not None and not lora_is_fused:
        return _add_lora(_fused(x, packed, absmax, shape, bias, tiles, prefetch_next=prefetch_next), x, lora)
    if few:
        return nf4_few_rows(x, packed, absmax, shape, bias, tiles, lora, gated == "y", multiprocessors, prefetch_next)
    assert isinstance(absmax, NestedAbsmax)  # `_fused_kernel_serves`
    return nf4_scaled(x, packed, absmax, shape, bias, tiles, lora, gated == "x", multiprocessors)
