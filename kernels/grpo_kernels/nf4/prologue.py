"""The kernel ahead of a product on NF4 weights, and the LoRA adapter's part in both.

For `nf4_scaled` the prologue permutes x along k as the codes are permuted, scales its rows and pads them to whole
tiles. A LoRA adapter costs no launch of its own: the prologue computes x A^T beside that, in fp32 parts over k, which
the last program to come adds in order and rounds to x's dtype; the program that writes a tile of y then adds the
product of x A^T with its rows of B. For `nf4_few_rows` the prologue only computes x A^T, if there is an adapter."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.nf4.tiles import Tiles

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton on macOS
    triton = None


class Lora(NamedTuple):
    """A LoRA adapter of one or several merged layers: x A_i^T B_i^T is added to the i-th slice of y's columns."""

    a: Tensor  # [slices * rank, K] contiguous, in x's dtype: the A matrices of the slices, stacked
    b: Tensor  # [N, rank] contiguous, in x's dtype, already multiplied by the scaling (alpha / rank)
    ends: tuple[int, ...]  # row of W at which each slice ends: (N,), or (4096, 5120, 6144) for a merged q, k and v
    counters: Tensor | None = None  # [COUNTERS] int32 zeros, left as zeros; for one stream only. None makes new ones

    def slices(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each slice: its rows of W, its A [rank, K] and its B [rows, rank]."""
        for a, (start, end) in zip(self.a.chunk(len(self.ends)), itertools.pairwise((0, *self.ends))):
            yield slice(start, end), a, self.b[start:end]


FUSED_RANK = 64
"""largest rank of an adapter that the fused kernels add"""
SHRINK_BLOCK = 128
"""columns of x per step of the product with A"""
X_VALUES = 8192
"""values of x per program that permutes, in whole rows"""
COUNTERS = 64
"""number of an adapter's counters: one for each tile of x A^T whose sum over k is shared by several programs"""


def new_counters(device: torch.device | str) -> Tensor:
    """`Lora.counters`, which all adapters may share whose products run one after another."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def lora_fits(lora: Lora, n_tile: int) -> bool:
    """Whether a fused kernel can add the adapter: each tile of n_tile rows of W has to lie in one slice."""
    return lora.b.shape[1] <= FUSED_RANK and len(lora.ends) <= 3 and not any(end % n_tile for end in lora.ends[:-1])


def _shrink_splits(tiles: int, k: int, multiprocessors: int) -> tuple[int, int]:
    """(blocks of columns per program, programs that share a sum over k) for x A^T.

    tiles: number of row blocks times slices. A program takes two blocks, so that it runs about as long as one that
    permutes, unless these would be more programs than run at a time."""
    blocks = k // SHRINK_BLOCK
    splits = max(1, min(blocks // 2, 32, 2 * multiprocessors // tiles)) if tiles <= COUNTERS else 1
    per_program = -(-blocks // splits)
    return per_program, -(-blocks // per_program)


def lora_arguments(
    x: Tensor, lora: Lora | None, rows: int, row_tile: int, shape: tuple[int, int], multiprocessors: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the prologue, which computes x A^T, and of the product's kernel, which multiplies that by B.

    rows: number of rows of x, padded to whole tiles. row_tile: rows per tile."""
    if lora is None:
        return {}, {}
    n, k = shape
    rank, slices = lora.b.shape[1], len(lora.ends)
    rank_tile = max(16, triton.next_power_of_2(rank))
    height = 32 if row_tile > 16 and rank_tile <= 32 else 16
    row_blocks = triton.cdiv(rows, height)
    blocks_per_program, splits = _shrink_splits(row_blocks * slices, k, multiprocessors)
    shrunk = torch.empty(row_blocks * height, slices * rank_tile, dtype=x.dtype, device=x.device)
    parts = counters = None
    if splits > 1:
        parts = torch.empty(splits, *shrunk.shape, dtype=torch.float32, device=x.device)
        counters = lora.counters
        if counters is None:
            counters = new_counters(x.device)
    common = {"shrunk_ptr": shrunk, "slices": slices, "RANK": rank, "RANK_TILE": rank_tile}
    shrink = common | {
        "a_ptr": lora.a, "parts_ptr": parts, "shrink_counters_ptr": counters, "shrunk_rows": len(shrunk),
        "shrink_programs": splits * row_blocks * slices, "blocks_per_program": blocks_per_program, "splits": splits,
        "SHRINK_ROWS": height, "INTERPRET": not x.is_cuda,
    }  # fmt: skip
    first, second = (*lora.ends, n, n)[:2]
    return shrink, common | {"b_ptr": lora.b, "first_end": first, "second_end": second}


class Prologue(NamedTuple):
    """What the prologue leaves for the kernel of `nf4_scaled`."""

    x: Tensor  # [row tiles * rows per tile, K] float16, permuted, scaled and padded
    row_scale: Tensor  # [rows of x] float32, by which a row of x was divided
    partial: Tensor | None  # [splits, tiles, values per tile] float32, not written yet; None without splits
    counters: Tensor | None  # [tiles] int32 zeros; None without splits
    expand: dict[str, Any]  # arguments of the product's kernel for an adapter
    row_tiles: int
    grid: tuple[int, int]  # of the product's kernel


def prologue(
    x: Tensor, shape: tuple[int, int], tiles: Tiles, lora: Lora | None, gated: bool, multiprocessors: int
) -> Prologue:
    """Launch the prologue of `nf4_scaled` for x [rows, K] or, if it is gated, [rows, 2 K]."""
    n, k = shape
    row_tiles = triton.cdiv(len(x), tiles.rows)
    count = triton.cdiv(n, tiles.n) * row_tiles
    permuted = torch.empty(row_tiles * tiles.rows, k, dtype=torch.float16, device=x.device)
    row_scale = torch.empty(len(permuted), dtype=torch.float32, device=x.device)
    counters = partial = None
    if tiles.splits > 1:
        counters = torch.empty(count, dtype=torch.int32, device=x.device)
        partial = torch.empty(tiles.splits, count, tiles.n * tiles.rows, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(k)
    height = min(max(1, X_VALUES // width), tiles.rows)
    shrink, expand = lora_arguments(x, lora, len(permuted), tiles.rows, shape, multiprocessors)
    prologue_kernel[(shrink.get("shrink_programs", 0) + len(permuted) // height,)](
        x, permuted, row_scale, counters, x.stride(0), x.stride(1), k * x.stride(1) if gated else None, len(x), k,
        0 if counters is None else len(counters), X_ROWS=height, WIDTH=width, PDL=tiles.pdl, **shrink,
        num_warps=max(4, min(width // 1024, 16)), **tiles.launch,
    )  # fmt: skip
    return Prologue(permuted, row_scale, partial, counters, expand, row_tiles, (count, tiles.splits))


if triton is not None:
    from grpo_kernels.swiglu import gate_times_up

    _SHRINK_BLOCK = tl.constexpr(SHRINK_BLOCK)

    @triton.jit
    def power_of_two(exponent):
        """2 ** (exponent - 127) as float32, 1 <= exponent <= 254."""
        return (exponent << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def exponent_of(value):
        """127 + floor(log2(value)) of a float32 value >= 0, bounded to [15, 254].

        `power_of_two` can take both this number minus 14 and 268 minus this number."""
        return tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True) >> 23, 15), 254)

    @triton.jit
    def add_product(accumulator, left, right, INTERPRET: tl.constexpr):
        """accumulator + left right, in float32."""
        if INTERPRET:  # the interpreter's products of bfloat16 are wrong
            return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision="ieee")
        else:
            return tl.dot(left, right, accumulator)

    @triton.jit
    def _load_x(pointers, up_offset, mask):
        """x, zero outside mask. With an up_offset x is gate and up side by side: silu(gate) * up, as in `swiglu`."""
        x = tl.load(pointers, mask=mask, other=0.0)
        if up_offset is not None:
            x = gate_times_up(x, tl.load(pointers + up_offset, mask=mask, other=0.0))
        return x

    @triton.jit
    def _make_x(
        x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
        program, programs, X_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Permute, scale and pad X_ROWS rows of x, and set counters to zero.

        out[row, 128 b + 64 j + 16 i + 8 h + 2 t + e] = x[row, 128 b + 32 t + 16 j + 8 h + 2 i + e] in float16, zero in
        rows that pad. Each row is divided by a power of two, row_scale[row], that brings its largest |x| into
        [2^14, 2^15): this is exact for bfloat16 |x| above 2^-31 of the largest."""
        row = program * X_ROWS + tl.arange(0, X_ROWS)
        column = tl.arange(0, WIDTH)[None, :]
        pointers = x_ptr + row.to(tl.int64)[:, None] * row_stride + column * stride
        x = _load_x(pointers, up_offset, (column < columns) & (row < rows)[:, None])
        exponent = exponent_of(tl.max(tl.abs(x.to(tl.float32)), 1))
        tl.store(row_scale_ptr + row, power_of_two(exponent - 14))
        x = (x.to(tl.float32) * power_of_two(268 - exponent)[:, None]).to(tl.float16)
        x = tl.permute(tl.reshape(x, (X_ROWS, WIDTH // 128, 4, 2, 2, 4, 2)), (0, 1, 3, 5, 4, 2, 6))
        x = tl.reshape(x, (X_ROWS, WIDTH))
        tl.store(out_ptr + row.to(tl.int64)[:, None] * columns + column, x, mask=column < columns)
        if counters_ptr is not None:
            for start in range(program * 1024, counters, programs * 1024):
                index = start + tl.arange(0, 1024)
                tl.store(counters_ptr + index, tl.zeros((1024,), tl.int32), mask=index < counters)

    @triton.jit
    def _shrink(
        x_ptr, row_stride, stride, up_offset, rows, columns, a_ptr, parts_ptr, counters_ptr, shrunk_ptr, shrunk_rows,
        slices, blocks_per_program, splits, program,
        RANK: tl.constexpr, RANK_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
    ):  # fmt: skip
        """shrunk[row, slice * RANK_TILE + r] = x[row] A_slice[r]^T; zero where row or r pads.

        The programs that share a [ROWS, RANK_TILE] tile of it take blocks_per_program blocks of columns each; the last
        one to come adds up their parts."""
        slice_index = program % slices
        program = program // slices
        row_blocks = shrunk_rows // ROWS
        split = program // row_blocks
        row_block = program % row_blocks
        row = row_block * ROWS + tl.arange(0, ROWS)
        rank = tl.arange(0, RANK_TILE)
        column = tl.arange(0, BLOCK)
        x_pointers = x_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :] * stride
        a_pointers = a_ptr + (slice_index * RANK + rank)[None, :] * columns + column[:, None]
        s = tl.zeros((ROWS, RANK_TILE), tl.float32)
        for block in range(split * blocks_per_program, tl.minimum((split + 1) * blocks_per_program, columns // BLOCK)):
            x = _load_x(x_pointers + block * BLOCK * stride, up_offset, (row < rows)[:, None])
            a = tl.load(a_pointers + block * BLOCK, mask=(rank < RANK)[None, :], other=0.0)
            s = add_product(s, x, a, INTERPRET)
        inner = row[:, None] * (slices * RANK_TILE) + (slice_index * RANK_TILE + rank)[None, :]
        last_one = True
        if parts_ptr is not None:
            step = shrunk_rows * slices * RANK_TILE
            tl.store(parts_ptr + split * step + inner, s)
            tl.debug_barrier()  # the whole part must be written before the counter says so
            counter = counters_ptr + row_block * slices + slice_index
            last_one = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
            if last_one:
                tl.store(counter, 0)
                s = tl.zeros((ROWS, RANK_TILE), tl.float32)
                for first in range(0, splits, 8):
                    for i in tl.static_range(8):
                        parts = parts_ptr + (first + i) * step + inner
                        s += tl.load(parts, mask=first + i < splits, other=0.0, cache_modifier=".cg")
        if last_one:
            tl.store(shrunk_ptr + inner, s.to(shrunk_ptr.dtype.element_ty))

    @triton.jit(
        do_not_specialize=[
            "rows",
            "counters",
            "shrink_programs",
            "shrunk_rows",
            "slices",
            "blocks_per_program",
            "splits",
        ]
    )
    def prologue_kernel(
        x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
        X_ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
        a_ptr=None, parts_ptr=None, shrink_counters_ptr=None, shrunk_ptr=None, shrink_programs=None, shrunk_rows=None,
        slices=None, blocks_per_program=None, splits=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0, SHRINK_ROWS: tl.constexpr = 0,
        INTERPRET: tl.constexpr = False,
    ):  # fmt: skip
        """Compute what the product needs of x: the first programs an adapter's x A^T (`_shrink`), the others `_make_x`.

        Without out_ptr there is only x A^T: the kernel for few rows reads x itself, before it waits for this one."""
        if PDL:
            if out_ptr is not None:
                gdc_launch_dependents()
            gdc_wait()
            if out_ptr is None:
                gdc_launch_dependents()  # only now: the product reads x, which the kernel ahead of this one writes
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        if a_ptr is not None:
            if program < shrink_programs:
                _shrink(
                    x_ptr, row_stride, stride, up_offset, rows, columns, a_ptr, parts_ptr, shrink_counters_ptr,
                    shrunk_ptr, shrunk_rows, slices, blocks_per_program, splits, program,
                    RANK, RANK_TILE, SHRINK_ROWS, _SHRINK_BLOCK, INTERPRET,
                )  # fmt: skip
            program -= shrink_programs
            programs -= shrink_programs
        if out_ptr is not None:  # noqa: SIM102, since this condition is known at compile time
            if program >= 0:
                _make_x(
                    x_ptr, out_ptr, row_scale_ptr, counters_ptr, row_stride, stride, up_offset, rows, columns, counters,
                    program, programs, X_ROWS, WIDTH,
                )  # fmt: skip

    @triton.jit
    def prefetch_adapter(b_ptr, n, RANK: tl.constexpr, RANK_TILE: tl.constexpr):
        """Prefetch B's rows n into the L2 cache, by sectors of 32 bytes."""
        sector = tl.minimum(tl.arange(0, RANK_TILE // 16) * 16, RANK - 1)
        pointers = b_ptr + n.to(tl.int64)[:, None] * RANK + sector[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip

    @triton.jit
    def adapter_operands(
        b_ptr, shrunk_ptr, slices, first_end, second_end, n_start, n, row, low,
        RANK: tl.constexpr, RANK_TILE: tl.constexpr, PART: tl.constexpr,
    ):  # fmt: skip
        """Ranks low to low + PART of B's rows n, [N_TILE, PART], and of x A^T, [PART, ROW_TILE]."""
        slice_index = (n_start >= first_end).to(tl.int32) + (n_start >= second_end).to(tl.int32)
        rank = low + tl.arange(0, PART)
        pointers = shrunk_ptr + row[None, :] * (slices * RANK_TILE) + (slice_index * RANK_TILE + rank)[:, None]
        s = tl.load(pointers, cache_modifier=".cg")
        b = tl.load(b_ptr + n.to(tl.int64)[:, None] * RANK + rank[None, :], mask=(rank < RANK)[None, :], other=0.0)
        return b, s
