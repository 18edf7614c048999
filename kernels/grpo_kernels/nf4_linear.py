"""y = x W^T + bias on NF4 weights, in bitsandbytes' layout, without writing the dequantised weight.

The weight is [N, K] with K a multiple of 64. packed holds two 4-bit codes a byte, the even k in the high bits; every 64
weights share one absmax: W[n, k] = NF4[code[n, k]] * absmax[n, k // 64] (QLoRA, https://arxiv.org/abs/2305.14314).

    rows        path
    1 to 16     fused, for few rows: each warp streams columns of 16 rows of W (`_few_rows_kernel`)
    17 to 256   fused: tiles of W through shared memory (`_fused_kernel`)
    more        the weight dequantised into a buffer, by parts if it is large, and the vendor's matrix product
    no Triton   the whole weight dequantised in torch: the reference

Fused: reads the 4-bit codes once, decodes them in registers (Hopper, 16-bit x, K a multiple of 256). It computes
y^T = W x^T, so that W's rows fill the tensor cores' long side however few rows x has:

- Decode: a byte permute (PTX prmt) looks four codes up at once in eight bytes of table; the 16 values' low and high
  bytes fill eight registers. About three integer instructions a weight, no table in memory.
- The table holds round(NF4[i] * TABLE_SCALE), and the result is divided by TABLE_SCALE: the factor at which the 16
  values round best in x's type. Their error (weighted by how often a value occurs) is then 0.08% in bfloat16, half of
  what dequantising to bfloat16 costs, and 0.008% in float16. The scales multiply fp32 partial sums of 64 terms, so they
  add no error.
- A thread decodes pairs of 16-bit words of four codes. To spare it shuffles, x is first permuted along k in the same
  way (`_prepare_kernel`), which pads its rows to the tile as well; for few rows it is read as it is.
- Split-K: programs leave fp32 partial tiles, the last one to finish adds them in order, so the sum is deterministic.
- A LoRA adapter costs no launch: x A^T is made beside the permuted x, in fp32 parts over k without atomics. The program
  that writes a tile of y adds the parts, rounds them to x's dtype, and adds their product with its rows of B to the
  tile, itself rounded to x's dtype: where a trainer's separate products round, so the two policies differ by less.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.swiglu import swiglu

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton on macOS
    triton = None

BLOCK = 64
"""weights that share one absmax"""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
TABLE_SCALE = {torch.bfloat16: 1.436767578125, torch.float16: 1.3661956787109375}


class NestedAbsmax(NamedTuple):
    """Double-quantised absmax: absmax[i] = code[quantised[i]] * absmax[i // 256] + offset, or + offset[i // 256] for
    matrices that were quantised apart and joined by rows."""

    quantised: Tensor  # [N * K / 64] uint8
    code: Tensor  # [256] float32
    absmax: Tensor  # [ceil(N * K / 64 / 256)] float32
    offset: Tensor  # [] or [ceil(N * K / 64 / 256)] float32


class Lora(NamedTuple):
    """An adapter: to y's first columns is added x A_0^T B_0^T, to the next slice of them x A_1^T B_1^T, ..."""

    a: Tensor  # [slices * rank, K] contiguous, x's dtype: the slices' A one below the other
    b: Tensor  # [N, rank] contiguous, x's dtype, the scaling (alpha / rank) multiplied in
    ends: tuple[int, ...]  # the row of W at which each slice ends, the last N: (N,), or (4096, 5120, 6144) for q, k, v

    def slices(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of W, A [rank, K] and B [rows, rank] of each slice."""
        for a, (start, end) in zip(self.a.chunk(len(self.ends)), itertools.pairwise((0, *self.ends))):
            yield slice(start, end), a, self.b[start:end]


def absmax_of(quant_state: Any) -> Tensor | NestedAbsmax:
    """The scales of a bitsandbytes QuantState (NF4, block 64), as `nf4_linear` takes them; shares its tensors.

    Raises ValueError for another format."""
    if quant_state.quant_type != "nf4" or quant_state.blocksize != BLOCK:
        raise ValueError(
            f"quant_state is {quant_state.quant_type} in blocks of {quant_state.blocksize}: only nf4 in blocks of "
            f"{BLOCK} is supported; quantise with bnb_4bit_quant_type='nf4' and the default block size"
        )
    if not quant_state.nested:
        return quant_state.absmax
    inner = quant_state.state2
    if inner.blocksize != 256:
        raise ValueError(f"quant_state.state2 has blocks of {inner.blocksize}, must be 256 (bitsandbytes' default)")
    offset = torch.as_tensor(quant_state.offset, dtype=torch.float32, device=quant_state.absmax.device)
    return NestedAbsmax(quant_state.absmax, inner.code, inner.absmax, offset)


def expand_absmax(absmax: Tensor | NestedAbsmax) -> Tensor:
    """absmax: [N * K / 64] float32. Kept so it takes 4 bytes for 64 weights, 12.5% of their codes, instead of 1."""
    if not isinstance(absmax, NestedAbsmax):
        return absmax.float()
    flat = absmax.quantised.reshape(-1)
    outer, offset = (t.expand(len(absmax.absmax)).repeat_interleave(256)[: len(flat)] for t in (absmax[2], absmax[3]))
    return absmax.code[flat.int()] * outer + offset


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    gated: Literal["x", "y"] | None = None,
    backend: Literal["fused", "dequantise", "torch"] | None = None,
) -> Tensor:
    """x W^T + bias for a frozen NF4 weight, and an adapter's product. Differentiable in x and bias without lora.

    Args:
        x: [..., K] bfloat16, float16 or float32, any strides. float32 is never computed by the fused kernel.
        packed: [N * K / 2, 1] (or any shape of as many bytes) uint8, contiguous, bitsandbytes' layout.
        absmax: [N * K / 64] floating point, contiguous, or a `NestedAbsmax`, decoded in the kernel.
        shape: (N, K), the weight's. K must be a multiple of 64.
        bias: [N], or None.
        lora: an adapter (https://arxiv.org/abs/2106.09685) whose product is added; forward only. The fused kernel does
            it in passing up to rank 64, three slices, and slices that end at multiples of its tile of W's rows (64);
            other adapters, and other paths, take two small products a slice in torch.
        gated: "x": x is [..., 2 K], gate and up side by side, and silu(gate) * up is multiplied (`swiglu`, and rounded
            as there). "y": so are the N columns that come out, and silu(gate) * up of them is returned. Where no
            gradient is asked for, the fused kernel makes it in passing: of x above 16 rows, of y up to 16.
        backend: None picks by device, dtype and rows: "fused" (Triton; 16-bit x, K a multiple of 256), "dequantise"
            (by a Triton kernel, then the vendor's product) or "torch" (everything in torch).

    Returns:
        [..., N], or [..., N / 2] if "y" is gated, dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a gradient is asked for with lora; the message says which.
    """
    _check(x, packed, absmax, shape, bias, gated)
    if lora is not None:
        _check_lora(x, shape, bias, lora)
    rows = math.prod(x.shape[:-1])
    if backend is None:
        backend = choose_backend(x, rows, shape[1])
    elif backend not in ("fused", "dequantise", "torch") or (backend != "torch" and triton is None):
        raise ValueError(f"backend {backend!r}: choose 'fused' or 'dequantise' (need Triton), 'torch' or None")
    elif backend == "fused" and (x.dtype == torch.float32 or shape[1] % 256):
        raise ValueError(f"backend 'fused' needs a 16-bit x and K a multiple of 256, not {x.dtype}, K = {shape[1]}")
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias))
    if gated == "x" and (backend != "fused" or differentiated):
        x, gated = swiglu(*x.chunk(2, -1)), None
    flat = x.reshape(rows, x.shape[-1])
    if backend == "fused" and not differentiated:
        y = _fused(flat, packed, absmax, shape, bias, lora=lora, gated=gated)
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
    """The same by plain torch, with the weight in x's dtype (float64 included)."""
    y = F.linear(x, nf4_dequantise_reference(packed, absmax, shape, x.dtype), bias)
    if lora is None:
        return y
    return y + torch.cat([F.linear(F.linear(x, a), b) for _, a, b in lora.slices()], -1)


def nf4_dequantise_reference(
    packed: Tensor, absmax: Tensor | NestedAbsmax, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """[N, K] in dtype, rounded once from the float32 product as bitsandbytes does (float64 is not rounded)."""
    codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), -1)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.tensor(NF4, dtype=exact, device=packed.device)[codes.reshape(-1, BLOCK).int()]
    return (values * expand_absmax(absmax).to(exact)[:, None]).to(dtype).view(shape)


def nf4_dequantise(
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    rows: slice = slice(None),
    columns: slice = slice(None),
    out: Tensor | None = None,
) -> Tensor:
    """W[rows, columns] in dtype, by a Triton kernel; bit for bit `nf4_dequantise_reference` for expanded scales.

    columns must begin and end at multiples of 64. out: a contiguous buffer of the result's shape and dtype.
    Raises ValueError for a weight whose rows do not begin at blocks."""
    if shape[1] % BLOCK:
        raise ValueError(f"a weight {list(shape)}: its columns must be a multiple of {BLOCK}, a block of scales")
    row_start, row_stop, _ = rows.indices(shape[0])
    start, stop, _ = columns.indices(shape[1])
    size = (row_stop - row_start, stop - start)
    if out is None:
        out = torch.empty(size, dtype=dtype, device=packed.device)
    blocks = size[0] * (size[1] // BLOCK)
    if blocks:
        _dequantise_kernel[(triton.cdiv(blocks, 32),)](
            packed.view(-1).view(torch.int16), *_scale_arguments(absmax), out,
            None if packed.is_cuda else _emulation_table(torch.float32, 1.0),
            blocks, size[1] // BLOCK, shape[1] // BLOCK, row_start, start // BLOCK,
            NESTED=isinstance(absmax, NestedAbsmax), BLOCKS=32,
        )  # fmt: skip
    return out


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
                grad_x = grad @ nf4_dequantise_reference(packed, absmax, shape, ctx.dtype)
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
) -> None:
    if gated not in (None, "x", "y"):
        raise ValueError(f"gated is {gated!r}, must be 'x', 'y' or None")
    n, k = shape
    if gated == "y" and n % 2:
        raise ValueError(f"shape is (N, K) = {tuple(shape)}: gate and up, as gated='y' has them, are an even N")
    if k % BLOCK or not k:
        raise ValueError(f"shape is (N, K) = {tuple(shape)}: K must be a multiple of {BLOCK}; dequantise this weight")
    columns = 2 * k if gated == "x" else k
    if x.dim() < 1 or x.shape[-1] != columns:
        what = f"a weight of shape {tuple(shape)}" + (", gate and up side by side" if gated == "x" else "")
        raise ValueError(f"x is {list(x.shape)}, must be [..., {columns}] for {what}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype}: cast it to bfloat16, float16 or float32")
    if packed.dtype != torch.uint8 or packed.numel() != n * k // 2 or not packed.is_contiguous():
        raise ValueError(
            f"packed is {packed.dtype} {list(packed.shape)}, must be contiguous uint8 of {n * k // 2} elements; "
            "view another bnb_4bit_quant_storage as torch.uint8"
        )
    scales = absmax.quantised if isinstance(absmax, NestedAbsmax) else absmax
    blocks = n * k // BLOCK
    if (
        scales.numel() != blocks
        or not scales.is_contiguous()
        or isinstance(absmax, NestedAbsmax) != (scales.dtype == torch.uint8)
    ):
        raise ValueError(
            f"absmax is {scales.dtype} {list(scales.shape)}, must be {blocks} contiguous floating point values, or a "
            "NestedAbsmax of as many uint8 codes (see absmax_of)"
        )
    if isinstance(absmax, NestedAbsmax):
        outer = -(-blocks // 256)
        if absmax.absmax.shape != (outer,) or absmax.offset.shape not in ((), (outer,)):
            raise ValueError(
                f"absmax has {list(absmax.absmax.shape)} second-level scales and {list(absmax.offset.shape)} offsets, "
                f"must have {outer} (one for 256 scales), and as many offsets or one"
            )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias is {list(bias.shape)}, must be [N] = [{n}]")
    for name, tensor in (("packed", packed), ("absmax", scales), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move one")


def _check_lora(x: Tensor, shape: tuple[int, int], bias: Tensor | None, lora: Lora) -> None:
    n, k = shape
    ends = lora.ends
    if not ends or ends[-1] != n or any(i >= j for i, j in itertools.pairwise((0, *ends))):
        raise ValueError(f"lora.ends is {ends}, must be the rows of W at which slices end, rising, the last N = {n}")
    rank = lora.b.shape[-1] if lora.b.dim() else 0
    for name, tensor, size in (("a", lora.a, [len(ends) * rank, k]), ("b", lora.b, [n, rank])):
        if list(tensor.shape) != size or not rank or not tensor.is_contiguous():
            meaning = "[slices * rank, K]" if name == "a" else "[N, rank]"
            raise ValueError(f"lora.{name} is {list(tensor.shape)}, must be contiguous {meaning} = {size}")
        if tensor.dtype != x.dtype:
            raise ValueError(f"lora.{name} is {tensor.dtype}, x {x.dtype}: cast one")
        if tensor.device != x.device:
            raise ValueError(f"lora.{name} is on {tensor.device}, x on {x.device}: move one")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, lora.a, lora.b)):
        raise ValueError(
            "nf4_linear has no gradient with lora: call it under torch.no_grad(), or add the adapter after it"
        )


def _add_lora(y: Tensor, x: Tensor, lora: Lora) -> Tensor:
    """y with the adapter's product added in place: two products a slice."""
    for rows, a, b in lora.slices():
        y[:, rows].addmm_(x @ a.T, b.T)
    return y


FUSED_ROWS = 256
"""rows of x up to which the fused kernel is faster than chunks (H100, docs/performance.md)"""
CHUNK_BYTES = 256 << 20
"""largest dequantised part of a weight at a time"""


def choose_backend(x: Tensor, rows: int, k: int) -> Literal["fused", "dequantise", "torch"]:
    """What `nf4_linear` does for x (its dtype and device count) of so many rows, of K columns."""
    if triton is None or not x.is_cuda or torch.version.hip:
        return "torch"
    fused = rows <= FUSED_ROWS and k % 256 == 0 and x.dtype != torch.float32 and is_hopper(x.device)
    return "fused" if fused else "dequantise"


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """The fused kernel is the default only where it was run and its tiles measured (they take up to 105 KiB of shared
    memory). Hopper also lets a kernel start before the one ahead of it has ended: 1 to 2 us less a product."""
    return torch.cuda.get_device_capability(device)[0] == 9


def _by_chunks(
    x: Tensor, packed: Tensor, absmax: Tensor | NestedAbsmax, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """Chunks of W's rows, each dequantised into the same buffer and multiplied."""
    n, k = shape
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    step = min(n, max(1, CHUNK_BYTES // (k * x.element_size() * 256)) * 256)  # 256: products of odd sizes are slow
    buffer = torch.empty(step, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        chunk = nf4_dequantise(packed, absmax, shape, x.dtype, rows=rows, out=buffer[: rows.stop - start])
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
        chunk = nf4_dequantise(packed, absmax, shape, grad.dtype, columns=columns, out=out)
        torch.mm(grad, chunk, out=grad_x[:, columns])
    return grad_x


class Tiles(NamedTuple):
    """How the fused kernel is launched, or with n = 16 the one for few rows, of rows, warps and registers only."""

    n: int  # weight rows a program
    rows: int  # rows of x a program
    splits: int  # programs that share the sum over k of one tile
    warps: int
    stages: int
    group: int = 4  # blocks of 64 along k an iteration: 4 or 2
    wide: bool = True  # load a group's words at once rather than block by block
    pdl: bool = False  # start before the kernel ahead has ended
    scaled: bool = False  # fp16 weights, scaled before the product: for bf16 x (of fp16 it loses a bit), NestedAbsmax
    registers: int | None = None  # at most so many a thread


FEW_ROWS_TILE = 16
"""weight rows a program of the kernel for few rows, and the rows of x up to which it is the faster one"""
FUSED_RANK = 64
"""the largest adapter that the fused kernel adds"""


def _scaling_pays(rows: int, n: int, k: int) -> bool:
    """Where `Tiles.scaled` was the faster on an H100: 5 to 16% at 64 rows, 6 to 26% at 256."""
    return (32 < rows <= 64 and n > k) or (rows > 128 and n * k > 2**24)


def choose_tiles(rows: int, n: int, k: int, multiprocessors: int, scaled: bool = False) -> Tiles:
    """Tiles measured on an H100: small enough that every multiprocessor has some, split over k where N is small.

    scaled: tiles that scale weights before the product; measured at 64 and 256 rows."""
    if rows <= FEW_ROWS_TILE and not scaled:  # more warps share a sum where there are few programs
        warps = 8 if n // FEW_ROWS_TILE <= 2 * multiprocessors else 4
        return Tiles(FEW_ROWS_TILE, 8 if rows <= 8 else 16, 1, min(warps, 2 ** int(math.log2(k // 256))), 1)
    if scaled and rows > 128:
        tiles, resident = Tiles(128, 256, 1, 8, 3, group=2, scaled=True), 1
    elif scaled and rows > 64:
        tiles, resident = Tiles(128, 128, 1, 8, 3, group=2, scaled=True, registers=128), 2
    elif scaled and rows > 32:
        tiles, resident = Tiles(64, 64, 1, 4, 3, group=2, scaled=True), 3
    elif scaled:
        tiles, resident = Tiles(64, 16 if rows <= 16 else 32, 1, 4, 2, scaled=True), 4
    elif rows <= 32:
        tiles, resident = Tiles(64, 32, 1, 4, 2), 3
    elif rows <= 64:
        tiles, resident = Tiles(64, 64, 1, 4, 2), 2
    else:
        tiles, resident = Tiles(64, 128, 1, 4, 3, group=2), 2
    programs = -(-n // tiles.n) * -(-rows // tiles.rows)
    splits = resident * multiprocessors / programs  # as many programs as are resident; a few more where rows are few
    splits = max(1, min(math.ceil(splits) if rows <= 32 else int(splits), k // 512, 16))
    groups = k // (BLOCK * tiles.group)
    return tiles._replace(splits=-(-groups // -(-groups // splits)))  # only those that have work


def _scale_arguments(
    absmax: Tensor | NestedAbsmax,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """The kernels' pointers to scales, and 1 if each second-level scale has an offset of its own."""
    return (*absmax, absmax.offset.dim()) if isinstance(absmax, NestedAbsmax) else (absmax, None, None, None, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


SHRINK_BLOCK = 128
"""columns of x that a step of the product with A takes"""


def _lora_fits(lora: Lora, n_tile: int) -> bool:
    """Whether the fused kernel can add it: a tile of W's rows lies in one slice, and the rank in registers."""
    return lora.b.shape[1] <= FUSED_RANK and len(lora.ends) <= 3 and not any(end % n_tile for end in lora.ends[:-1])


def _shrink_splits(tiles: int, rows: int, k: int, rank: int, multiprocessors: int) -> tuple[int, int]:
    """(blocks of columns a program, programs that share the sum over k) for x A^T. tiles: row blocks times slices.

    512 columns a program, so that it is about as short as the permutation beside it, but no more parts than the
    programs of the product, which each read all parts of their rows (a tile of so many), can spare: few percent of
    what they read of x."""
    blocks = k // SHRINK_BLOCK
    most = max(2, k // (max(32, rows // 2) * rank))
    splits = max(1, min(-(-blocks // 4), 16, most, 2 * multiprocessors // tiles))
    share = -(-blocks // splits)
    return share, -(-blocks // share)


def _lora_arguments(
    x: Tensor, lora: Lora | None, rows: int, row_tile: int, shape: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What x A^T takes of a kernel's arguments, and what adding its product with B takes; x is padded to rows."""
    if lora is None:
        return {}, {}
    n, k = shape
    rank, slices = lora.b.shape[1], len(lora.ends)
    rank_tile = max(16, triton.next_power_of_2(rank))
    height = 32 if row_tile > 16 and rank_tile <= 32 else 16
    row_blocks = triton.cdiv(rows, height)
    share, splits = _shrink_splits(row_blocks * slices, row_tile, k, rank_tile, _multiprocessors(x.device))
    shrunk = torch.empty(splits, row_blocks * height, slices * rank_tile, dtype=torch.float32, device=x.device)
    common = {
        "shrunk_ptr": shrunk, "shrunk_rows": shrunk.shape[1], "slices": slices, "RANK": rank, "RANK_TILE": rank_tile
    }  # fmt: skip
    shrink = common | {
        "a_ptr": lora.a, "shrink_programs": splits * row_blocks * slices, "share": share, "SHRINK_ROWS": height,
        "EMULATED": not x.is_cuda, "num_stages": 5 if height == rank_tile == 16 else 3,
    }  # fmt: skip
    first, second = (*lora.ends, n, n)[:2]
    return shrink, common | {"b_ptr": lora.b, "shrink_splits": splits, "first_end": first, "second_end": second}


def _few_rows(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None,
    tiles: Tiles,
    lora: Lora | None,
    gated: bool,
) -> Tensor:
    """`_fused` for up to 16 rows. gated: of y."""
    n, k = shape
    y = torch.empty(len(x), n // 2 if gated else n, dtype=x.dtype, device=x.device)
    options = {"launch_pdl": True} if tiles.pdl else {}
    registers = {"maxnreg": tiles.registers} if tiles.registers else {}
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    shrink, expand = _lora_arguments(x, lora, len(x), 16, shape)
    if lora is not None:
        _prepare_kernel[(shrink["shrink_programs"],)](
            x, None, None, None, x.stride(0), x.stride(1), None, len(x), k, 0,
            WIDTH=1024, PDL=tiles.pdl, **shrink, num_warps=4, **options,
        )  # fmt: skip
    _few_rows_kernel[(triton.cdiv(n, tiles.n),)](
        x, packed.view(-1).view(torch.int16), *_scale_arguments(absmax), bias, y, _table(x),
        len(x), x.stride(0), n, k, 1 / TABLE_SCALE[x.dtype],
        NESTED=isinstance(absmax, NestedAbsmax), WARPS=tiles.warps, COLUMNS=tiles.rows // 8, GATED=gated,
        PDL=tiles.pdl, EMULATED=not x.is_cuda, **expand,
        num_warps=tiles.warps, num_stages=1, **options, **registers,
    )  # fmt: skip
    return y


def _fused(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None,
    tiles: Tiles | None = None,
    lora: Lora | None = None,
    gated: Literal["x", "y"] | None = None,
) -> Tensor:
    """x: [rows, K], 16-bit, or [rows, 2 K] if it is gated. tiles: None chooses."""
    n, k = shape
    if not len(x):
        return x.new_empty(0, n // 2 if gated == "y" else n)
    if tiles is None:
        scaled = _scaling_pays(len(x), n, k) and x.dtype == torch.bfloat16
        # Up to four scales are loaded at once.
        scaled = scaled and isinstance(absmax, NestedAbsmax) and absmax.quantised.data_ptr() % 4 == 0
        tiles = choose_tiles(len(x), n, k, _multiprocessors(x.device), scaled)
        tiles = tiles._replace(pdl=x.is_cuda and is_hopper(x.device))
    few = tiles.n == FEW_ROWS_TILE
    fits = lora is None or _lora_fits(lora, tiles.n)
    if gated == "x" and (few or not fits):
        x, gated = swiglu(*x.chunk(2, -1)), None
    if gated == "y" and (
        not few or not fits or (lora is not None and any(end not in (n // 2, n) for end in lora.ends))
    ):
        return swiglu(*_fused(x, packed, absmax, shape, bias, tiles, lora).chunk(2, -1))
    if lora is not None and not fits:
        return _add_lora(_fused(x, packed, absmax, shape, bias, tiles), x, lora)
    if few:
        return _few_rows(x, packed, absmax, shape, bias, tiles, lora, gated == "y")
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    n_tiles, row_tiles = triton.cdiv(n, tiles.n), triton.cdiv(len(x), tiles.rows)
    permuted = torch.empty(row_tiles * tiles.rows, k, dtype=torch.float16 if tiles.scaled else x.dtype, device=x.device)
    width = triton.next_power_of_2(k) if tiles.scaled else 1024
    counters = partial = row_scale = None
    if tiles.scaled:
        row_scale = torch.empty(len(permuted), dtype=torch.float32, device=x.device)
    if tiles.splits > 1:
        counters = torch.empty(n_tiles * row_tiles, dtype=torch.int32, device=x.device)
        size = (tiles.splits, n_tiles * row_tiles, tiles.n * tiles.rows)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    options = {"launch_pdl": True} if tiles.pdl else {}
    registers = {"maxnreg": tiles.registers} if tiles.registers else {}
    grid: tuple[int, ...] = (len(permuted), triton.cdiv(k, width))
    shrink, expand = _lora_arguments(x, lora, len(permuted), tiles.rows, shape)
    if lora is not None:
        grid = (shrink["shrink_programs"] + grid[0] * grid[1],)
    _prepare_kernel[grid](
        x, permuted, row_scale, counters, x.stride(0), x.stride(1), k * x.stride(1) if gated else None, len(x), k,
        0 if counters is None else len(counters), WIDTH=width, PDL=tiles.pdl, **shrink,
        num_warps=max(4, min(width // 1024, 16)), **options,
    )  # fmt: skip
    _fused_kernel[(n_tiles * row_tiles, tiles.splits)](
        permuted, packed.view(-1).view(torch.int16), *_scale_arguments(absmax), bias, y, partial, counters,
        row_scale, _table(permuted),
        len(x), n, k, row_tiles, 1 / TABLE_SCALE[permuted.dtype],
        NESTED=isinstance(absmax, NestedAbsmax), SPLIT=tiles.splits > 1,
        N_TILE=tiles.n, ROW_TILE=tiles.rows, GROUP=tiles.group, WIDE=tiles.wide, PDL=tiles.pdl, EMULATED=not x.is_cuda,
        **expand,
        num_warps=tiles.warps, num_stages=tiles.stages, **options, **registers,
    )  # fmt: skip
    return y


def lookup_ptx(dtype: torch.dtype, scale: float, multiply: Literal[0, 1] | None = None, registers: bool = False) -> str:
    """PTX that turns four bytes of codes into their eight values, NF4[code] * scale in dtype.

    The lowest byte is the first in memory and its high four bits are its even k, so from the lowest bits on the word
    holds k = 1, 0, 3, 2, 5, 4, 7, 6. Operands: for a 16-bit dtype $0 to $3 the pairs k = 2 i, 2 i + 1 and $4 the word;
    for float32 $0 to $7 the values and $8 the word.

    One prmt with the low three bits of four codes as selectors picks four bytes out of eight; this is done in both
    halves of the table, and a third prmt, with bit 3 of the codes, picks one of the two. Once for each byte of dtype.

    multiply: for float16, times that one of the two float16 values in $5, rounded; there is a $6, not used.
    registers: `_constants` in the operands that follow, two each, the same.
    """
    size = dtype.itemsize
    constants = [f"${2 * size + (1 if multiply is None else 3) + 2 * i}" for i in range(5)] if registers else None
    lines = _lookup_lines(dtype, scale, f"${2 * size}", [f"${i}" for i in range(2 * size)], constants)
    if multiply is not None:  # the scale is read before the outputs are written: they may share a register
        lines.insert(0, f"prmt.b32 t, $5, $5, {(0x1010, 0x3232)[multiply]:#06x};")
        lines += [f"mul.rn.f16x2 ${i}, ${i}, t;" for i in range(4)]
    return "{ .reg .b32 m, s, p, q, a, b, c, d, t;\n" + "\n".join(lines) + "\n}"


def _table_words(dtype: torch.dtype, scale: float) -> list[list[int]]:
    """The table as 32-bit words: for each byte of dtype, lowest first, that of the 16 values."""
    planes = (torch.tensor(NF4, dtype=torch.float64) * scale).to(dtype).view(torch.uint8).view(16, dtype.itemsize).T
    return [[int.from_bytes(bytes(plane[i : i + 4]), "little") for i in (0, 4, 8, 12)] for plane in planes.tolist()]


SELECTORS = 0x32103210
"""byte i or, with 4 added, byte i of the other operand"""


def _lookup_lines(
    dtype: torch.dtype, scale: float, word: str, out: list[str], constants: list[str] | None = None
) -> list[str]:
    """`lookup_ptx` of a word into out. constants: registers that hold `_constants`; None: all are immediate."""
    tables = [[f"{t:#010x}" for t in table] for table in _table_words(dtype, scale)]
    selectors = f"{SELECTORS:#010x}"
    if constants is not None:
        tables = [[constants[2 * i], t1, constants[2 * i + 1], t3] for i, (_, t1, _, t3) in enumerate(tables)]
        selectors = constants[4]
    lines = [
        f"shr.u32 m, {word}, 1;",
        f"lop3.b32 m, m, 0x44444444, {selectors}, 0xea;",  # (m & ..) | ..: selector i + 4 * bit 3 of code i
        f"and.b32 s, {word}, 0x77777777;",
    ]
    for half in (0, 1):
        if half:
            lines += ["shr.u32 m, m, 16;", "shr.u32 s, s, 16;"]
        for name, (t0, t1, t2, t3) in zip("abcd", tables):
            lines.append(f"prmt.b32 p, {t0}, {t1}, s;")
            lines.append(f"prmt.b32 q, {t2}, {t3}, s;")
            lines.append(f"prmt.b32 {name}, p, q, m;")
        if dtype.itemsize == 2:
            lines.append(f"prmt.b32 {out[2 * half]}, a, b, 0x4051;")
            lines.append(f"prmt.b32 {out[2 * half + 1]}, a, b, 0x6273;")
        else:
            for code in range(4):
                pick = f"{(code + 4) << 4 | code:#06x}"
                lines.append(f"prmt.b32 p, a, b, {pick};")
                lines.append(f"prmt.b32 q, c, d, {pick};")
                lines.append(f"prmt.b32 {out[4 * half + (code ^ 1)]}, p, q, 0x5410;")
    return lines


def block_ptx(dtype: torch.dtype, columns: int) -> str:
    """PTX of a warp: 16 rows of W times 8 * columns rows of x over a block of 64 along k, four mma.m16n8k16 a column.

    Lane 4 g + t has the codes of k = 16 t to 16 t + 15 of rows g and g + 8 of W, and those k of rows g, g + 8, ... of
    x: which k meet in one mma is free, so nothing is shuffled. Operands: 4 * columns sums (the C fragments), the two
    rows' codes (64 bits each), 4 * columns times 64 bits of x, and `_constants`."""
    results = [f"${i}" for i in range(4 * columns)]
    first = 4 * columns
    codes, x = first, first + 2
    constants = [f"${x + 4 * columns + i}" for i in range(5)]
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    lines = [f"mov.b64 {{w{2 * i}, w{2 * i + 1}}}, ${codes + i};" for i in range(2)]
    lines += [f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${x + i};" for i in range(4 * columns)]
    lines += [f"mov.f32 d{i}, 0f00000000;" for i in range(4 * columns)]
    for half in (0, 1):
        for row in (0, 1):
            out = [f"v{4 * row + i}" for i in range(4)]
            lines += _lookup_lines(dtype, TABLE_SCALE[dtype], f"w{2 * row + half}", out, constants)
        for pair in (0, 2):
            for column in range(columns):
                d = ", ".join(f"d{4 * column + i}" for i in range(4))
                b = 8 * column + 4 * half + pair
                lines.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{{d}}}, "
                    f"{{v{pair}, v{4 + pair}, v{pair + 1}, v{5 + pair}}}, {{x{b}, x{b + 1}}}, {{{d}}};"
                )
    lines += [f"mov.f32 {result}, d{i};" for i, result in enumerate(results)]
    head = f".reg .b32 m, s, p, q, a, b, w<4>, v<8>, x<{8 * columns}>; .reg .f32 d<{4 * columns}>;"
    return "{ " + head + "\n" + "\n".join(lines) + "\n}"


@functools.cache
def _constants(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[5, 32] int32: the words of the table that a prmt takes from a register (its other one is immediate), and
    SELECTORS; for each lane of a warp.

    Loaded, and by each lane, so that the compiler keeps them in registers: from uniform registers it copied them for
    every prmt, a fifth of all instructions."""
    low, high = _table_words(dtype, TABLE_SCALE[dtype])
    words = torch.tensor([low[0], low[2], high[0], high[2], SELECTORS], dtype=torch.int64)
    words = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    return words[:, None].repeat(1, 32).to(device)


def _table(x: Tensor) -> Tensor:
    """What the fused kernels look values of x's dtype up with."""
    if x.is_cuda:
        return _constants(x.dtype, x.device)
    return _emulation_table(x.dtype, TABLE_SCALE[x.dtype])


def _emulation_table(dtype: torch.dtype, scale: float) -> Tensor:
    """The values themselves, as float32, for the interpreter, which runs no PTX."""
    return (torch.tensor(NF4, dtype=torch.float64) * scale).to(dtype).float()


if triton is not None:
    from grpo_kernels.swiglu import gate_times_up

    _SHRINK_BLOCK = tl.constexpr(SHRINK_BLOCK)
    _PTX_BF16 = tl.constexpr(lookup_ptx(torch.bfloat16, TABLE_SCALE[torch.bfloat16], registers=True))
    _PTX_FP16 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], registers=True))
    _PTX_SCALED_0 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], multiply=0, registers=True))
    _PTX_SCALED_1 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], multiply=1, registers=True))
    _CONSTANT_0, _CONSTANT_1, _CONSTANT_2, _CONSTANT_3, _CONSTANT_4 = (
        tl.constexpr(
            "{ .reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; mad.wide.u32 a, l, 4, $1; "
            f"ld.global.b32 $0, [a + {128 * i}]; }}"
        )
        for i in range(5)
    )
    _PTX_FP32 = tl.constexpr(lookup_ptx(torch.float32, 1.0))
    _BLOCK_BF16_1 = tl.constexpr(block_ptx(torch.bfloat16, 1))
    _BLOCK_BF16_2 = tl.constexpr(block_ptx(torch.bfloat16, 2))
    _BLOCK_FP16_1 = tl.constexpr(block_ptx(torch.float16, 1))
    _BLOCK_FP16_2 = tl.constexpr(block_ptx(torch.float16, 2))
    _LOOKUP = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 11))
    _SCALED_LOOKUP = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 13))
    _OPERANDS_1 = tl.constexpr(",".join(["=f"] * 4 + ["l"] * 6 + ["r"] * 5))
    _OPERANDS_2 = tl.constexpr(",".join(["=f"] * 8 + ["l"] * 10 + ["r"] * 5))
    _SPREAD_0, _SPREAD_1, _SPREAD_2, _SPREAD_3 = (
        tl.constexpr(f"shfl.sync.idx.b32 $0, $1, {i}, 0x1c1f, 0xffffffff;") for i in range(4)
    )

    @triton.jit
    def _emulated_lookup(words, table_ptr):
        """What the PTX does with pairs of words, for the interpreter: four tensors like words, float32."""
        first, second = tl.split(tl.reshape(words.to(tl.int32), (words.shape[0], words.shape[1] // 2, 2)))
        q0 = tl.join(tl.load(table_ptr + ((first >> 4) & 15)), tl.load(table_ptr + (first & 15)))
        q1 = tl.join(tl.load(table_ptr + ((first >> 12) & 15)), tl.load(table_ptr + ((first >> 8) & 15)))
        q2 = tl.join(tl.load(table_ptr + ((second >> 4) & 15)), tl.load(table_ptr + (second & 15)))
        q3 = tl.join(tl.load(table_ptr + ((second >> 12) & 15)), tl.load(table_ptr + ((second >> 8) & 15)))
        return (
            tl.reshape(q0, words.shape), tl.reshape(q1, words.shape),
            tl.reshape(q2, words.shape), tl.reshape(q3, words.shape),
        )  # fmt: skip

    @triton.jit
    def _load_constants(table_ptr, EMULATED: tl.constexpr):
        """`_constants`, each lane's own. Nothing under the interpreter."""
        if EMULATED:
            return 0, 0, 0, 0, 0
        else:
            c0 = tl.inline_asm_elementwise(_CONSTANT_0, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c1 = tl.inline_asm_elementwise(_CONSTANT_1, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c2 = tl.inline_asm_elementwise(_CONSTANT_2, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c3 = tl.inline_asm_elementwise(_CONSTANT_3, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c4 = tl.inline_asm_elementwise(_CONSTANT_4, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            return c0, c1, c2, c3, c4

    @triton.jit
    def _lookup(words, constants, DTYPE: tl.constexpr):
        """[N, 16] words of four codes -> q0 .. q3, where q_i[:, 2 p + e] is the value at k = 8 p + 2 i + e."""
        c0, c1, c2, c3, c4 = constants
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(
                _PTX_BF16, _LOOKUP, [words, c0, c1, c2, c3, c4],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                _PTX_FP16, _LOOKUP, [words, c0, c1, c2, c3, c4],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip

    @triton.jit
    def _quarters(tile):
        """[N, 4 C] -> its four [N, C]."""
        WIDTH: tl.constexpr = tile.shape[1] // 4
        tile = tl.permute(tl.reshape(tile, (tile.shape[0], 2, 2, WIDTH)), (0, 3, 1, 2))
        first, second = tl.split(tile)
        t0, t2 = tl.split(first)
        t1, t3 = tl.split(second)
        return t0, t1, t2, t3

    @triton.jit
    def _halves(tile):
        WIDTH: tl.constexpr = tile.shape[1] // 2
        return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, WIDTH)), (0, 2, 1)))

    @triton.jit
    def _scales(absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, index, outer_index, NESTED: tl.constexpr):
        """absmax at index, fp32, of a `NestedAbsmax` too. outer_index: index // 256, of one for all that share it."""
        absmax = tl.load(absmax_ptr + index)
        if NESTED:
            outer = tl.load(outer_ptr + outer_index)
            return tl.load(code_ptr + absmax) * outer + tl.load(offset_ptr + outer_index * offset_stride)
        else:
            return absmax.to(tl.float32)

    @triton.jit
    def _raw_scales(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block, GROUP: tl.constexpr):
        """GROUP bytes of scales from block on in one int32, and their second-level scale and offset: [N_TILE] each."""
        WORD: tl.constexpr = tl.int32 if GROUP == 4 else tl.int16
        word = tl.load((absmax_ptr + block).to(tl.pointer_type(WORD), bitcast=True)).to(tl.int32)
        outer = block // 256
        return word, tl.load(outer_ptr + outer), tl.load(offset_ptr + outer * offset_stride)

    @triton.jit
    def _half_scales(raw, code_ptr, column_scale, FIRST: tl.constexpr):
        """[N_TILE] int32: scales FIRST and FIRST + 1 of `_raw_scales`, times column_scale, as a pair of float16."""
        word, outer, offset = raw
        outer *= column_scale
        offset *= column_scale
        low = tl.load(code_ptr + ((word >> (8 * FIRST)) & 255)) * outer + offset
        high = tl.load(code_ptr + ((word >> (8 * FIRST + 8)) & 255)) * outer + offset
        low = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        return low | (high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) << 16)

    @triton.jit
    def _block_dot(words, table_ptr, constants, x_pointers, scale, accumulator, EMULATED: tl.constexpr):
        """accumulator + ([N_TILE, 16] words of one block of 64 along k times x) * scale, [N_TILE, ROW_TILE] float32."""
        x = tl.load(x_pointers)
        if EMULATED:
            q0, q1, q2, q3 = _emulated_lookup(words, table_ptr)
        else:
            q0, q1, q2, q3 = _lookup(words, constants, x.dtype)
        weights = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [N_TILE, 16, 2, 2], its last axes q mod 2 last
        weights = tl.reshape(tl.permute(weights, (0, 2, 3, 1)), (words.shape[0], 64))
        if EMULATED:
            return accumulator + tl.dot(weights, x.to(tl.float32), input_precision="ieee") * scale
        else:
            return accumulator + tl.dot(weights, x) * scale

    @triton.jit
    def _scaled_block_dot(
        words, table_ptr, constants, x_pointers, scales, accumulator, WHICH: tl.constexpr, EMULATED: tl.constexpr
    ):
        """accumulator + (words times one of the pair of float16 in scales, rounded to float16) times x."""
        x = tl.load(x_pointers)
        scales = scales[:, None]
        if EMULATED:
            q0, q1, q2, q3 = _emulated_lookup(words, table_ptr)
        else:  # two words a register, and two registers of the same scales
            c0, c1, c2, c3, c4 = constants
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                _PTX_SCALED_1 if WHICH else _PTX_SCALED_0, _SCALED_LOOKUP,
                [words, tl.broadcast_to(scales, words.shape), c0, c1, c2, c3, c4],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        weights = tl.join(tl.join(q0, q2), tl.join(q1, q3))
        weights = tl.reshape(tl.permute(weights, (0, 2, 3, 1)), (words.shape[0], 64))
        if not EMULATED:
            # The identity keeps the compiler from leaving the product in flight when the loop turns, where the next
            # iteration would write registers that it reads.
            return tl.inline_asm_elementwise(
                "", "=r,0", [tl.dot(weights, x, accumulator)], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            scale = ((scales >> (16 * WHICH)) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            weights = (weights * scale).to(tl.float16).to(tl.float32)
            return tl.dot(weights, x.to(tl.float32), accumulator, input_precision="ieee")

    @triton.jit
    def _power_of_two(exponent):
        """2 ** (exponent - 127) as float32, 1 <= exponent <= 254."""
        return (exponent << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def _exponent(value):
        """Of float32 value >= 0: 127 + floor(log2(value)), within [15, 254], so that 14 less or 268 less it is one."""
        return tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True) >> 23, 15), 254)

    @triton.jit
    def _largest_scale(code_ptr, outer_ptr, offset_ptr, offset_stride, n, blocks):
        """[N_TILE] float32: what no scale of W's rows n exceeds, from the second-level scales alone."""
        code = tl.max(tl.abs(tl.load(code_ptr + tl.arange(0, 256))), 0)
        first = n * blocks // 256
        last = (n * blocks + blocks - 1) // 256
        bound = tl.zeros(n.shape, tl.float32)
        for i in range(0, blocks // 256 + 2):
            index = tl.minimum(first + i, last)
            offset = tl.load(offset_ptr + index * offset_stride)
            bound = tl.maximum(bound, code * tl.abs(tl.load(outer_ptr + index)) + tl.abs(offset))
        return bound

    @triton.jit
    def _load_x(pointers, up_offset, mask):
        """x, zero outside mask; where there is an up_offset, silu(gate) * up as `swiglu` makes it."""
        x = tl.load(pointers, mask=mask, other=0.0)
        if up_offset is not None:
            x = gate_times_up(x, tl.load(pointers + up_offset, mask=mask, other=0.0))
        return x

    @triton.jit
    def _make_x(
        x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
        row, block, column_blocks, programs, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """out[row, 64 b + 16 i + 2 p + e] = x[row, 64 b + 8 p + 2 i + e], zero in rows that pad; counters to zero.

        A program takes WIDTH columns of a row, one of column_blocks such blocks. With row_scale_ptr, out is float16 and
        a row is divided by a power of two, kept there, that brings its largest |x| into [2^14, 2^15): exact for
        bfloat16 |x| above 2^-31 of it. A program then takes a whole row."""
        column = block * WIDTH + tl.arange(0, WIDTH)
        inside = column < columns
        x = _load_x(x_ptr + row.to(tl.int64) * row_stride + column * stride, up_offset, inside & (row < rows))
        if row_scale_ptr is not None:
            exponent = _exponent(tl.max(tl.abs(x.to(tl.float32)), 0))
            tl.store(row_scale_ptr + row, _power_of_two(exponent - 14))
            x = (x.to(tl.float32) * _power_of_two(268 - exponent)).to(tl.float16)
        x = tl.reshape(tl.permute(tl.reshape(x, (WIDTH // 64, 8, 4, 2)), (0, 2, 1, 3)), (WIDTH,))
        tl.store(out_ptr + row.to(tl.int64) * columns + column, x, mask=inside)
        if counters_ptr is not None:
            first = (row * column_blocks + block) * WIDTH
            for start in range(first, counters, programs * WIDTH):
                index = start + tl.arange(0, WIDTH)
                tl.store(counters_ptr + index, tl.zeros((WIDTH,), tl.int32), mask=index < counters)

    @triton.jit
    def _shrink(
        x_ptr, row_stride, stride, up_offset, rows, columns, a_ptr, shrunk_ptr, shrunk_rows, slices, share, program,
        RANK: tl.constexpr, RANK_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EMULATED: tl.constexpr,
    ):  # fmt: skip
        """shrunk[split, row, slice * RANK_TILE + r] = x[row] A_slice[r]^T over share blocks of columns, float32; zero
        where row or r pads. One [ROWS, RANK_TILE] tile of it a program."""
        slice_index = program % slices
        program = program // slices
        row_blocks = shrunk_rows // ROWS
        split = program // row_blocks
        row = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
        rank = tl.arange(0, RANK_TILE)
        # A warp would go through all columns, one product waiting for the other: so each has a quarter of a block.
        column = tl.arange(0, 4)[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        x_pointers = x_ptr + row.to(tl.int64)[None, :, None] * row_stride + column[:, None, :] * stride
        a_pointers = a_ptr + (slice_index * RANK + rank)[None, None, :] * columns + column[:, :, None]
        accumulator = tl.zeros((4, ROWS, RANK_TILE), tl.float32)
        for block in range(split * share, tl.minimum((split + 1) * share, columns // BLOCK)):
            x = _load_x(x_pointers + block * BLOCK * stride, up_offset, (row < rows)[None, :, None])
            a = tl.load(a_pointers + block * BLOCK, mask=(rank < RANK)[None, None, :], other=0.0)
            if EMULATED:  # the interpreter's products of bfloat16 are wrong
                accumulator = tl.dot(x.to(tl.float32), a.to(tl.float32), accumulator, input_precision="ieee")
            else:
                accumulator = tl.dot(x, a, accumulator)
        pointers = shrunk_ptr + (split * shrunk_rows + row).to(tl.int64)[:, None] * slices * RANK_TILE
        tl.store(pointers + (slice_index * RANK_TILE + rank)[None, :], tl.sum(accumulator, 0))

    @triton.jit(do_not_specialize=["rows", "counters", "shrink_programs", "shrunk_rows", "slices", "share"])
    def _prepare_kernel(
        x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
        WIDTH: tl.constexpr, PDL: tl.constexpr,
        a_ptr=None, shrunk_ptr=None, shrink_programs=None, shrunk_rows=None, slices=None, share=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0, SHRINK_ROWS: tl.constexpr = 0,
        EMULATED: tl.constexpr = False,
    ):  # fmt: skip
        """What the product needs made from x: `_make_x` and, by the first programs, an adapter's `_shrink`. Without
        out_ptr only that: the product then reads x itself, and before it waits for this kernel."""
        if PDL:
            if out_ptr is not None:
                gdc_launch_dependents()
            gdc_wait()
            if out_ptr is None:
                gdc_launch_dependents()  # only now, that x is there
        if a_ptr is None:
            _make_x(
                x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
                tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * tl.num_programs(1), WIDTH,
            )  # fmt: skip
        else:
            program = tl.program_id(0)
            if program < shrink_programs:
                _shrink(
                    x_ptr, row_stride, stride, up_offset, rows, columns, a_ptr, shrunk_ptr, shrunk_rows, slices, share,
                    program, RANK, RANK_TILE, SHRINK_ROWS, _SHRINK_BLOCK, EMULATED,
                )  # fmt: skip
            elif out_ptr is not None:
                program -= shrink_programs
                column_blocks = tl.cdiv(columns, WIDTH)
                _make_x(
                    x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
                    program // column_blocks, program % column_blocks, column_blocks,
                    tl.num_programs(0) - shrink_programs, WIDTH,
                )  # fmt: skip

    @triton.jit
    def _prefetch(pointers):
        """What pointers point to on its way to the L2 cache."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip

    @triton.jit
    def _adapter_operands(
        b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, n_start, n, row, low,
        DTYPE: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr, PART: tl.constexpr,
    ):  # fmt: skip
        """Columns low to low + PART of B, [N_TILE, PART], and of the sum s of the parts of x A^T, rounded to DTYPE:
        [PART, ROW_TILE]."""
        slice_index = (n_start >= first_end).to(tl.int32) + (n_start >= second_end).to(tl.int32)
        step = shrunk_rows.to(tl.int64) * slices * RANK_TILE
        AT_ONCE: tl.constexpr = min(8, 256 // row.shape[0]) if row.shape[0] <= 64 else 1  # more loads would spill
        rank = low + tl.arange(0, PART)
        pointers = shrunk_ptr + row.to(tl.int64)[None, :] * slices * RANK_TILE
        pointers += (slice_index * RANK_TILE + rank)[:, None]
        s = tl.load(pointers, cache_modifier=".cg")
        for i in tl.static_range(1, AT_ONCE):  # apart from the loop, so that B's load waits for none of them
            s += tl.load(pointers + i * step, mask=i < shrink_splits, other=0.0, cache_modifier=".cg")
        b = tl.load(b_ptr + n.to(tl.int64)[:, None] * RANK + rank[None, :], mask=(rank < RANK)[None, :], other=0.0)
        for part in range(AT_ONCE, shrink_splits, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                inside = part + i < shrink_splits
                s += tl.load(pointers + (part + i) * step, mask=inside, other=0.0, cache_modifier=".cg")
        return b, s.to(DTYPE)

    @triton.jit
    def _expand(y, b, s, EMULATED: tl.constexpr):
        """y + B s^T, [N_TILE, ROW_TILE] float32."""
        if EMULATED:
            return tl.dot(b.to(tl.float32), s.to(tl.float32), y, input_precision="ieee")
        else:
            return tl.dot(b, s, y)

    @triton.jit(  # one program for every batch size, and for every product of a model
        do_not_specialize=["rows", "row_tiles", "shrunk_rows", "shrink_splits", "slices", "first_end", "second_end"]
    )
    def _fused_kernel(
        x_ptr, words_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, bias_ptr, y_ptr, partial_ptr,
        counters_ptr, row_scale_ptr, table_ptr,
        rows, N, K, row_tiles, factor,
        NESTED: tl.constexpr, SPLIT: tl.constexpr, N_TILE: tl.constexpr, ROW_TILE: tl.constexpr, GROUP: tl.constexpr,
        WIDE: tl.constexpr, PDL: tl.constexpr, EMULATED: tl.constexpr,
        b_ptr=None, shrunk_ptr=None, shrunk_rows=None, shrink_splits=None, slices=None, first_end=None, second_end=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0,
    ):  # fmt: skip
        """One tile of y^T, [N_TILE, ROW_TILE]: GROUP blocks of 64 along k an iteration. x is permuted and padded.

        With row_scale_ptr, x is float16 and was divided by it, and weights are scaled before the product rather than
        sums of 64 terms after it: no second set of sums, and no wait for them before the next product. A row of W is
        multiplied by a power of two that brings its scales' bound into [2^14, 2^15)."""
        SCALED: tl.constexpr = row_scale_ptr is not None
        if PDL:
            gdc_launch_dependents()
        tile = tl.program_id(0)
        n_start = (tile // row_tiles) * N_TILE
        row = (tile % row_tiles) * ROW_TILE + tl.arange(0, ROW_TILE)
        n = tl.minimum(n_start + tl.arange(0, N_TILE), N - 1)  # rows beyond N repeat the last and are not stored
        blocks = K // 64
        groups = blocks // GROUP
        share = tl.cdiv(groups, tl.num_programs(1))
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, groups) - 1
        words_rows = words_ptr + n.to(tl.int64)[:, None] * (K // 4)
        if PDL:  # the memory would be idle until the kernel ahead has ended
            _prefetch(words_rows + tl.minimum(first + tl.arange(0, 2), groups - 1)[None, :] * (GROUP * 16))
            if b_ptr is not None:
                sector = tl.minimum(tl.arange(0, RANK_TILE // 16) * 16, RANK - 1)  # of 32 bytes
                _prefetch(b_ptr + n.to(tl.int64)[:, None] * RANK + sector[None, :])

        # A group's GROUP blocks begin at a multiple of GROUP, so they have one second-level scale.
        row_block = n * blocks
        start = tl.minimum(first, groups - 1) * GROUP
        if SCALED:
            exponent = _exponent(_largest_scale(code_ptr, outer_ptr, offset_ptr, offset_stride, n, blocks))
            column_scale = _power_of_two(268 - exponent)
            raw = _raw_scales(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + start, GROUP)
            next01 = _half_scales(raw, code_ptr, column_scale, 0)
            if GROUP == 4:
                next23 = _half_scales(raw, code_ptr, column_scale, 2)
            start = tl.minimum(first + 1, groups - 1) * GROUP
            raw = _raw_scales(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + start, GROUP)
        else:
            block = row_block[:, None] + start
            scales = _scales(
                absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, block + tl.arange(0, GROUP)[None, :],
                block // 256, NESTED,
            )  # fmt: skip
        if PDL:
            gdc_wait()  # only now: what was read so far is frozen
        constants = _load_constants(table_ptr, EMULATED)
        WORDS: tl.constexpr = 16 * GROUP if WIDE else 16
        words_pointers = words_rows + tl.arange(0, WORDS)[None, :]
        x_pointers = x_ptr + row.to(tl.int64)[None, :] * K + tl.arange(0, 64)[:, None]
        accumulator = tl.zeros((N_TILE, ROW_TILE), tl.float32)
        for group in range(first, last + 1):
            if SCALED:
                s01 = next01
                next01 = _half_scales(raw, code_ptr, column_scale, 0)
                if GROUP == 4:
                    s23 = next23
                    next23 = _half_scales(raw, code_ptr, column_scale, 2)
                block = row_block + tl.minimum(group + 2, last) * GROUP
                raw = _raw_scales(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block, GROUP)
            else:
                block = row_block[:, None] + tl.minimum(group + 1, last) * GROUP
                next_scales = _scales(
                    absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, block + tl.arange(0, GROUP)[None, :],
                    block // 256, NESTED,
                )  # fmt: skip
                if GROUP == 4:
                    s0, s1, s2, s3 = _quarters(scales)
                else:
                    s0, s1 = _halves(scales)
                scales = next_scales
            x_group = x_pointers + group * (GROUP * 64)
            words_group = words_pointers + group * (GROUP * 16)
            if WIDE:
                if GROUP == 4:
                    w0, w1, w2, w3 = _quarters(tl.load(words_group))
                else:
                    w0, w1 = _halves(tl.load(words_group))
            else:
                w0 = tl.load(words_group)
                w1 = tl.load(words_group + 16)
                if GROUP == 4:
                    w2 = tl.load(words_group + 32)
                    w3 = tl.load(words_group + 48)
            if SCALED:
                accumulator = _scaled_block_dot(w0, table_ptr, constants, x_group, s01, accumulator, 0, EMULATED)
                accumulator = _scaled_block_dot(w1, table_ptr, constants, x_group + 64, s01, accumulator, 1, EMULATED)
                if GROUP == 4:
                    accumulator = _scaled_block_dot(
                        w2, table_ptr, constants, x_group + 128, s23, accumulator, 0, EMULATED
                    )
                    accumulator = _scaled_block_dot(
                        w3, table_ptr, constants, x_group + 192, s23, accumulator, 1, EMULATED
                    )
            else:
                accumulator = _block_dot(w0, table_ptr, constants, x_group, s0, accumulator, EMULATED)
                accumulator = _block_dot(w1, table_ptr, constants, x_group + 64, s1, accumulator, EMULATED)
                if GROUP == 4:
                    accumulator = _block_dot(w2, table_ptr, constants, x_group + 128, s2, accumulator, EMULATED)
                    accumulator = _block_dot(w3, table_ptr, constants, x_group + 192, s3, accumulator, EMULATED)

        last_one = True
        SUMS: tl.constexpr = min(8, max(1, 128 // ROW_TILE)) if N_TILE <= 64 else 1
        if SPLIT:
            local = tl.arange(0, N_TILE)[:, None] * ROW_TILE + tl.arange(0, ROW_TILE)[None, :]
            partials = partial_ptr + tile.to(tl.int64) * (N_TILE * ROW_TILE) + local
            step = tl.num_programs(0).to(tl.int64) * (N_TILE * ROW_TILE)
            tl.store(partials + tl.program_id(1) * step, accumulator)
        if b_ptr is not None:  # their loads are under way while the tile is written and counted
            # More ranks at a time would spill registers.
            PART: tl.constexpr = min(RANK_TILE, max(16, 2**18 // (N_TILE * ROW_TILE)))
            b, s = _adapter_operands(
                b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, n_start, n, row, 0,
                y_ptr.dtype.element_ty, RANK, RANK_TILE, PART,
            )  # fmt: skip
        if SPLIT:
            tl.debug_barrier()  # the whole tile is written before the counter says so
            last_one = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == tl.num_programs(1) - 1
            if last_one:
                accumulator = tl.zeros((N_TILE, ROW_TILE), tl.float32)
                for i in range(0, tl.num_programs(1), SUMS):
                    for j in tl.static_range(SUMS):
                        inside = i + j < tl.num_programs(1)
                        accumulator += tl.load(partials + (i + j) * step, mask=inside, other=0.0, cache_modifier=".cg")
        if last_one:
            y = accumulator * factor
            if SCALED:
                y = y * tl.load(row_scale_ptr + row)[None, :] * _power_of_two(exponent - 14)[:, None]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
            if b_ptr is not None:
                y = y.to(y_ptr.dtype.element_ty).to(tl.float32)  # as where base and adapter are products apart
                y = _expand(y, b, s, EMULATED)
                for low in tl.static_range(PART, RANK_TILE, PART):
                    b, s = _adapter_operands(
                        b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, n_start, n, row,
                        low, y_ptr.dtype.element_ty, RANK, RANK_TILE, PART,
                    )  # fmt: skip
                    y = _expand(y, b, s, EMULATED)
            column = n_start + tl.arange(0, N_TILE)
            inside = (row < rows)[None, :] & (column < N)[:, None]
            tl.store(y_ptr + row.to(tl.int64)[None, :] * N + column[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _spread(scale, BLOCK: tl.constexpr, EMULATED: tl.constexpr):
        """[lanes] of lane BLOCK of each four."""
        if EMULATED:
            fours = tl.reshape(scale, (scale.shape[0] // 4, 4))
            one = tl.sum(tl.where(tl.arange(0, 4)[None, :] == BLOCK, fours, 0.0), 1)
            return tl.reshape(tl.broadcast_to(one[:, None], fours.shape), scale.shape)
        else:
            low: tl.constexpr = _SPREAD_0 if BLOCK == 0 else _SPREAD_1
            high: tl.constexpr = _SPREAD_2 if BLOCK == 2 else _SPREAD_3
            PTX: tl.constexpr = low if BLOCK < 2 else high
            return tl.inline_asm_elementwise(PTX, "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _fence(value, EMULATED: tl.constexpr):
        """value; loads before stay before: the compiler would issue them where they are needed, too late."""
        if EMULATED:
            return value
        else:
            return tl.inline_asm_elementwise(
                "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
            )

    @triton.jit
    def _x_words(pointers):
        """64 bits each of a lane's 16 values."""
        words = pointers.to(tl.pointer_type(tl.int64), bitcast=True)[:, None] + tl.arange(0, 2)[None, :]
        x0, x1 = tl.split(tl.load(words))
        x2, x3 = tl.split(tl.load(words + 2))
        return x0, x1, x2, x3

    @triton.jit
    def _emulated_block(codes, x_pointers, table_ptr, WARPS: tl.constexpr):
        """What `block_ptx` makes of eight rows of W and eight of x: two of the four sums."""
        k = tl.arange(0, 16)
        w = tl.load(table_ptr + ((codes[:, None] >> (4 * (k ^ 1))[None, :]) & 15))
        x = tl.load(x_pointers[:, None] + k[None, :]).to(tl.float32)
        w = tl.reshape(w, (WARPS, 8, 1, 64))
        x = tl.reshape(x, (WARPS, 1, 8, 64))
        sums = tl.reshape(tl.sum(w * x, 3), (WARPS * 32, 2))
        return tl.split(sums)

    @triton.jit
    def _block(
        codes_g, codes_h, x_pointers, x_step, table_ptr, constants,
        COLUMNS: tl.constexpr, WARPS: tl.constexpr, EMULATED: tl.constexpr,
    ):  # fmt: skip
        """The sums of a block for 8 or 16 rows of x, each four [lanes]."""
        if EMULATED:
            d0, d1 = _emulated_block(codes_g, x_pointers, table_ptr, WARPS)
            d2, d3 = _emulated_block(codes_h, x_pointers, table_ptr, WARPS)
            if COLUMNS == 2:
                d4, d5 = _emulated_block(codes_g, x_pointers + x_step, table_ptr, WARPS)
                d6, d7 = _emulated_block(codes_h, x_pointers + x_step, table_ptr, WARPS)
                return d0, d1, d2, d3, d4, d5, d6, d7
            else:
                return d0, d1, d2, d3, d0, d1, d2, d3
        else:
            BF16: tl.constexpr = x_pointers.dtype.element_ty == tl.bfloat16
            x0, x1, x2, x3 = _x_words(x_pointers)
            c0, c1, c2, c3, c4 = constants
            if COLUMNS == 2:
                x4, x5, x6, x7 = _x_words(x_pointers + x_step)
                return tl.inline_asm_elementwise(
                    _BLOCK_BF16_2 if BF16 else _BLOCK_FP16_2, _OPERANDS_2,
                    [codes_g, codes_h, x0, x1, x2, x3, x4, x5, x6, x7, c0, c1, c2, c3, c4],
                    dtype=(
                        tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32
                    ),
                    is_pure=True, pack=1,
                )  # fmt: skip
            else:
                d0, d1, d2, d3 = tl.inline_asm_elementwise(
                    _BLOCK_BF16_1 if BF16 else _BLOCK_FP16_1, _OPERANDS_1,
                    [codes_g, codes_h, x0, x1, x2, x3, c0, c1, c2, c3, c4],
                    dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
                )  # fmt: skip
                return d0, d1, d2, d3, d0, d1, d2, d3

    @triton.jit
    def _codes(pointers):
        """A lane's codes of four blocks, 64 bits each; they do not displace x in the L1 cache."""
        return (
            tl.load(pointers, cache_modifier=".cg"), tl.load(pointers + 4, cache_modifier=".cg"),
            tl.load(pointers + 8, cache_modifier=".cg"), tl.load(pointers + 12, cache_modifier=".cg"),
        )  # fmt: skip

    @triton.jit
    def _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block, NESTED: tl.constexpr):
        """What `_scale` needs of block from memory."""
        absmax = tl.load(absmax_ptr + block)
        if NESTED:
            outer = block // 256
            return absmax, tl.load(outer_ptr + outer), tl.load(offset_ptr + outer * offset_stride)
        else:
            return absmax, absmax, absmax

    @triton.jit
    def _scale(raw, code_ptr, NESTED: tl.constexpr):
        """absmax, fp32."""
        absmax, outer, offset = raw
        if NESTED:
            return tl.load(code_ptr + absmax) * outer + offset
        else:
            return absmax.to(tl.float32)

    @triton.jit
    def _tile_of(s0, s1, s2, s3, WARPS: tl.constexpr):
        """C fragments of each warp, summed over the warps: [16, 8]."""
        tile = tl.reshape(tl.join(tl.join(s0, s1), tl.join(s2, s3)), (WARPS, 8, 4, 2, 2))  # g, t, column, row
        return tl.sum(tl.reshape(tl.permute(tile, (0, 4, 1, 2, 3)), (WARPS, 16, 8)), 0)

    @triton.jit(do_not_specialize=["rows", "shrunk_rows", "shrink_splits", "slices", "first_end", "second_end"])
    def _few_rows_kernel(
        x_ptr, words_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, bias_ptr, y_ptr, table_ptr,
        rows, row_stride, N, K, factor,
        NESTED: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
        EMULATED: tl.constexpr,
        b_ptr=None, shrunk_ptr=None, shrunk_rows=None, shrink_splits=None, slices=None, first_end=None, second_end=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0,
    ):  # fmt: skip
        """16 columns of y, for up to 8 * COLUMNS rows. Each warp has four blocks of 64 along k at a time, WARPS warps
        take turns, and meet only to add their sums.

        GATED: 8 columns of y's first half and the same of its second; silu(first) * second is stored."""
        if PDL:
            gdc_launch_dependents()
        thread = tl.arange(0, 32 * WARPS)
        warp = thread // 32
        g = thread % 32 // 4
        t = thread % 4
        if GATED:
            width, start, apart = N // 2, tl.program_id(0) * 8, N // 2
        else:
            width, start, apart = N, tl.program_id(0) * 16, 8
        n_g = tl.minimum(start + g, width - 1)  # rows beyond the last repeat it and are not stored
        n_h = tl.minimum(n_g + apart, N - 1)
        local = tl.arange(0, 16)
        n = tl.minimum(tl.minimum(start + local % 8, width - 1) + local // 8 * apart, N - 1)
        steps = K // 256
        turns = tl.cdiv(steps, WARPS)
        codes = words_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        codes_g = codes + n_g.to(tl.int64) * (K // 16) + t
        codes_h = codes + n_h.to(tl.int64) * (K // 16) + t
        block_g = n_g * (K // 64) + t
        block_h = n_h * (K // 64) + t

        step = tl.minimum(warp, steps - 1)
        next_g = _codes(codes_g + step * 16)
        next_h = _codes(codes_h + step * 16)
        raw_g = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block_g + step * 4, NESTED)
        raw_h = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block_h + step * 4, NESTED)
        if PDL and b_ptr is not None:
            rank = tl.arange(0, RANK_TILE // 16) * 16  # sectors of 32 bytes
            _prefetch(b_ptr + n.to(tl.int64)[:, None] * RANK + tl.minimum(rank, RANK - 1)[None, :])
        # A warp whose turns are over, or that has none, counts its last blocks no more.
        scale_g = tl.where(warp < steps, _scale(raw_g, code_ptr, NESTED), 0.0)
        scale_h = tl.where(warp < steps, _scale(raw_h, code_ptr, NESTED), 0.0)
        if PDL and b_ptr is None:
            gdc_wait()  # only now: what was read so far is frozen

        # Rows of x beyond the last repeat it: their sums are columns of the tile that are not stored.
        x_row = tl.minimum(g, rows - 1)
        x_g = x_ptr + x_row.to(tl.int64) * row_stride + t * 16
        x_step = (tl.minimum(g + 8, rows - 1) - x_row) * row_stride
        constants = _load_constants(table_ptr, EMULATED)
        s0 = tl.zeros((32 * WARPS,), tl.float32)
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        for _ in range(turns):
            now_g, now_h, own_g, own_h = next_g, next_h, scale_g, scale_h
            x_now = x_g + step * 256
            following = step + WARPS
            step = tl.minimum(following, steps - 1)
            next_g = _codes(codes_g + step * 16)
            next_h = _codes(codes_h + step * 16)
            raw_g = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block_g + step * 4, NESTED)
            raw_h = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block_h + step * 4, NESTED)
            step = _fence(step, EMULATED)
            for i in tl.static_range(4):
                d0, d1, d2, d3, d4, d5, d6, d7 = _block(
                    now_g[i], now_h[i], x_now + i * 64, x_step, table_ptr, constants, COLUMNS, WARPS, EMULATED
                )
                f_g = _spread(own_g, i, EMULATED)
                f_h = _spread(own_h, i, EMULATED)
                s0 += d0 * f_g
                s1 += d1 * f_g
                s2 += d2 * f_h
                s3 += d3 * f_h
                if COLUMNS == 2:
                    s4 += d4 * f_g
                    s5 += d5 * f_g
                    s6 += d6 * f_h
                    s7 += d7 * f_h
            scale_g = tl.where(following < steps, _scale(raw_g, code_ptr, NESTED), 0.0)
            scale_h = tl.where(following < steps, _scale(raw_h, code_ptr, NESTED), 0.0)

        y = _tile_of(s0, s1, s2, s3, WARPS)
        if COLUMNS == 2:
            y = tl.reshape(tl.permute(tl.join(y, _tile_of(s4, s5, s6, s7, WARPS)), (0, 2, 1)), (16, 16))
        if PDL and b_ptr is not None:
            gdc_wait()
        row = tl.arange(0, 8 * COLUMNS)
        y = y * factor
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        DTYPE: tl.constexpr = y_ptr.dtype.element_ty
        if b_ptr is not None:
            y = y.to(DTYPE).to(tl.float32)  # as where base and adapter are products apart
            for low in tl.static_range(0, RANK_TILE, 16):
                b, s = _adapter_operands(
                    b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, start, n, row, low,
                    DTYPE, RANK, RANK_TILE, 16,
                )  # fmt: skip
                if GATED:  # the halves may be slices of their own
                    y = _expand(y, tl.where((local < 8)[:, None], b, 0.0), s, EMULATED)
                    b, s = _adapter_operands(
                        b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, start + apart, n,
                        row, low, DTYPE, RANK, RANK_TILE, 16,
                    )  # fmt: skip
                    b = tl.where((local < 8)[:, None], 0.0, b)
                y = _expand(y, b, s, EMULATED)
        y = y.to(DTYPE)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, (2, 8, 8 * COLUMNS)), (1, 2, 0)))
            y = gate_times_up(gate, up)
        column = start + tl.arange(0, 8 if GATED else 16)
        inside = (row < rows)[None, :] & (column < width)[:, None]
        tl.store(y_ptr + row.to(tl.int64)[None, :] * width + column[:, None], y, mask=inside)

    @triton.jit(do_not_specialize=["blocks", "row_start", "start"])
    def _dequantise_kernel(
        words_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, out_ptr, table_ptr,
        blocks, width, row_width, row_start, start,
        NESTED: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """BLOCKS blocks of 64 of a part of W: width blocks a row, out of row_width, from row_start and block start."""
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < blocks
        source = (row_start + block // width).to(tl.int64) * row_width + start + block % width
        source = tl.where(inside, source, 0)
        words = tl.load(words_ptr + source[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0)
        scales = _scales(absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, source, source // 256, NESTED)
        if table_ptr is None:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                _PTX_FP32, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            q0, q1, q2, q3 = _emulated_lookup(words, table_ptr)
        values = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [BLOCKS, 2 p + e, i // 2, i % 2]
        values = tl.permute(tl.reshape(values, (BLOCKS, 8, 2, 4)), (0, 1, 3, 2))
        values = tl.reshape(values, (BLOCKS, 64)) * scales[:, None]
        pointers = out_ptr + block.to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
