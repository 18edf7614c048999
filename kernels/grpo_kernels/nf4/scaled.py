"""`nf4_linear` for 17 to 256 rows of bfloat16 x, on Hopper: the weights are scaled before the product.

What limits this product is neither memory nor the tensor cores, but how long a program waits between two products of
tiles: for codes, for scales, and for decoding them, about 2.5 integer instructions per weight. So nothing is left to do
between two products (README.md has the drawings):

- The tensor memory accelerator (TMA) copies x, in float16, to shared memory, with one instruction per tile.
- Codes and scales go from global memory straight to the registers of the thread that decodes them, an iteration ahead.
  Of 128 codes of a row, each of the four threads that share it loads 32 at once, all of which have the same scale.
  Along k these codes are not where a tensor core expects them; the prologue permutes x alike, which changes no sum.
- While a product runs, the weights of the next one are decoded, across iterations too.

A weight is table[code] times the scale of its block, in float16, and sums are in fp32. Scales that multiply the sums
of 64 terms instead would need a second set of sums. The rows of x are divided by a power of two each, and the rows of
W by one that brings the bound of their scales into [2^14, 2^15), so that nothing leaves the range of float16. Table,
scale and their product are each rounded to float16: an error of 2.9e-4 together, where bfloat16 weights have 1.7e-3.
"""

import torch
from torch import Tensor

from grpo_kernels.nf4.dequantize import NestedAbsmax, scale_arguments
from grpo_kernels.nf4.lookup import TABLE_SCALE, lookup_lines, lookup_table
from grpo_kernels.nf4.prologue import Lora, prologue
from grpo_kernels.nf4.tiles import Tiles

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton on macOS
    triton = None


def nf4_scaled(
    x: Tensor,
    packed: Tensor,
    absmax: NestedAbsmax,
    shape: tuple[int, int],
    bias: Tensor | None,
    tiles: Tiles,
    lora: Lora | None,
    gated: bool,
    multiprocessors: int,
) -> Tensor:
    """`nf4_linear` for x [rows, K] or, if it is gated, [rows, 2 K]; packed must begin at a multiple of 16 bytes.

    tiles: those of `choose_tiles`. lora: an adapter that `lora_fits`. multiprocessors: as for `nf4_few_rows`."""
    n, k = shape
    ready = prologue(x, shape, tiles, lora, gated, multiprocessors)
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    _scaled_kernel[ready.grid](
        TensorDescriptor.from_tensor(ready.x, [tiles.rows, 64]), packed.view(-1), *scale_arguments(absmax), bias, y,
        ready.partial, ready.counters, ready.row_scale, lookup_table(ready.x),
        len(x), n, k, ready.row_tiles, 1 / TABLE_SCALE[torch.float16],
        SPLIT=tiles.splits > 1, N_TILE=tiles.n, ROW_TILE=tiles.rows, PDL=tiles.pdl, INTERPRET=not x.is_cuda,
        **ready.expand,
        num_warps=tiles.warps, num_stages=tiles.stages, **tiles.options,
    )  # fmt: skip
    return y


def scaled_lookup_ptx() -> str:
    """PTX that looks up the eight codes in $4 in float16 and multiplies them by the scale that both halves of $5 hold.

    The results are pairs in $0 to $3, in the order of `lookup_lines`; `lookup_constants` are in $6 to $10."""
    out = [f"${i}" for i in range(4)]
    lines = lookup_lines(torch.float16, "$4", out, [f"${6 + i}" for i in range(5)])
    # $5 is copied, as an output may share its register.
    lines = ["mov.b32 t, $5;", *lines, *(f"mul.rn.f16x2 {pair}, {pair}, t;" for pair in out)]
    return "{ .reg .b32 m, s, p, q, a, b, c, d, t;\n" + "\n".join(lines) + "\n}"


if triton is not None:
    from grpo_kernels.nf4.epilogue import epilogue
    from grpo_kernels.nf4.lookup import load_constants
    from grpo_kernels.nf4.prologue import add_product, exponent_of, power_of_two, prefetch_adapter

    _LOOKUP = tl.constexpr(scaled_lookup_ptx())
    _LOOKUP_OPERANDS = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 7))
    _UNPACK = tl.constexpr("mov.b32 {$0, $1}, $2;")
    _LOAD_FLOAT = tl.constexpr("ld.global.nc.f32 $0, [$1];")
    _LOAD_BYTE = tl.constexpr("{ .reg .b16 h; ld.global.nc.u8 h, [$1]; cvt.u32.u16 $0, h; }")
    _LOAD_CODES = tl.constexpr("ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")

    # The loads are in PTX, since Triton gives tl.load a layout of its own: the values would go through shared memory to
    # the threads that need them, with all warps waiting for each other.
    @triton.jit
    def _load_float(pointers, INTERPRET: tl.constexpr):
        if INTERPRET:
            return tl.load(pointers)
        else:
            return tl.inline_asm_elementwise(
                _LOAD_FLOAT, "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
            )

    @triton.jit
    def _load_byte(pointers, INTERPRET: tl.constexpr):
        if INTERPRET:
            return tl.load(pointers).to(tl.int32)
        else:
            return tl.inline_asm_elementwise(
                _LOAD_BYTE, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
            )

    @triton.jit
    def _load_codes(pointers, INTERPRET: tl.constexpr):
        """The 32 codes from each pointer to bytes on: four int32 tensors, each element eight codes."""
        if INTERPRET:
            pointers = pointers.to(tl.pointer_type(tl.int32), bitcast=True)
            return tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3)
        else:
            return tl.inline_asm_elementwise(
                _LOAD_CODES, "=r,=r,=r,=r,l", [pointers.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip

    @triton.jit
    def _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block, t, INTERPRET: tl.constexpr):
        """[N_TILE, 4]: what `_scale` needs from memory; threads t = 0, 1 need block (which is even), 2, 3 block + 1."""
        outer = block // 256
        return (
            _load_byte(absmax_ptr + block + t // 2, INTERPRET),
            _load_float(outer_ptr + outer, INTERPRET),
            _load_float(offset_ptr + outer * offset_stride, INTERPRET),
        )

    @triton.jit
    def _scale(raw, code_ptr, column_scale, INTERPRET: tl.constexpr):
        """[N_TILE, 4] int32: the scale of a thread's block times column_scale, as float16 in both halves."""
        code, outer, offset = raw
        scale = (_load_float(code_ptr + code, INTERPRET) * outer + offset) * column_scale
        scale = scale.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        return scale | (scale << 16)

    @triton.jit
    def _interpreted_pair(codes, scale, table_ptr, BYTE: tl.constexpr):
        even = (tl.load(table_ptr + ((codes >> (8 * BYTE + 4)) & 15)) * scale).to(tl.float16)
        odd = (tl.load(table_ptr + ((codes >> (8 * BYTE)) & 15)) * scale).to(tl.float16)
        even = even.to(tl.uint16, bitcast=True).to(tl.int32)
        return even | (odd.to(tl.uint16, bitcast=True).to(tl.int32) << 16)

    @triton.jit
    def _decode(codes, scale, table_ptr, constants, INTERPRET: tl.constexpr):
        """[N_TILE, 4] int32 of eight codes each -> four [N_TILE, 4] int32, each a pair of scaled float16 weights."""
        if INTERPRET:
            value = (scale & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            return (
                _interpreted_pair(codes, value, table_ptr, 0), _interpreted_pair(codes, value, table_ptr, 1),
                _interpreted_pair(codes, value, table_ptr, 2), _interpreted_pair(codes, value, table_ptr, 3),
            )  # fmt: skip
        else:
            c0, c1, c2, c3, c4 = constants
            return tl.inline_asm_elementwise(
                _LOOKUP, _LOOKUP_OPERANDS, [codes, scale, c0, c1, c2, c3, c4],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip

    @triton.jit
    def _unpacked(pairs, INTERPRET: tl.constexpr):
        """[N_TILE, 4, 2] float16, of int32 pairs; this takes no instruction."""
        if INTERPRET:
            even = (pairs & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
            odd = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        else:
            even, odd = tl.inline_asm_elementwise(
                _UNPACK, "=h,=h,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
            )
        return tl.join(even, odd)

    @triton.jit
    def _operand(first, second, INTERPRET: tl.constexpr):
        """The weights of two int32 of codes per thread as the operand [N_TILE, 64] of a product.

        Pair i of thread t is at 16 i + 8 h + 2 t, h = 0 for the first int32 and 1 for the second: there a tensor core
        expects the values that thread t holds."""
        a0, a1, a2, a3 = first
        b0, b1, b2, b3 = second
        pair0 = tl.join(_unpacked(a0, INTERPRET), _unpacked(b0, INTERPRET))  # [N_TILE, t, even or odd, h]
        pair1 = tl.join(_unpacked(a1, INTERPRET), _unpacked(b1, INTERPRET))
        pair2 = tl.join(_unpacked(a2, INTERPRET), _unpacked(b2, INTERPRET))
        pair3 = tl.join(_unpacked(a3, INTERPRET), _unpacked(b3, INTERPRET))
        pairs = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
        return tl.reshape(tl.permute(pairs, (0, 4, 5, 3, 1, 2)), (a0.shape[0], 64))

    @triton.jit
    def _opaque(value, INTERPRET: tl.constexpr):
        """value through an empty asm statement: no instruction, but the compiler takes the result for a new value."""
        if INTERPRET:
            return value
        else:
            return tl.inline_asm_elementwise("", "=r,0", [value], dtype=value.dtype, is_pure=True, pack=1)

    @triton.jit
    def _largest_scale(code_ptr, outer_ptr, offset_ptr, offset_stride, n, blocks):
        """[N_TILE] float32: bounds of the scales of W's rows n, from the second-level scales alone."""
        code = tl.max(tl.abs(tl.load(code_ptr + tl.arange(0, 256))), 0)
        first = n * blocks // 256
        last = (n * blocks + blocks - 1) // 256
        bound = tl.zeros(n.shape, tl.float32)
        for i in range(0, blocks // 256 + 2):
            index = tl.minimum(first + i, last)
            offset = tl.load(offset_ptr + index * offset_stride)
            bound = tl.maximum(bound, code * tl.abs(tl.load(outer_ptr + index)) + tl.abs(offset))
        return bound

    @triton.jit(  # one compiled kernel for all batch sizes, and for all products of a model
        do_not_specialize=["rows", "row_tiles", "slices", "first_end", "second_end"]
    )
    def _scaled_kernel(
        x_desc, packed_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, bias_ptr, y_ptr, partial_ptr,
        counters_ptr, row_scale_ptr, table_ptr,
        rows, N, K, row_tiles, factor,
        SPLIT: tl.constexpr, N_TILE: tl.constexpr, ROW_TILE: tl.constexpr, PDL: tl.constexpr, INTERPRET: tl.constexpr,
        b_ptr=None, shrunk_ptr=None, slices=None, first_end=None, second_end=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0,
    ):  # fmt: skip
        """One tile of y^T, [N_TILE, ROW_TILE]; each iteration takes 128 along k, as two products of 64.

        x_desc: TMA descriptor of the permuted x. In an iteration codes0 to codes3 are the codes of a thread, and pairs0
        to pairs3 the weights decoded from them: two of these go into the first product, two into the second."""
        if PDL:
            gdc_launch_dependents()
        tile = tl.program_id(0)
        n_start = (tile // row_tiles) * N_TILE
        row_start = (tile % row_tiles) * ROW_TILE
        row = row_start + tl.arange(0, ROW_TILE)
        n = tl.minimum(n_start + tl.arange(0, N_TILE), N - 1)  # rows beyond N repeat the last one, and are not stored
        blocks = K // 64
        steps = blocks // 2
        steps_per_program = tl.cdiv(steps, tl.num_programs(1))
        first = tl.program_id(1) * steps_per_program
        last = tl.minimum(first + steps_per_program, steps) - 1
        if PDL and b_ptr is not None:  # until the kernel ahead has ended, memory would be idle
            prefetch_adapter(b_ptr, n, RANK, RANK_TILE)

        t = tl.arange(0, 4)[None, :]
        codes_pointers = packed_ptr + n.to(tl.int64)[:, None] * (K // 2) + t * 16
        row_block = (n * blocks)[:, None]
        exponent = exponent_of(_largest_scale(code_ptr, outer_ptr, offset_ptr, offset_stride, n, blocks))
        column_scale = power_of_two(268 - exponent)[:, None]
        # The scales of a step are those of an even block and the odd one after it, which share a second-level scale.
        start = tl.minimum(first, steps - 1)  # a program without work reads as well, within the row
        raw = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + start * 2, t, INTERPRET)
        codes0, codes1, codes2, codes3 = _load_codes(codes_pointers + start * 64, INTERPRET)
        scale = _scale(raw, code_ptr, column_scale, INTERPRET)
        next_step = tl.minimum(first + 1, steps - 1)
        raw = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + next_step * 2, t, INTERPRET)
        next_codes = _load_codes(codes_pointers + next_step * 64, INTERPRET)
        constants = load_constants(table_ptr, INTERPRET)
        pairs0 = _decode(codes0, scale, table_ptr, constants, INTERPRET)
        pairs1 = _decode(codes1, scale, table_ptr, constants, INTERPRET)
        if PDL:
            gdc_wait()  # only now: what was read so far is never written, so it needed no waiting

        accumulator = tl.zeros((N_TILE, ROW_TILE), tl.float32)
        for step in range(first, last + 1):
            x0 = x_desc.load([row_start, step * 128])  # side by side, so that there is one wait for both
            x1 = x_desc.load([row_start, step * 128 + 64])
            accumulator = add_product(accumulator, _operand(pairs0, pairs1, INTERPRET), x0.T, INTERPRET)
            pairs2 = _decode(codes2, scale, table_ptr, constants, INTERPRET)
            pairs3 = _decode(codes3, scale, table_ptr, constants, INTERPRET)
            accumulator = add_product(accumulator, _operand(pairs2, pairs3, INTERPRET), x1.T, INTERPRET)
            codes0, codes1, codes2, codes3 = next_codes
            # Triton does not pipeline a loop in which a value passes unchanged from one iteration to the next.
            codes2 = _opaque(codes2, INTERPRET)
            codes3 = _opaque(codes3, INTERPRET)
            scale = _scale(raw, code_ptr, column_scale, INTERPRET)
            next_step = tl.minimum(step + 2, last)
            raw = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + next_step * 2, t, INTERPRET)
            next_codes = _load_codes(codes_pointers + next_step * 64, INTERPRET)
            pairs0 = _decode(codes0, scale, table_ptr, constants, INTERPRET)
            pairs1 = _decode(codes1, scale, table_ptr, constants, INTERPRET)
            # This ends the product here: one in flight where the loop turns makes ptxas wait after each product.
            accumulator = _opaque(accumulator, INTERPRET)

        epilogue(
            accumulator, tile, n_start, n, row, rows, N, factor, exponent, row_scale_ptr, bias_ptr, y_ptr, partial_ptr,
            counters_ptr, b_ptr, shrunk_ptr, slices, first_end, second_end,
            SPLIT, INTERPRET, RANK, RANK_TILE,
        )  # fmt: skip
