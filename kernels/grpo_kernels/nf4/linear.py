"""y = x W^T + bias on NF4 weights, in bitsandbytes' layout, without writing the dequantized weight.

The weight [N, K] is as in `nf4_dequantize`.

    rows        path
    1 to 16     fused, for few rows: each warp streams columns of 16 rows of W (`nf4_few_rows`)
    17 to 256   fused, in tiles: scales multiply weights before the product (`nf4_scaled`) or sums (`_fused_kernel`)
    more        the weight dequantized into a buffer, by parts if it is large, and the vendor's matrix product
    no Triton   the whole weight dequantized in torch: the reference

Fused: reads the 4-bit codes once, decodes them in registers (Hopper, 16-bit x, K a multiple of 256). It computes
y^T = W x^T, so that W's rows fill the tensor cores' long side however few rows x has:

- Decode: `nf4_lookup`, about three integer instructions a weight, no table in memory.
- The table holds round(NF4[i] * TABLE_SCALE), and the result is divided by TABLE_SCALE: the factor at which the 16
  values round best in x's type. Their error (weighted by how often a value occurs) is then 0.08% in bfloat16, half of
  what dequantizing to bfloat16 costs, and 0.008% in float16. The scales multiply fp32 partial sums of 64 terms, so they
  add no error; for those of `nf4_scaled` see there.
- A thread decodes pairs of 16-bit words of four codes. To spare it shuffles, x is first permuted along k in the same
  way (`prepare_kernel`), which pads its rows to the tile as well; for few rows it is read as it is.
- Split-K: programs leave fp32 partial tiles, the last one to finish adds them in order, so the sum is deterministic.
- A LoRA adapter costs no launch (`nf4_prepare`). Its product is added to the tile rounded to x's dtype: where a
  trainer's separate products round, so the two policies differ by less.
"""

import functools
import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.nf4.dequantize import (
    BLOCK,
    NestedAbsmax,
    nf4_dequantize,
    nf4_dequantize_reference,
    scale_arguments,
)
from grpo_kernels.nf4.few_rows import nf4_few_rows
from grpo_kernels.nf4.lookup import TABLE_SCALE, lookup_ptx, lookup_table
from grpo_kernels.nf4.prologue import COUNTERS, Lora, lora_fits, prepare
from grpo_kernels.nf4.scaled import nf4_scaled
from grpo_kernels.nf4.tiles import FEW_ROWS_TILE, Tiles, choose_tiles
from grpo_kernels.swiglu import swiglu

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton on macOS
    triton = None


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    gated: Literal["x", "y"] | None = None,
    following: Tensor | None = None,
    backend: Literal["fused", "dequantize", "torch"] | None = None,
) -> Tensor:
    """x W^T + bias for a frozen NF4 weight, and an adapter's product. Differentiable in x and bias without lora.

    Args:
        x: [..., K] bfloat16, float16 or float32, any strides. float32 is never computed by the fused kernel.
        packed: [N * K / 2, 1] (or any shape of as many bytes) uint8, contiguous, bitsandbytes' layout.
        absmax: [N * K / 64] floating point, contiguous, or a `NestedAbsmax`, decoded in the kernel.
        shape: (N, K), the weight's. K must be a multiple of 64.
        bias: [N], or None.
        lora: an adapter (https://arxiv.org/abs/2106.09685) whose product is added; forward only. The fused kernel does
            it in passing up to rank 64, three slices, and slices that end at multiples of its tile of W's rows (64 or
            128); other adapters, and other paths, take two small products a slice in torch.
        gated: "x": x is [..., 2 K], gate and up side by side, and silu(gate) * up is multiplied (`swiglu`, and rounded
            as there). "y": so are the N columns that come out, and silu(gate) * up of them is returned. Where no
            gradient is asked for, the fused kernel makes it in passing: of x above 16 rows, of y up to 16.
        following: the packed weight of the product that comes next, contiguous uint8: a hint, by which the fused kernel
            for up to 16 rows has its first 12 MiB on their way to the L2 cache while the memory would be idle.
        backend: None picks by device, dtype and rows: "fused" (Triton; 16-bit x, K a multiple of 256), "dequantize"
            (by a Triton kernel, then the vendor's product) or "torch" (everything in torch).

    Returns:
        [..., N], or [..., N / 2] if "y" is gated, dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a gradient is asked for with lora; the message says which.
    """
    _check(x, packed, absmax, shape, bias, gated, following)
    if lora is not None:
        _check_lora(x, shape, bias, lora)
    rows = math.prod(x.shape[:-1])
    if backend is None:
        backend = choose_backend(x, rows, shape[1])
    elif backend not in ("fused", "dequantize", "torch") or (backend != "torch" and triton is None):
        raise ValueError(f"backend {backend!r}: choose 'fused' or 'dequantize' (need Triton), 'torch' or None")
    elif backend == "fused" and (x.dtype == torch.float32 or shape[1] % 256):
        raise ValueError(f"backend 'fused' needs a 16-bit x and K a multiple of 256, not {x.dtype}, K = {shape[1]}")
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias))
    if gated == "x" and (backend != "fused" or differentiated):
        x, gated = swiglu(*x.chunk(2, -1)), None
    flat = x.reshape(rows, x.shape[-1])
    if backend == "fused" and not differentiated:
        y = _fused(flat, packed, absmax, shape, bias, lora=lora, gated=gated, following=following)
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
    y = F.linear(x, nf4_dequantize_reference(packed, absmax, shape, x.dtype), bias)
    if lora is None:
        return y
    return y + torch.cat([F.linear(F.linear(x, a), b) for _, a, b in lora.slices()], -1)


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
    following: Tensor | None,
) -> None:
    if gated not in (None, "x", "y"):
        raise ValueError(f"gated is {gated!r}, must be 'x', 'y' or None")
    n, k = shape
    if gated == "y" and n % 2:
        raise ValueError(f"shape is (N, K) = {tuple(shape)}: gate and up, as gated='y' has them, are an even N")
    if k % BLOCK or not k:
        raise ValueError(f"shape is (N, K) = {tuple(shape)}: K must be a multiple of {BLOCK}; dequantize this weight")
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
    scales = absmax.quantized if isinstance(absmax, NestedAbsmax) else absmax
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
    if following is not None and (following.dtype != torch.uint8 or not following.is_contiguous()):
        raise ValueError(f"following is {following.dtype} of strides {following.stride()}, must be contiguous uint8")
    for name, tensor in (("packed", packed), ("absmax", scales), ("bias", bias), ("following", following)):
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
    zeros = lora.counters
    if zeros is not None and (zeros.shape, zeros.dtype, zeros.device) != ((COUNTERS,), torch.int32, x.device):
        found = f"{zeros.dtype} {list(zeros.shape)} on {zeros.device}"
        raise ValueError(f"lora.counters is {found}, must be [{COUNTERS}] zeros of int32 on {x.device}")
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
"""largest dequantized part of a weight at a time"""


def choose_backend(x: Tensor, rows: int, k: int) -> Literal["fused", "dequantize", "torch"]:
    """What `nf4_linear` does for x (its dtype and device count) of so many rows, of K columns."""
    if triton is None or not x.is_cuda or torch.version.hip:
        return "torch"
    fused = rows <= FUSED_ROWS and k % 256 == 0 and x.dtype != torch.float32 and is_hopper(x.device)
    return "fused" if fused else "dequantize"


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """The fused kernel is the default only where it was run and its tiles measured (they take up to 105 KiB of shared
    memory). Hopper also lets a kernel start before the one ahead of it has ended: 1 to 2 us less a product."""
    return torch.cuda.get_device_capability(device)[0] == 9


def _by_chunks(
    x: Tensor, packed: Tensor, absmax: Tensor | NestedAbsmax, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """Chunks of W's rows, each dequantized into the same buffer and multiplied."""
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


def _scales_weights(x: Tensor, packed: Tensor, absmax: Tensor | NestedAbsmax) -> bool:
    """Whether `nf4_scaled` takes it; above 16 rows it is the faster one on an H100."""
    # A thread loads 16 bytes of codes at once.
    return x.dtype == torch.bfloat16 and isinstance(absmax, NestedAbsmax) and packed.data_ptr() % 16 == 0


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
    following: Tensor | None = None,
) -> Tensor:
    """x: [rows, K], 16-bit, or [rows, 2 K] if it is gated. tiles: None chooses."""
    n, k = shape
    if not len(x):
        return x.new_empty(0, n // 2 if gated == "y" else n)
    multiprocessors = _multiprocessors(x.device)
    if tiles is None:
        hopper = not x.is_cuda or is_hopper(x.device)
        tiles = choose_tiles(len(x), n, k, multiprocessors, hopper and _scales_weights(x, packed, absmax))
        tiles = tiles._replace(pdl=x.is_cuda and hopper)
    few = tiles.n == FEW_ROWS_TILE
    fits = lora is None or lora_fits(lora, tiles.n)
    if gated == "x" and (few or not fits):
        x, gated = swiglu(*x.chunk(2, -1)), None
    if gated == "y" and (
        not few or not fits or (lora is not None and any(end not in (n // 2, n) for end in lora.ends))
    ):
        return swiglu(*_fused(x, packed, absmax, shape, bias, tiles, lora, following=following).chunk(2, -1))
    if lora is not None and not fits:
        return _add_lora(_fused(x, packed, absmax, shape, bias, tiles, following=following), x, lora)
    if few:
        return nf4_few_rows(x, packed, absmax, shape, bias, tiles, lora, gated == "y", multiprocessors, following)
    if tiles.scaled:
        assert isinstance(absmax, NestedAbsmax)
        return nf4_scaled(x, packed, absmax, shape, bias, tiles, lora, gated == "x", multiprocessors)
    ready = prepare(x, shape, tiles, lora, gated == "x", multiprocessors)
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    _fused_kernel[ready.grid](
        ready.x, packed.view(-1).view(torch.int16), *scale_arguments(absmax), bias, y, ready.partial, ready.counters,
        lookup_table(ready.x),
        len(x), n, k, ready.row_tiles, 1 / TABLE_SCALE[x.dtype],
        NESTED=isinstance(absmax, NestedAbsmax), SPLIT=tiles.splits > 1,
        N_TILE=tiles.n, ROW_TILE=tiles.rows, GROUP=tiles.group, WIDE=tiles.wide, PDL=tiles.pdl, EMULATED=not x.is_cuda,
        **ready.expand,
        num_warps=tiles.warps, num_stages=tiles.stages, **tiles.options,
    )  # fmt: skip
    return y


if triton is not None:
    from grpo_kernels.nf4.dequantize import absmax_at
    from grpo_kernels.nf4.epilogue import finish_tile
    from grpo_kernels.nf4.lookup import emulated_lookup, load_constants
    from grpo_kernels.nf4.prologue import add_product, prefetch, prefetch_adapter

    _PTX_BF16 = tl.constexpr(lookup_ptx(torch.bfloat16, TABLE_SCALE[torch.bfloat16], registers=True))
    _PTX_FP16 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], registers=True))
    _LOOKUP = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 11))

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
    def _block_dot(words, table_ptr, constants, x_pointers, scale, accumulator, EMULATED: tl.constexpr):
        """accumulator + ([N_TILE, 16] words of one block of 64 along k times x) * scale, [N_TILE, ROW_TILE] float32."""
        x = tl.load(x_pointers)
        if EMULATED:
            q0, q1, q2, q3 = emulated_lookup(words, table_ptr)
        else:
            q0, q1, q2, q3 = _lookup(words, constants, x.dtype)
        weights = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [N_TILE, 16, 2, 2], its last axes q mod 2 last
        weights = tl.reshape(tl.permute(weights, (0, 2, 3, 1)), (words.shape[0], 64))
        return accumulator + add_product(None, weights, x, EMULATED) * scale

    @triton.jit(  # one program for every batch size, and for every product of a model
        do_not_specialize=["rows", "row_tiles", "slices", "first_end", "second_end"]
    )
    def _fused_kernel(
        x_ptr, words_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, bias_ptr, y_ptr, partial_ptr,
        counters_ptr, table_ptr,
        rows, N, K, row_tiles, factor,
        NESTED: tl.constexpr, SPLIT: tl.constexpr, N_TILE: tl.constexpr, ROW_TILE: tl.constexpr, GROUP: tl.constexpr,
        WIDE: tl.constexpr, PDL: tl.constexpr, EMULATED: tl.constexpr,
        b_ptr=None, shrunk_ptr=None, slices=None, first_end=None, second_end=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0,
    ):  # fmt: skip
        """One tile of y^T, [N_TILE, ROW_TILE]: GROUP blocks of 64 along k an iteration. x is permuted and padded."""
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
            prefetch(words_rows + tl.minimum(first + tl.arange(0, 2), groups - 1)[None, :] * (GROUP * 16))
            if b_ptr is not None:
                prefetch_adapter(b_ptr, n, RANK, RANK_TILE)

        # A group's GROUP blocks begin at a multiple of GROUP, so they have one second-level scale.
        row_block = n * blocks
        block = row_block[:, None] + tl.minimum(first, groups - 1) * GROUP
        scales = absmax_at(
            absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, block + tl.arange(0, GROUP)[None, :],
            block // 256, NESTED,
        )  # fmt: skip
        if PDL:
            gdc_wait()  # only now: what was read so far is frozen
        constants = load_constants(table_ptr, EMULATED)
        WORDS: tl.constexpr = 16 * GROUP if WIDE else 16
        words_pointers = words_rows + tl.arange(0, WORDS)[None, :]
        x_pointers = x_ptr + row.to(tl.int64)[None, :] * K + tl.arange(0, 64)[:, None]
        accumulator = tl.zeros((N_TILE, ROW_TILE), tl.float32)
        for group in range(first, last + 1):
            block = row_block[:, None] + tl.minimum(group + 1, last) * GROUP
            next_scales = absmax_at(
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
            accumulator = _block_dot(w0, table_ptr, constants, x_group, s0, accumulator, EMULATED)
            accumulator = _block_dot(w1, table_ptr, constants, x_group + 64, s1, accumulator, EMULATED)
            if GROUP == 4:
                accumulator = _block_dot(w2, table_ptr, constants, x_group + 128, s2, accumulator, EMULATED)
                accumulator = _block_dot(w3, table_ptr, constants, x_group + 192, s3, accumulator, EMULATED)

        finish_tile(
            accumulator, tile, n_start, n, row, rows, N, factor, None, None, bias_ptr, y_ptr, partial_ptr,
            counters_ptr, b_ptr, shrunk_ptr, slices, first_end, second_end,
            SPLIT, EMULATED, RANK, RANK_TILE,
        )  # fmt: skip
