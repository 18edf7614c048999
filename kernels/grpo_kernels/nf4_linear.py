"""y = x W^T + bias on NF4 weights, in bitsandbytes' layout, without writing the dequantised weight.

The weight [N, K] is as in `nf4_dequantise`.

    rows        path
    1 to 16     fused, for few rows: each warp streams columns of 16 rows of W (`nf4_few_rows`)
    17 to 256   fused: tiles of W through shared memory (`_fused_kernel`)
    more        the weight dequantised into a buffer, by parts if it is large, and the vendor's matrix product
    no Triton   the whole weight dequantised in torch: the reference

Fused: reads the 4-bit codes once, decodes them in registers (Hopper, 16-bit x, K a multiple of 256). It computes
y^T = W x^T, so that W's rows fill the tensor cores' long side however few rows x has:

- Decode: `nf4_lookup`, about three integer instructions a weight, no table in memory.
- The table holds round(NF4[i] * TABLE_SCALE), and the result is divided by TABLE_SCALE: the factor at which the 16
  values round best in x's type. Their error (weighted by how often a value occurs) is then 0.08% in bfloat16, half of
  what dequantising to bfloat16 costs, and 0.008% in float16. The scales multiply fp32 partial sums of 64 terms, so they
  add no error.
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

from grpo_kernels.nf4_dequantise import (
    BLOCK,
    NestedAbsmax,
    nf4_dequantise,
    nf4_dequantise_reference,
    scale_arguments,
)
from grpo_kernels.nf4_few_rows import FEW_ROWS_TILE, Tiles, nf4_few_rows
from grpo_kernels.nf4_lookup import TABLE_SCALE, lookup_ptx, lookup_table
from grpo_kernels.nf4_prepare import Lora, lora_arguments, lora_fits
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
        following: the packed weight of the product that comes next, contiguous uint8: a hint, by which the fused kernel
            for up to 16 rows has its first 12 MiB on their way to the L2 cache while the memory would be idle.
        backend: None picks by device, dtype and rows: "fused" (Triton; 16-bit x, K a multiple of 256), "dequantise"
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
    elif backend not in ("fused", "dequantise", "torch") or (backend != "torch" and triton is None):
        raise ValueError(f"backend {backend!r}: choose 'fused' or 'dequantise' (need Triton), 'torch' or None")
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
    y = F.linear(x, nf4_dequantise_reference(packed, absmax, shape, x.dtype), bias)
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
    following: Tensor | None,
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
    if tiles is None:
        scaled = _scaling_pays(len(x), n, k) and x.dtype == torch.bfloat16
        # Up to four scales are loaded at once.
        scaled = scaled and isinstance(absmax, NestedAbsmax) and absmax.quantised.data_ptr() % 4 == 0
        tiles = choose_tiles(len(x), n, k, _multiprocessors(x.device), scaled)
        tiles = tiles._replace(pdl=x.is_cuda and is_hopper(x.device))
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
        multiprocessors = _multiprocessors(x.device)
        return nf4_few_rows(x, packed, absmax, shape, bias, tiles, lora, gated == "y", multiprocessors, following)
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
    shrink, expand = lora_arguments(x, lora, len(permuted), tiles.rows, shape, _multiprocessors(x.device))
    if lora is not None:
        grid = (shrink["shrink_programs"] + grid[0] * grid[1],)
    prepare_kernel[grid](
        x, permuted, row_scale, counters, x.stride(0), x.stride(1), k * x.stride(1) if gated else None, len(x), k,
        0 if counters is None else len(counters), WIDTH=width, PDL=tiles.pdl, **shrink,
        num_warps=max(4, min(width // 1024, 16)), **options,
    )  # fmt: skip
    _fused_kernel[(n_tiles * row_tiles, tiles.splits)](
        permuted, packed.view(-1).view(torch.int16), *scale_arguments(absmax), bias, y, partial, counters,
        row_scale, lookup_table(permuted),
        len(x), n, k, row_tiles, 1 / TABLE_SCALE[permuted.dtype],
        NESTED=isinstance(absmax, NestedAbsmax), SPLIT=tiles.splits > 1,
        N_TILE=tiles.n, ROW_TILE=tiles.rows, GROUP=tiles.group, WIDE=tiles.wide, PDL=tiles.pdl, EMULATED=not x.is_cuda,
        **expand,
        num_warps=tiles.warps, num_stages=tiles.stages, **options, **registers,
    )  # fmt: skip
    return y


if triton is not None:
    from grpo_kernels.nf4_dequantise import absmax_at
    from grpo_kernels.nf4_lookup import emulated_lookup, load_constants
    from grpo_kernels.nf4_prepare import (
        adapter_operands,
        add_expanded,
        exponent_of,
        power_of_two,
        prefetch,
        prepare_kernel,
    )

    _PTX_BF16 = tl.constexpr(lookup_ptx(torch.bfloat16, TABLE_SCALE[torch.bfloat16], registers=True))
    _PTX_FP16 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], registers=True))
    _PTX_SCALED_0 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], multiply=0, registers=True))
    _PTX_SCALED_1 = tl.constexpr(lookup_ptx(torch.float16, TABLE_SCALE[torch.float16], multiply=1, registers=True))
    _LOOKUP = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 11))
    _SCALED_LOOKUP = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 13))

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
            q0, q1, q2, q3 = emulated_lookup(words, table_ptr)
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
            q0, q1, q2, q3 = emulated_lookup(words, table_ptr)
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
            prefetch(words_rows + tl.minimum(first + tl.arange(0, 2), groups - 1)[None, :] * (GROUP * 16))
            if b_ptr is not None:
                sector = tl.minimum(tl.arange(0, RANK_TILE // 16) * 16, RANK - 1)  # of 32 bytes
                prefetch(b_ptr + n.to(tl.int64)[:, None] * RANK + sector[None, :])

        # A group's GROUP blocks begin at a multiple of GROUP, so they have one second-level scale.
        row_block = n * blocks
        start = tl.minimum(first, groups - 1) * GROUP
        if SCALED:
            exponent = exponent_of(_largest_scale(code_ptr, outer_ptr, offset_ptr, offset_stride, n, blocks))
            column_scale = power_of_two(268 - exponent)
            raw = _raw_scales(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + start, GROUP)
            next01 = _half_scales(raw, code_ptr, column_scale, 0)
            if GROUP == 4:
                next23 = _half_scales(raw, code_ptr, column_scale, 2)
            start = tl.minimum(first + 1, groups - 1) * GROUP
            raw = _raw_scales(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + start, GROUP)
        else:
            block = row_block[:, None] + start
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
            b, s = adapter_operands(
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
                y = y * tl.load(row_scale_ptr + row)[None, :] * power_of_two(exponent - 14)[:, None]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
            if b_ptr is not None:
                y = y.to(y_ptr.dtype.element_ty).to(tl.float32)  # as where base and adapter are products apart
                y = add_expanded(y, b, s, EMULATED)
                for low in tl.static_range(PART, RANK_TILE, PART):
                    b, s = adapter_operands(
                        b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, n_start, n, row,
                        low, y_ptr.dtype.element_ty, RANK, RANK_TILE, PART,
                    )  # fmt: skip
                    y = add_expanded(y, b, s, EMULATED)
            column = n_start + tl.arange(0, N_TILE)
            inside = (row < rows)[None, :] & (column < N)[:, None]
            tl.store(y_ptr + row.to(tl.int64)[None, :] * N + column[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
