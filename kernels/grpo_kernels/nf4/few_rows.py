"""`nf4_linear` for up to 16 rows of x: a program computes 16 columns of y, and its warps share the sum over k.

Each warp streams blocks of columns of 16 rows of W. The codes go from memory straight to the registers of the lane that
decodes them, so nothing is staged in shared memory, and the warps meet only to add up their sums. x is read as it is,
through the L1 cache. One mma.m16n8k16 multiplies 16 rows of W by 8 rows of x; README.md has the drawing."""

from typing import Any

import torch
from torch import Tensor

from grpo_kernels.nf4.dequantize import NestedAbsmax, scale_arguments
from grpo_kernels.nf4.lookup import TABLE_SCALE, lookup_lines, lookup_table
from grpo_kernels.nf4.prologue import Lora, lora_arguments
from grpo_kernels.nf4.tiles import Tiles

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton on macOS
    triton = None

PREFETCH_PROGRAMS, PREFETCH_BYTES = 256, 12 << 20
"""number of programs, the last ones, that prefetch codes of the next product into the L2 cache, and number of bytes in
all: what an H100 can read while a norm and the next product's prologue leave its memory idle, and its L2 cache holds"""


def nf4_few_rows(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None,
    tiles: Tiles,
    lora: Lora | None,
    gated: bool,
    multiprocessors: int,
    prefetch_next: Tensor | None = None,
) -> Tensor:
    """`nf4_linear` by the kernel for few rows: x [rows <= 16, K] in 16 bits -> [rows, N] in x's dtype.

    tiles: those of `choose_tiles`. lora: an adapter that `lora_fits`. gated: whether the rows of W are gate and up, so
    that silu(gate) * up, [rows, N / 2], is returned. multiprocessors: number of the device's multiprocessors, to which
    the split sum of x A^T is adapted. prefetch_next: as for `nf4_linear`."""
    n, k = shape
    y = torch.empty(len(x), n // 2 if gated else n, dtype=x.dtype, device=x.device)
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    shrink, expand = lora_arguments(x, lora, len(x), 16, shape, multiprocessors)
    programs = triton.cdiv(n, tiles.n)
    prefetch: dict[str, Any] = {}
    if prefetch_next is not None and tiles.pdl and prefetch_next.data_ptr() % 16 == 0:  # pdl: only on Hopper
        prefetchers = min(programs, PREFETCH_PROGRAMS)
        size = min(prefetch_next.numel(), PREFETCH_BYTES) // prefetchers // 16 * 16
        prefetch = {"next_ptr": prefetch_next, "next_bytes": size, "first_prefetcher": programs - prefetchers}
    if lora is not None:
        prologue_kernel[(shrink["shrink_programs"],)](
            x, None, None, None, x.stride(0), x.stride(1), None, len(x), k, 0,
            X_ROWS=1, WIDTH=1, PDL=tiles.pdl, **shrink, num_warps=4, **tiles.launch,
        )  # fmt: skip
    _few_rows_kernel[(programs,)](
        x, packed.view(-1).view(torch.int16), *scale_arguments(absmax), bias, y, lookup_table(x),
        len(x), x.stride(0), n, k, 1 / TABLE_SCALE[x.dtype],
        NESTED=isinstance(absmax, NestedAbsmax), WARPS=tiles.warps, COLUMNS=tiles.rows // 8, GATED=gated,
        PDL=tiles.pdl, INTERPRET=not x.is_cuda, **expand, **prefetch,
        num_warps=tiles.warps, num_stages=1, **tiles.options,
    )  # fmt: skip
    return y


def block_ptx(dtype: torch.dtype, columns: int) -> str:
    """PTX of a warp: 16 rows of W times 8 * columns rows of x over a block of 64 along k, by 4 * columns mma.m16n8k16.

    Lane 4 g + t holds the codes of k = 16 t to 16 t + 15 for the rows g and g + 8 of W, and x at these k for the rows
    g, g + 8, ... of x. A sum over k may be taken in any order, so it does not matter which k meet in one mma, as long
    as they are the same in W and x: nothing needs to be shuffled between lanes.

    Operands: 4 * columns sums (the C fragments); the codes of the two rows, 64 bits each; x, 4 * columns times 64 bits;
    the five `lookup_constants`."""
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
            lines += lookup_lines(dtype, f"w{2 * row + half}", out, constants)
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


if triton is not None:
    from grpo_kernels.nf4.lookup import load_constants
    from grpo_kernels.nf4.prologue import adapter_operands, add_product, prefetch_adapter, prologue_kernel
    from grpo_kernels.swiglu import gate_times_up

    _BLOCK_BF16_1 = tl.constexpr(block_ptx(torch.bfloat16, 1))
    _BLOCK_BF16_2 = tl.constexpr(block_ptx(torch.bfloat16, 2))
    _BLOCK_FP16_1 = tl.constexpr(block_ptx(torch.float16, 1))
    _BLOCK_FP16_2 = tl.constexpr(block_ptx(torch.float16, 2))
    _OPERANDS_1 = tl.constexpr(",".join(["=f"] * 4 + ["l"] * 6 + ["r"] * 5))
    _OPERANDS_2 = tl.constexpr(",".join(["=f"] * 8 + ["l"] * 10 + ["r"] * 5))
    _SPREAD_0, _SPREAD_1, _SPREAD_2, _SPREAD_3 = (
        tl.constexpr(f"shfl.sync.idx.b32 $0, $1, {i}, 0x1c1f, 0xffffffff;") for i in range(4)
    )

    @triton.jit
    def _spread(scale, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
        """[lanes]: in each four lanes that share a row, the scale that lane BLOCK of the four holds."""
        if INTERPRET:
            fours = tl.reshape(scale, (scale.shape[0] // 4, 4))
            one = tl.sum(tl.where(tl.arange(0, 4)[None, :] == BLOCK, fours, 0.0), 1)
            return tl.reshape(tl.broadcast_to(one[:, None], fours.shape), scale.shape)
        else:
            low: tl.constexpr = _SPREAD_0 if BLOCK == 0 else _SPREAD_1
            high: tl.constexpr = _SPREAD_2 if BLOCK == 2 else _SPREAD_3
            PTX: tl.constexpr = low if BLOCK < 2 else high
            return tl.inline_asm_elementwise(PTX, "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _fence(value, INTERPRET: tl.constexpr):
        """Warp barrier that returns value: it keeps the loads above it from being sunk to their first use."""
        if INTERPRET:
            return value
        else:
            return tl.inline_asm_elementwise(
                "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
            )

    @triton.jit
    def _load_x(pointers):
        """A lane's 16 values of x as four int64 of four values each."""
        quads = pointers.to(tl.pointer_type(tl.int64), bitcast=True)[:, None] + tl.arange(0, 2)[None, :]
        x0, x1 = tl.split(tl.load(quads))
        x2, x3 = tl.split(tl.load(quads + 2))
        return x0, x1, x2, x3

    @triton.jit
    def _interpreted_block(codes, x_pointers, table_ptr, WARPS: tl.constexpr):
        """What `block_ptx` computes of eight rows of W and eight of x, for the interpreter: two of the four sums."""
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
        COLUMNS: tl.constexpr, WARPS: tl.constexpr, INTERPRET: tl.constexpr,
    ):  # fmt: skip
        """The sums over a block of 64 along k, eight [lanes]; if COLUMNS is 1, the last four only fill the tuple."""
        if INTERPRET:
            d0, d1 = _interpreted_block(codes_g, x_pointers, table_ptr, WARPS)
            d2, d3 = _interpreted_block(codes_h, x_pointers, table_ptr, WARPS)
            if COLUMNS == 2:
                d4, d5 = _interpreted_block(codes_g, x_pointers + x_step, table_ptr, WARPS)
                d6, d7 = _interpreted_block(codes_h, x_pointers + x_step, table_ptr, WARPS)
                return d0, d1, d2, d3, d4, d5, d6, d7
            else:
                return d0, d1, d2, d3, d0, d1, d2, d3
        else:
            BF16: tl.constexpr = x_pointers.dtype.element_ty == tl.bfloat16
            x0, x1, x2, x3 = _load_x(x_pointers)
            c0, c1, c2, c3, c4 = constants
            if COLUMNS == 2:
                x4, x5, x6, x7 = _load_x(x_pointers + x_step)
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
        """A lane's codes of four blocks, 64 bits each; loaded past the L1 cache, in which they would displace x."""
        return (
            tl.load(pointers, cache_modifier=".cg"), tl.load(pointers + 4, cache_modifier=".cg"),
            tl.load(pointers + 8, cache_modifier=".cg"), tl.load(pointers + 12, cache_modifier=".cg"),
        )  # fmt: skip

    @triton.jit
    def _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block, NESTED: tl.constexpr):
        """What `_scale` needs from memory for the scale of a block."""
        absmax = tl.load(absmax_ptr + block)
        if NESTED:
            outer = block // 256
            return absmax, tl.load(outer_ptr + outer), tl.load(offset_ptr + outer * offset_stride)
        else:
            return absmax, absmax, absmax

    @triton.jit
    def _scale(raw, code_ptr, NESTED: tl.constexpr):
        """The scale of a block, its absmax, in float32."""
        absmax, outer, offset = raw
        if NESTED:
            return tl.load(code_ptr + absmax) * outer + offset
        else:
            return absmax.to(tl.float32)

    @triton.jit
    def _tile_of(s0, s1, s2, s3, WARPS: tl.constexpr):
        """[16, 8]: the C fragments of all warps as a tile, summed over the warps."""
        tile = tl.reshape(tl.join(tl.join(s0, s1), tl.join(s2, s3)), (WARPS, 8, 4, 2, 2))  # g, t, column, row
        return tl.sum(tl.reshape(tl.permute(tile, (0, 4, 1, 2, 3)), (WARPS, 16, 8)), 0)

    @triton.jit
    def _prefetch(address, size):
        """One thread prefetches size bytes, a multiple of 16, from address on into the L2 cache."""
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
            "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [address.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit(
        do_not_specialize=[
            "rows", "slices", "first_end", "second_end", "next_bytes", "first_prefetcher",
        ]
    )  # fmt: skip
    def _few_rows_kernel(
        x_ptr, packed_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, bias_ptr, y_ptr, table_ptr,
        rows, row_stride, N, K, factor,
        NESTED: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
        INTERPRET: tl.constexpr,
        b_ptr=None, shrunk_ptr=None, slices=None, first_end=None, second_end=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0,
        next_ptr=None, next_bytes=None, first_prefetcher=None,
    ):  # fmt: skip
        """16 columns of y for up to 8 * COLUMNS rows of x.

        The WARPS warps take turns along k, four blocks of 64 at a time, and meet only to add up their sums. If GATED,
        the columns are 8 of y's first half and the same 8 of its second, and silu(first) * second is stored.

        packed_ptr: int16, but read as int64, each element 16 codes. next_ptr: codes that the programs from
        first_prefetcher on prefetch, next_bytes each."""
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
        codes = packed_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
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
            prefetch_adapter(b_ptr, n, RANK, RANK_TILE)
        # Warps past the end of K read their last blocks again; their scale is zero, so that they add nothing.
        scale_g = tl.where(warp < steps, _scale(raw_g, code_ptr, NESTED), 0.0)
        scale_h = tl.where(warp < steps, _scale(raw_h, code_ptr, NESTED), 0.0)
        if PDL and b_ptr is None:
            gdc_wait()  # only now: what was read so far is never written, so it needed no waiting

        # Rows beyond the last one of x repeat it: their sums are columns of the tile that are not stored.
        x_row = tl.minimum(g, rows - 1)
        x_g = x_ptr + x_row.to(tl.int64) * row_stride + t * 16
        x_step = (tl.minimum(g + 8, rows - 1) - x_row) * row_stride
        constants = load_constants(table_ptr, INTERPRET)
        s0 = tl.zeros((32 * WARPS,), tl.float32)
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        for _ in range(turns):
            now_g, now_h, own_g, own_h = next_g, next_h, scale_g, scale_h
            x_now = x_g + step * 256
            next_step = step + WARPS
            step = tl.minimum(next_step, steps - 1)
            next_g = _codes(codes_g + step * 16)
            next_h = _codes(codes_h + step * 16)
            raw_g = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block_g + step * 4, NESTED)
            raw_h = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block_h + step * 4, NESTED)
            step = _fence(step, INTERPRET)
            for i in tl.static_range(4):
                d0, d1, d2, d3, d4, d5, d6, d7 = _block(
                    now_g[i], now_h[i], x_now + i * 64, x_step, table_ptr, constants, COLUMNS, WARPS, INTERPRET
                )
                f_g = _spread(own_g, i, INTERPRET)
                f_h = _spread(own_h, i, INTERPRET)
                s0 += d0 * f_g
                s1 += d1 * f_g
                s2 += d2 * f_h
                s3 += d3 * f_h
                if COLUMNS == 2:
                    s4 += d4 * f_g
                    s5 += d5 * f_g
                    s6 += d6 * f_h
                    s7 += d7 * f_h
            scale_g = tl.where(next_step < steps, _scale(raw_g, code_ptr, NESTED), 0.0)
            scale_h = tl.where(next_step < steps, _scale(raw_h, code_ptr, NESTED), 0.0)

        if next_ptr is not None:  # by now this program's own codes have come
            place = tl.program_id(0) - first_prefetcher
            if place >= 0 and next_bytes > 0:
                _prefetch(next_ptr + place.to(tl.int64) * next_bytes, next_bytes)
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
            # Round here, because the trainer rounds the base product before it adds the adapter's.
            y = y.to(DTYPE).to(tl.float32)
            for low in tl.static_range(0, RANK_TILE, 16):
                b, s = adapter_operands(
                    b_ptr, shrunk_ptr, slices, first_end, second_end, start, n, row, low, RANK, RANK_TILE, 16
                )  # fmt: skip
                if GATED:  # gate and up may be two slices of the adapter
                    y = add_product(y, tl.where((local < 8)[:, None], b, 0.0), s, INTERPRET)
                    b, s = adapter_operands(
                        b_ptr, shrunk_ptr, slices, first_end, second_end, start + apart, n, row, low, RANK, RANK_TILE,
                        16,
                    )  # fmt: skip
                    b = tl.where((local < 8)[:, None], 0.0, b)
                y = add_product(y, b, s, INTERPRET)
        y = y.to(DTYPE)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, (2, 8, 8 * COLUMNS)), (1, 2, 0)))
            y = gate_times_up(gate, up)
        column = start + tl.arange(0, 8 if GATED else 16)
        inside = (row < rows)[None, :] & (column < width)[:, None]
        tl.store(y_ptr + row.to(tl.int64)[None, :] * width + column[:, None], y, mask=inside)
