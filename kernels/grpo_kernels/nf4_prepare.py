"""What a product on 4-bit weights needs made from x, by one kernel ahead of it, and an adapter's part in both.

x is permuted along k as the tiles of codes are, padded, scaled if asked. A LoRA adapter costs no launch: x A^T is made
beside the permuted x, in fp32 parts over k without atomics. The program that writes a tile of y adds the parts, rounds
them to x's dtype, and adds their product with its rows of B to the tile."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.nf4_tiles import Tiles

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton on macOS
    triton = None


class Lora(NamedTuple):
    """An adapter: to y's first columns is added x A_0^T B_0^T, to the next slice of them x A_1^T B_1^T, ..."""

    a: Tensor  # [slices * rank, K] contiguous, x's dtype: the slices' A one below the other
    b: Tensor  # [N, rank] contiguous, x's dtype, the scaling (alpha / rank) multiplied in
    ends: tuple[int, ...]  # the row of W at which each slice ends, the last N: (N,), or (4096, 5120, 6144) for q, k, v

    def slices(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of W, A [rank, K] and B [rows, rank] of each slice."""
        for a, (start, end) in zip(self.a.chunk(len(self.ends)), itertools.pairwise((0, *self.ends))):
            yield slice(start, end), a, self.b[start:end]


FUSED_RANK = 64
"""the largest adapter that the fused kernel adds"""
SHRINK_BLOCK = 128
"""columns of x that a step of the product with A takes"""


def lora_fits(lora: Lora, n_tile: int) -> bool:
    """Whether the fused kernel can add it: a tile of W's rows lies in one slice, and the rank in registers."""
    return lora.b.shape[1] <= FUSED_RANK and len(lora.ends) <= 3 and not any(end % n_tile for end in lora.ends[:-1])


def _shrink_splits(tiles: int, rows: int, k: int, rank: int, multiprocessors: int) -> tuple[int, int]:
    """(blocks of columns a program, programs that share the sum over k) for x A^T. tiles: row blocks times slices.

    512 columns a program, so that it is about as short as the permutation beside it, but no more parts than the
    programs of the product, which each read all parts of their rows (a tile of so many), can spare: few percent of
    what they read of x."""
    blocks = k // SHRINK_BLOCK
    most = max(2, k // (max(32, rows // 4) * rank))
    splits = max(1, min(-(-blocks // 4), 16, most, 2 * multiprocessors // tiles))
    share = -(-blocks // splits)
    return share, -(-blocks // share)


def lora_arguments(
    x: Tensor, lora: Lora | None, rows: int, row_tile: int, shape: tuple[int, int], multiprocessors: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What x A^T takes of a kernel's arguments, and what adding its product with B takes; x is padded to rows."""
    if lora is None:
        return {}, {}
    n, k = shape
    rank, slices = lora.b.shape[1], len(lora.ends)
    rank_tile = max(16, triton.next_power_of_2(rank))
    height = 32 if row_tile > 16 and rank_tile <= 32 else 16
    row_blocks = triton.cdiv(rows, height)
    share, splits = _shrink_splits(row_blocks * slices, row_tile, k, rank_tile, multiprocessors)
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


class Prepared(NamedTuple):
    x: Tensor  # [row tiles * rows of one, K], permuted and padded
    row_scale: Tensor | None  # [rows of x] float32, of scaled tiles
    partial: Tensor | None  # [splits, tiles, values of one] float32, not written yet
    counters: Tensor | None  # [tiles] int32, zero
    expand: dict[str, Any]  # of the product's kernel, for an adapter
    row_tiles: int
    grid: tuple[int, int]  # of the product's kernel


def prepare(
    x: Tensor, shape: tuple[int, int], tiles: Tiles, lora: Lora | None, gated: bool, multiprocessors: int
) -> Prepared:
    """What a product in tiles needs of x [rows, K] or, gated, [rows, 2 K]: launches `prepare_kernel`."""
    n, k = shape
    row_tiles = triton.cdiv(len(x), tiles.rows)
    count = triton.cdiv(n, tiles.n) * row_tiles
    dtype = torch.float16 if tiles.scaled else x.dtype
    permuted = torch.empty(row_tiles * tiles.rows, k, dtype=dtype, device=x.device)
    row_scale = counters = partial = None
    if tiles.scaled:
        row_scale = torch.empty(len(permuted), dtype=torch.float32, device=x.device)
    if tiles.splits > 1:
        counters = torch.empty(count, dtype=torch.int32, device=x.device)
        partial = torch.empty(tiles.splits, count, tiles.n * tiles.rows, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(k) if tiles.scaled else 1024
    grid: tuple[int, ...] = (len(permuted), triton.cdiv(k, width))
    shrink, expand = lora_arguments(x, lora, len(permuted), tiles.rows, shape, multiprocessors)
    if lora is not None:
        grid = (shrink["shrink_programs"] + grid[0] * grid[1],)
    prepare_kernel[grid](
        x, permuted, row_scale, counters, x.stride(0), x.stride(1), k * x.stride(1) if gated else None, len(x), k,
        0 if counters is None else len(counters), WIDTH=width, PDL=tiles.pdl, **shrink,
        num_warps=max(4, min(width // 1024, 16)), **tiles.launch,
    )  # fmt: skip
    return Prepared(permuted, row_scale, partial, counters, expand, row_tiles, (count, tiles.splits))


if triton is not None:
    from grpo_kernels.swiglu import gate_times_up

    _SHRINK_BLOCK = tl.constexpr(SHRINK_BLOCK)

    @triton.jit
    def power_of_two(exponent):
        """2 ** (exponent - 127) as float32, 1 <= exponent <= 254."""
        return (exponent << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def exponent_of(value):
        """Of float32 value >= 0: 127 + floor(log2(value)), within [15, 254], so that 14 less or 268 less it is one."""
        return tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True) >> 23, 15), 254)

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

        A program takes WIDTH columns of a row, one of column_blocks such blocks. With row_scale_ptr, for `nf4_scaled`:
        out[row, 128 b + 64 j + 16 i + 8 h + 2 t + e] = x[row, 128 b + 32 t + 16 j + 8 h + 2 i + e]; out is float16, and
        a row is divided by a power of two, kept there, that brings its largest |x| into [2^14, 2^15): exact for
        bfloat16 |x| above 2^-31 of it. A program then takes a whole row."""
        column = block * WIDTH + tl.arange(0, WIDTH)
        inside = column < columns
        x = _load_x(x_ptr + row.to(tl.int64) * row_stride + column * stride, up_offset, inside & (row < rows))
        if row_scale_ptr is not None:
            exponent = exponent_of(tl.max(tl.abs(x.to(tl.float32)), 0))
            tl.store(row_scale_ptr + row, power_of_two(exponent - 14))
            x = (x.to(tl.float32) * power_of_two(268 - exponent)).to(tl.float16)
        if row_scale_ptr is None:
            x = tl.permute(tl.reshape(x, (WIDTH // 64, 8, 4, 2)), (0, 2, 1, 3))
        else:
            x = tl.permute(tl.reshape(x, (WIDTH // 128, 4, 2, 2, 4, 2)), (0, 2, 4, 3, 1, 5))
        x = tl.reshape(x, (WIDTH,))
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
    def prepare_kernel(
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
    def prefetch(pointers):
        """What pointers point to on its way to the L2 cache."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip

    @triton.jit
    def prefetch_adapter(b_ptr, n, RANK: tl.constexpr, RANK_TILE: tl.constexpr):
        """B's rows n likewise, by sectors of 32 bytes."""
        sector = tl.minimum(tl.arange(0, RANK_TILE // 16) * 16, RANK - 1)
        prefetch(b_ptr + n.to(tl.int64)[:, None] * RANK + sector[None, :])

    @triton.jit
    def adapter_operands(
        b_ptr, shrunk_ptr, shrunk_rows, shrink_splits, slices, first_end, second_end, n_start, n, row, low,
        DTYPE: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr, PART: tl.constexpr,
    ):  # fmt: skip
        """Columns low to low + PART of B, [N_TILE, PART], and of the sum s of the parts of x A^T, rounded to DTYPE:
        [PART, ROW_TILE]."""
        slice_index = (n_start >= first_end).to(tl.int32) + (n_start >= second_end).to(tl.int32)
        step = shrunk_rows.to(tl.int64) * slices * RANK_TILE
        MANY: tl.constexpr = 4 if PART == RANK_TILE else 2
        AT_ONCE: tl.constexpr = min(8, 256 // row.shape[0]) if row.shape[0] <= 64 else MANY  # more loads would spill
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
    def add_expanded(y, b, s, EMULATED: tl.constexpr):
        """y + B s^T, [N_TILE, ROW_TILE] float32."""
        if EMULATED:
            return tl.dot(b.to(tl.float32), s.to(tl.float32), y, input_precision="ieee")
        else:
            return tl.dot(b, s, y)
