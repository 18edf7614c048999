"""y = x W^T + bias on NF4 weights, in bitsandbytes' layout, without writing the dequantised weight.

The weight is [N, K] with K a multiple of 64. packed holds two 4-bit codes a byte, the even k in the high bits; every 64
weights share one absmax: W[n, k] = NF4[code[n, k]] * absmax[n, k // 64] (QLoRA, https://arxiv.org/abs/2305.14314).

    rows        path
    1 to 256    fused: reads the 4-bit codes once, decodes them in registers (Hopper, 16-bit x, K a multiple of 256)
    more        the weight dequantised into a buffer, by parts if it is large, and the vendor's matrix product
    no Triton   the whole weight dequantised in torch: the reference

The fused kernel computes y^T = W x^T, so that W's rows fill the tensor cores' long side however few rows x has:

- Decode: a byte permute (PTX prmt) looks four codes up at once in eight bytes of table; the 16 values' low and high
  bytes fill eight registers. About three integer instructions a weight, no table in memory.
- The table holds round(NF4[i] * TABLE_SCALE), and the result is divided by TABLE_SCALE: the factor at which the 16
  values round best in x's type. Their error (weighted by how often a value occurs) is then 0.08% in bfloat16, half of
  what dequantising to bfloat16 costs, and 0.008% in float16. The scales multiply fp32 partial sums of 64 terms, so they
  add no error.
- A thread decodes pairs of 16-bit words of four codes. To spare it shuffles, x is first permuted along k in the same
  way (`_permute_kernel`), which pads its rows to the tile as well.
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
    gated: bool = False,
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
        gated: x is [..., 2 K], gate and up side by side, and silu(gate) * up is multiplied (`swiglu`, and rounded as
            there). The fused kernel makes it in passing where no gradient of x is asked for.
        backend: None picks by device, dtype and rows: "fused" (Triton; 16-bit x, K a multiple of 256), "dequantise"
            (by a Triton kernel, then the vendor's product) or "torch" (everything in torch).

    Returns:
        [..., N], dtype of x.

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
    if gated and (backend != "fused" or (torch.is_grad_enabled() and x.requires_grad)):
        x, gated = swiglu(*x.chunk(2, -1)), False
    flat = x.reshape(rows, x.shape[-1])
    if gated:
        y = _fused(flat, packed, absmax, shape, bias, lora=lora, gated=True)
    elif lora is None:
        y = _NF4Linear.apply(flat, packed, absmax, shape, bias, backend)
    elif backend == "fused":
        y = _fused(flat, packed, absmax, shape, bias, lora=lora)
    else:
        y = _add_lora(_NF4Linear.apply(flat, packed, absmax, shape, bias, backend), flat, lora)
    return y.view(*x.shape[:-1], shape[0])


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
            _emulation_table(torch.float32, 1.0, packed.device),
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
    gated: bool,
) -> None:
    n, k = shape
    if k % BLOCK or not k:
        raise ValueError(f"shape is (N, K) = {tuple(shape)}: K must be a multiple of {BLOCK}; dequantise this weight")
    columns = 2 * k if gated else k
    if x.dim() < 1 or x.shape[-1] != columns:
        what = f"a weight of shape {tuple(shape)}" + (", gate and up side by side" if gated else "")
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
    """How the fused kernel is launched."""

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


FUSED_RANK = 64
"""the largest adapter that the fused kernel adds"""


def _scaling_pays(rows: int, n: int, k: int) -> bool:
    """Where `Tiles.scaled` was the faster on an H100: 5 to 16% at 64 rows, 6 to 26% at 256."""
    return (32 < rows <= 64 and n > k) or (rows > 128 and n * k > 2**24)


def choose_tiles(rows: int, n: int, k: int, multiprocessors: int, scaled: bool = False) -> Tiles:
    """Tiles measured on an H100: small enough that every multiprocessor has some, split over k where N is small.

    scaled: tiles that scale weights before the product; measured at 64 and 256 rows."""
    if scaled and rows > 128:
        tiles, resident = Tiles(128, 256, 1, 8, 3, group=2, scaled=True), 1
    elif scaled and rows > 64:
        tiles, resident = Tiles(128, 128, 1, 8, 3, group=2, scaled=True, registers=128), 2
    elif scaled and rows > 32:
        tiles, resident = Tiles(64, 64, 1, 4, 3, group=2, scaled=True), 3
    elif scaled:
        tiles, resident = Tiles(64, 16 if rows <= 16 else 32, 1, 4, 2, scaled=True), 4
    elif rows <= 16:
        tiles, resident = Tiles(64, 16, 1, 4, 2, wide=False), 4
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


def _fused(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None,
    tiles: Tiles | None = None,
    lora: Lora | None = None,
    gated: bool = False,
) -> Tensor:
    """x: [rows, K], 16-bit, or [rows, 2 K] if gated. tiles: None chooses."""
    n, k = shape
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if tiles is None:
        scaled = _scaling_pays(len(x), n, k) and x.dtype == torch.bfloat16
        # Up to four scales are loaded at once.
        scaled = scaled and isinstance(absmax, NestedAbsmax) and absmax.quantised.data_ptr() % 4 == 0
        tiles = choose_tiles(len(x), n, k, _multiprocessors(x.device), scaled)
        tiles = tiles._replace(pdl=x.is_cuda and is_hopper(x.device))
    if lora is not None and not _lora_fits(lora, tiles.n):
        x = swiglu(*x.chunk(2, -1)) if gated else x
        return _add_lora(_fused(x, packed, absmax, shape, bias, tiles), x, lora)
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
    shrink: dict[str, Any] = {}
    expand: dict[str, Any] = {}
    if lora is not None:
        rank, slices = lora.b.shape[1], len(lora.ends)
        rank_tile = max(16, triton.next_power_of_2(rank))
        height = 32 if tiles.rows > 16 and rank_tile <= 32 else 16
        row_blocks = triton.cdiv(len(permuted), height)
        share, splits = _shrink_splits(row_blocks * slices, tiles.rows, k, rank_tile, _multiprocessors(x.device))
        shrunk = torch.empty(splits, row_blocks * height, slices * rank_tile, dtype=torch.float32, device=x.device)
        common = {
            "shrunk_ptr": shrunk, "shrunk_rows": shrunk.shape[1], "slices": slices, "RANK": rank, "RANK_TILE": rank_tile
        }  # fmt: skip
        shrink = common | {
            "a_ptr": lora.a, "shrink_programs": splits * row_blocks * slices, "share": share, "SHRINK_ROWS": height,
            "EMULATED": not x.is_cuda, "num_stages": 5 if height == rank_tile == 16 else 3,
        }  # fmt: skip
        first, second = (*lora.ends, n, n)[:2]
        expand = common | {"b_ptr": lora.b, "shrink_splits": splits, "first_end": first, "second_end": second}
        grid = (splits * row_blocks * slices + grid[0] * grid[1],)
    _permute_kernel[grid](
        x, permuted, row_scale, counters, x.stride(0), x.stride(1), k * x.stride(1) if gated else None, len(x), k,
        0 if counters is None else len(counters), WIDTH=width, PDL=tiles.pdl, **shrink,
        num_warps=max(4, min(width // 1024, 16)), **options,
    )  # fmt: skip
    _fused_kernel[(n_tiles * row_tiles, tiles.splits)](
        permuted, packed.view(-1).view(torch.int16), *_scale_arguments(absmax), bias, y, partial, counters,
        row_scale, _emulation_table(permuted.dtype, TABLE_SCALE[permuted.dtype], x.device),
        len(x), n, k, row_tiles, 1 / TABLE_SCALE[permuted.dtype],
        NESTED=isinstance(absmax, NestedAbsmax), SPLIT=tiles.splits > 1,
        N_TILE=tiles.n, ROW_TILE=tiles.rows, GROUP=tiles.group, WIDE=tiles.wide, PDL=tiles.pdl, **expand,
        num_warps=tiles.warps, num_stages=tiles.stages, **options, **registers,
    )  # fmt: skip
    return y


def lookup_ptx(dtype: torch.dtype, scale: float, multiply: Literal[0, 1] | None = None) -> str:
    """PTX that turns four bytes of codes into their eight values, NF4[code] * scale in dtype.

    The lowest byte is the first in memory and its high four bits are its even k, so from the lowest bits on the word
    holds k = 1, 0, 3, 2, 5, 4, 7, 6. Operands: for a 16-bit dtype $0 to $3 the pairs k = 2 i, 2 i + 1 and $4 the word;
    for float32 $0 to $7 the values and $8 the word.

    One prmt with the low three bits of four codes as selectors picks four bytes out of eight; this is done in both
    halves of the table, and a third prmt, with bit 3 of the codes, picks one of the two. Once for each byte of dtype.

    multiply: for float16, times that one of the two float16 values in $5, rounded; there is a $6, not used.
    """
    size = dtype.itemsize
    planes = (torch.tensor(NF4, dtype=torch.float64) * scale).to(dtype).view(torch.uint8).view(16, size).T.tolist()
    tables = [[int.from_bytes(bytes(plane[i : i + 4]), "little") for i in (0, 4, 8, 12)] for plane in planes]
    word = f"${2 * size}"
    lines = [
        f"shr.u32 m, {word}, 1;",
        "lop3.b32 m, m, 0x44444444, 0x32103210, 0xea;",  # (m & ..) | ..: selector i + 4 * bit 3 of code i
        f"and.b32 s, {word}, 0x77777777;",
    ]
    for half in (0, 1):
        if half:
            lines += ["shr.u32 m, m, 16;", "shr.u32 s, s, 16;"]
        for name, (t0, t1, t2, t3) in zip("abcd", tables):
            lines.append(f"prmt.b32 p, {t0:#010x}, {t1:#010x}, s;")
            lines.append(f"prmt.b32 q, {t2:#010x}, {t3:#010x}, s;")
            lines.append(f"prmt.b32 {name}, p, q, m;")
        if size == 2:
            lines.append(f"prmt.b32 ${2 * half}, a, b, 0x4051;")
            lines.append(f"prmt.b32 ${2 * half + 1}, a, b, 0x6273;")
        else:
            for code in range(4):
                pick = f"{(code + 4) << 4 | code:#06x}"
                lines.append(f"prmt.b32 p, a, b, {pick};")
                lines.append(f"prmt.b32 q, c, d, {pick};")
                lines.append(f"prmt.b32 ${4 * half + (code ^ 1)}, p, q, 0x5410;")
    if multiply is not None:  # the scale is read before the outputs are written: they may share a register
        lines.insert(0, f"prmt.b32 t, $5, $5, {(0x1010, 0x3232)[multiply]:#06x};")
        lines += [f"mul.rn.f16x2 ${i}, ${i}, t;" for i in range(4)]
    return "{ .reg .b32 m, s, p, q, a, b, c, d, t;\n" + "\n".join(lines) + "\n}"


def _emulation_table(dtype: torch.dtype, scale: float, device: torch.device) -> Tensor | None:
    """What `lookup_ptx` looks up, as float32, for the interpreter; None on CUDA, where the PTX runs."""
    if device.type == "cuda":
        return None
    return (torch.tensor(NF4, dtype=torch.float64) * scale).to(dtype).float()


if triton is not None:
    from grpo_kernels.swiglu import gate_times_up

    _SHRINK_BLOCK = tl.constexpr(SHRINK_BLOCK)
    _PTX_BF16 = tl.constexpr(lookup_ptx(torch.bfloat16, TABLE_SCALE[torch.bfloat16]))
    _PTX_FP16 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16]))
    _PTX_SCALED_0 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], multiply=0))
    _PTX_SCALED_1 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], multiply=1))
    _PTX_FP32 = tl.constexpr(lookup_ptx(torch.float32, 1.0))

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
    def _lookup(words, table_ptr, DTYPE: tl.constexpr):
        """[N, 16] words of four codes -> q0 .. q3, where q_i[:, 2 p + e] is the value at k = 8 p + 2 i + e."""
        if table_ptr is None:
            if tl.float32 == DTYPE:
                return tl.inline_asm_elementwise(
                    _PTX_FP32, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
                    dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=2,
                )  # fmt: skip
            elif tl.bfloat16 == DTYPE:
                return tl.inline_asm_elementwise(
                    _PTX_BF16, "=r,=r,=r,=r,r", [words],
                    dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
                )  # fmt: skip
            else:
                return tl.inline_asm_elementwise(
                    _PTX_FP16, "=r,=r,=r,=r,r", [words],
                    dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
                )  # fmt: skip
        else:
            return _emulated_lookup(words, table_ptr)

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
    def _block_dot(words, table_ptr, x_pointers, scale, accumulator):
        """accumulator + ([N_TILE, 16] words of one block of 64 along k times x) * scale, [N_TILE, ROW_TILE] float32."""
        x = tl.load(x_pointers)
        q0, q1, q2, q3 = _lookup(words, table_ptr, x.dtype)
        weights = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [N_TILE, 16, 2, 2], its last axes q mod 2 last
        weights = tl.reshape(tl.permute(weights, (0, 2, 3, 1)), (words.shape[0], 64))
        if table_ptr is None:
            return accumulator + tl.dot(weights, x) * scale
        else:
            return accumulator + tl.dot(weights, x.to(tl.float32), input_precision="ieee") * scale

    @triton.jit
    def _scaled_block_dot(words, table_ptr, x_pointers, scales, accumulator, WHICH: tl.constexpr):
        """accumulator + (words times one of the pair of float16 in scales, rounded to float16) times x."""
        x = tl.load(x_pointers)
        scales = scales[:, None]
        if table_ptr is None:  # two words a register, and two registers of the same scales
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                _PTX_SCALED_1 if WHICH else _PTX_SCALED_0, "=r,=r,=r,=r,r,r,r",
                [words, tl.broadcast_to(scales, words.shape)],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            q0, q1, q2, q3 = _emulated_lookup(words, table_ptr)
        weights = tl.join(tl.join(q0, q2), tl.join(q1, q3))
        weights = tl.reshape(tl.permute(weights, (0, 2, 3, 1)), (words.shape[0], 64))
        if table_ptr is None:
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
    def _permute(
        x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
        row, block, column_blocks, programs,
        WIDTH: tl.constexpr,
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
        x = tl.permute(tl.reshape(x, (WIDTH // 64, 8, 4, 2)), (0, 2, 1, 3))
        tl.store(out_ptr + row.to(tl.int64) * columns + column, tl.reshape(x, (WIDTH,)), mask=inside)
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
    def _permute_kernel(
        x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
        WIDTH: tl.constexpr, PDL: tl.constexpr,
        a_ptr=None, shrunk_ptr=None, shrink_programs=None, shrunk_rows=None, slices=None, share=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0, SHRINK_ROWS: tl.constexpr = 0,
        EMULATED: tl.constexpr = False,
    ):  # fmt: skip
        """What the product needs made from x: `_permute` and, by the first programs, an adapter's `_shrink`."""
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        if a_ptr is None:
            _permute(
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
            else:
                program -= shrink_programs
                column_blocks = tl.cdiv(columns, WIDTH)
                _permute(
                    x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
                    program // column_blocks, program % column_blocks, column_blocks,
                    tl.num_programs(0) - shrink_programs,
                    WIDTH,
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
    def _expand(y, b, s, table_ptr):
        """y + B s^T, [N_TILE, ROW_TILE] float32."""
        if table_ptr is None:
            return tl.dot(b, s, y)
        else:
            return tl.dot(b.to(tl.float32), s.to(tl.float32), y, input_precision="ieee")

    @triton.jit(  # one program for every batch size, and for every product of a model
        do_not_specialize=["rows", "row_tiles", "shrunk_rows", "shrink_splits", "slices", "first_end", "second_end"]
    )
    def _fused_kernel(
        x_ptr, words_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, bias_ptr, y_ptr, partial_ptr,
        counters_ptr, row_scale_ptr, table_ptr,
        rows, N, K, row_tiles, factor,
        NESTED: tl.constexpr, SPLIT: tl.constexpr, N_TILE: tl.constexpr, ROW_TILE: tl.constexpr, GROUP: tl.constexpr,
        WIDE: tl.constexpr, PDL: tl.constexpr,
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
                accumulator = _scaled_block_dot(w0, table_ptr, x_group, s01, accumulator, 0)
                accumulator = _scaled_block_dot(w1, table_ptr, x_group + 64, s01, accumulator, 1)
                if GROUP == 4:
                    accumulator = _scaled_block_dot(w2, table_ptr, x_group + 128, s23, accumulator, 0)
                    accumulator = _scaled_block_dot(w3, table_ptr, x_group + 192, s23, accumulator, 1)
            else:
                accumulator = _block_dot(w0, table_ptr, x_group, s0, accumulator)
                accumulator = _block_dot(w1, table_ptr, x_group + 64, s1, accumulator)
                if GROUP == 4:
                    accumulator = _block_dot(w2, table_ptr, x_group + 128, s2, accumulator)
                    accumulator = _block_dot(w3, table_ptr, x_group + 192, s3, accumulator)

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
                y = _expand(y, b, s, table_ptr)
                for low in tl.static_range(PART, RANK_TILE, PART):
                    b, s = _adapter_operands(
                        b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, n_start, n, row,
                        low, y_ptr.dtype.element_ty, RANK, RANK_TILE, PART,
                    )  # fmt: skip
                    y = _expand(y, b, s, table_ptr)
            column = n_start + tl.arange(0, N_TILE)
            inside = (row < rows)[None, :] & (column < N)[:, None]
            tl.store(y_ptr + row.to(tl.int64)[None, :] * N + column[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)

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
        q0, q1, q2, q3 = _lookup(words, table_ptr, tl.float32)
        values = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [BLOCKS, 2 p + e, i // 2, i % 2]
        values = tl.permute(tl.reshape(values, (BLOCKS, 8, 2, 4)), (0, 1, 3, 2))
        values = tl.reshape(values, (BLOCKS, 64)) * scales[:, None]
        pointers = out_ptr + block.to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
