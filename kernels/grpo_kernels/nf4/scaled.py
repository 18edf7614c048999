"""y = x W^T on NF4 weights for 17 to 256 rows of bfloat16 x: weights scaled before the product. Hopper.

What binds here is neither memory nor tensor cores but how long a program waits between its products: for codes, scales,
and their decode of about 2.5 integer instructions a weight. So nothing is left between two products:

- x, float16, is copied to shared memory by the tensor memory accelerator (TMA), with one instruction a tile.
- Codes and scales go from global memory straight to the registers of the thread that decodes them, an iteration ahead.
  In 128 codes of a row each of the four threads that share it has 32 in one load, all of the same scale. Along k they
  are not where a tensor core's operand has them; x is permuted likewise, which changes no sum (`nf4_prepare`).
- While a product runs, the weights of the next are decoded, those of the next iteration too.

A weight is table[code] times its block's scale, in float16 with fp32 sums: no second set of sums, as scales that
multiply sums of 64 terms need. x's rows are divided by a power of two each, W's rows by one that brings the bound of
their scales into [2^14, 2^15), so that no magnitude leaves float16. Error: table, scale and product each round to
float16, 2.9e-4 together, where bfloat16 weights cost 1.7e-3.
"""

import torch
from torch import Tensor

from grpo_kernels.nf4.dequantize import NestedAbsmax, scale_arguments
from grpo_kernels.nf4.lookup import TABLE_SCALE, lookup_lines, lookup_table
from grpo_kernels.nf4.prologue import Lora, prepare
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
    """`nf4_linear` of x [rows, K], or [rows, 2 K] if gated; packed begins at a multiple of 16 bytes."""
    n, k = shape
    ready = prepare(x, shape, tiles, lora, gated, multiprocessors)
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    _scaled_kernel[ready.grid](
        TensorDescriptor.from_tensor(ready.x, [tiles.rows, 64]), packed.view(-1), *scale_arguments(absmax), bias, y,
        ready.partial, ready.counters, ready.row_scale, lookup_table(ready.x),
        len(x), n, k, ready.row_tiles, 1 / TABLE_SCALE[torch.float16],
        SPLIT=tiles.splits > 1, N_TILE=tiles.n, ROW_TILE=tiles.rows, PDL=tiles.pdl, EMULATED=not x.is_cuda,
        **ready.expand,
        num_warps=tiles.warps, num_stages=tiles.stages, **tiles.options,
    )  # fmt: skip
    return y


def scaled_lookup_ptx() -> str:
    """PTX: eight codes in $4, looked up in float16 and multiplied by the scale that both halves of $5 hold, to pairs in
    $0 to $3, as `lookup_ptx` orders them; `lookup_constants` in $6 to $10."""
    out = [f"${i}" for i in range(4)]
    lines = lookup_lines(torch.float16, TABLE_SCALE[torch.float16], "$4", out, [f"${6 + i}" for i in range(5)])
    lines = ["mov.b32 t, $5;", *lines, *(f"mul.rn.f16x2 {pair}, {pair}, t;" for pair in out)]  # outputs may be inputs
    return "{ .reg .b32 m, s, p, q, a, b, c, d, t;\n" + "\n".join(lines) + "\n}"


if triton is not None:
    from grpo_kernels.nf4.epilogue import finish_tile
    from grpo_kernels.nf4.lookup import load_constants
    from grpo_kernels.nf4.prologue import add_product, exponent_of, power_of_two, prefetch_adapter

    _LOOKUP = tl.constexpr(scaled_lookup_ptx())
    _LOOKUP_OPERANDS = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 7))
    _UNPACK = tl.constexpr("mov.b32 {$0, $1}, $2;")
    _LOAD_FLOAT = tl.constexpr("ld.global.nc.f32 $0, [$1];")
    _LOAD_BYTE = tl.constexpr("{ .reg .b16 h; ld.global.nc.u8 h, [$1]; cvt.u32.u16 $0, h; }")
    _LOAD_WORDS = tl.constexpr("ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")

    # Loads in PTX, since Triton gives tl.load a layout of its own, and what comes of it goes through shared memory to
    # the threads that need it, with all warps waiting for each other.
    @triton.jit
    def _load_float(pointers, EMULATED: tl.constexpr):
        if EMULATED:
            return tl.load(pointers)
        else:
            return tl.inline_asm_elementwise(
                _LOAD_FLOAT, "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
            )

    @triton.jit
    def _load_byte(pointers, EMULATED: tl.constexpr):
        if EMULATED:
            return tl.load(pointers).to(tl.int32)
        else:
            return tl.inline_asm_elementwise(
                _LOAD_BYTE, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
            )

    @triton.jit
    def _load_words(pointers, EMULATED: tl.constexpr):
        """Four int32 tensors: the words of eight codes from each pointer to bytes on."""
        if EMULATED:
            words = pointers.to(tl.pointer_type(tl.int32), bitcast=True)
            return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
        else:
            return tl.inline_asm_elementwise(
                _LOAD_WORDS, "=r,=r,=r,=r,l", [pointers.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip

    @triton.jit
    def _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, block, t, EMULATED: tl.constexpr):
        """[N_TILE, 4]: what `_scale` needs of blocks block (even) and block + 1 for threads t."""
        outer = block // 256
        return (
            _load_byte(absmax_ptr + block + t // 2, EMULATED),
            _load_float(outer_ptr + outer, EMULATED),
            _load_float(offset_ptr + outer * offset_stride, EMULATED),
        )

    @triton.jit
    def _scale(raw, code_ptr, column_scale, EMULATED: tl.constexpr):
        """[N_TILE, 4] int32: a block's scale times column_scale, float16, in both halves."""
        code, outer, offset = raw
        scale = (_load_float(code_ptr + code, EMULATED) * outer + offset) * column_scale
        scale = scale.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        return scale | (scale << 16)

    @triton.jit
    def _emulated_pair(word, scale, table_ptr, BYTE: tl.constexpr):
        even = (tl.load(table_ptr + ((word >> (8 * BYTE + 4)) & 15)) * scale).to(tl.float16)
        odd = (tl.load(table_ptr + ((word >> (8 * BYTE)) & 15)) * scale).to(tl.float16)
        even = even.to(tl.uint16, bitcast=True).to(tl.int32)
        return even | (odd.to(tl.uint16, bitcast=True).to(tl.int32) << 16)

    @triton.jit
    def _decode(word, scale, table_ptr, constants, EMULATED: tl.constexpr):
        """[N_TILE, 4] words of eight codes -> four of their pairs of scaled float16 weights."""
        if EMULATED:
            value = (scale & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            return (
                _emulated_pair(word, value, table_ptr, 0), _emulated_pair(word, value, table_ptr, 1),
                _emulated_pair(word, value, table_ptr, 2), _emulated_pair(word, value, table_ptr, 3),
            )  # fmt: skip
        else:
            c0, c1, c2, c3, c4 = constants
            return tl.inline_asm_elementwise(
                _LOOKUP, _LOOKUP_OPERANDS, [word, scale, c0, c1, c2, c3, c4],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip

    @triton.jit
    def _unpacked(pairs, EMULATED: tl.constexpr):
        """[N_TILE, 4, 2] float16; no instruction."""
        if EMULATED:
            even = (pairs & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
            odd = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        else:
            even, odd = tl.inline_asm_elementwise(
                _UNPACK, "=h,=h,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
            )
        return tl.join(even, odd)

    @triton.jit
    def _operand(first, second, EMULATED: tl.constexpr):
        """Weights of two words a thread t as [N_TILE, 64]: pair i of word h at 16 i + 8 h + 2 t, where a tensor core
        has it."""
        a0, a1, a2, a3 = first
        b0, b1, b2, b3 = second
        pair0 = tl.join(_unpacked(a0, EMULATED), _unpacked(b0, EMULATED))  # [N_TILE, t, even or odd, word]
        pair1 = tl.join(_unpacked(a1, EMULATED), _unpacked(b1, EMULATED))
        pair2 = tl.join(_unpacked(a2, EMULATED), _unpacked(b2, EMULATED))
        pair3 = tl.join(_unpacked(a3, EMULATED), _unpacked(b3, EMULATED))
        pairs = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
        return tl.reshape(tl.permute(pairs, (0, 4, 5, 3, 1, 2)), (a0.shape[0], 64))

    @triton.jit
    def _anew(value, EMULATED: tl.constexpr):
        """value, by no instruction, but for the compiler another one."""
        if EMULATED:
            return value
        else:
            return tl.inline_asm_elementwise("", "=r,0", [value], dtype=value.dtype, is_pure=True, pack=1)

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
        do_not_specialize=["rows", "row_tiles", "slices", "first_end", "second_end"]
    )
    def _scaled_kernel(
        x_desc, codes_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, bias_ptr, y_ptr, partial_ptr,
        counters_ptr, row_scale_ptr, table_ptr,
        rows, N, K, row_tiles, factor,
        SPLIT: tl.constexpr, N_TILE: tl.constexpr, ROW_TILE: tl.constexpr, PDL: tl.constexpr, EMULATED: tl.constexpr,
        b_ptr=None, shrunk_ptr=None, slices=None, first_end=None, second_end=None,
        RANK: tl.constexpr = 0, RANK_TILE: tl.constexpr = 0,
    ):  # fmt: skip
        """One tile of y^T, [N_TILE, ROW_TILE]: 128 along k an iteration, two products of 64."""
        if PDL:
            gdc_launch_dependents()
        tile = tl.program_id(0)
        n_start = (tile // row_tiles) * N_TILE
        row_start = (tile % row_tiles) * ROW_TILE
        row = row_start + tl.arange(0, ROW_TILE)
        n = tl.minimum(n_start + tl.arange(0, N_TILE), N - 1)  # rows beyond N repeat the last and are not stored
        blocks = K // 64
        steps = blocks // 2
        share = tl.cdiv(steps, tl.num_programs(1))
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, steps) - 1
        if PDL and b_ptr is not None:  # the memory would be idle until the kernel ahead has ended
            prefetch_adapter(b_ptr, n, RANK, RANK_TILE)

        t = tl.arange(0, 4)[None, :]
        codes = codes_ptr + n.to(tl.int64)[:, None] * (K // 2) + t * 16
        row_block = (n * blocks)[:, None]
        exponent = exponent_of(_largest_scale(code_ptr, outer_ptr, offset_ptr, offset_stride, n, blocks))
        column_scale = power_of_two(268 - exponent)[:, None]
        # A step's scales: an even and an odd block, so they have one second-level scale.
        start = tl.minimum(first, steps - 1)  # a program without work reads all the same
        raw = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + start * 2, t, EMULATED)
        word0, word1, word2, word3 = _load_words(codes + start * 64, EMULATED)
        scale = _scale(raw, code_ptr, column_scale, EMULATED)
        following = tl.minimum(first + 1, steps - 1)
        raw = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + following * 2, t, EMULATED)
        words = _load_words(codes + following * 64, EMULATED)
        constants = load_constants(table_ptr, EMULATED)
        pairs0 = _decode(word0, scale, table_ptr, constants, EMULATED)
        pairs1 = _decode(word1, scale, table_ptr, constants, EMULATED)
        if PDL:
            gdc_wait()  # only now: what was read so far is frozen

        accumulator = tl.zeros((N_TILE, ROW_TILE), tl.float32)
        for step in range(first, last + 1):
            x0 = x_desc.load([row_start, step * 128])  # side by side: one wait for both
            x1 = x_desc.load([row_start, step * 128 + 64])
            accumulator = add_product(accumulator, _operand(pairs0, pairs1, EMULATED), x0.T, EMULATED)
            pairs2 = _decode(word2, scale, table_ptr, constants, EMULATED)
            pairs3 = _decode(word3, scale, table_ptr, constants, EMULATED)
            accumulator = add_product(accumulator, _operand(pairs2, pairs3, EMULATED), x1.T, EMULATED)
            word0, word1, word2, word3 = words
            # What passes from one iteration to the next and on unchanged keeps Triton from pipelining a loop.
            word2 = _anew(word2, EMULATED)
            word3 = _anew(word3, EMULATED)
            scale = _scale(raw, code_ptr, column_scale, EMULATED)
            following = tl.minimum(step + 2, last)
            raw = _raw_scale(absmax_ptr, outer_ptr, offset_ptr, offset_stride, row_block + following * 2, t, EMULATED)
            words = _load_words(codes + following * 64, EMULATED)
            pairs0 = _decode(word0, scale, table_ptr, constants, EMULATED)
            pairs1 = _decode(word1, scale, table_ptr, constants, EMULATED)
            # Ends the product here: else it is in flight when the loop turns, and ptxas makes every one wait.
            accumulator = _anew(accumulator, EMULATED)

        finish_tile(
            accumulator, tile, n_start, n, row, rows, N, factor, exponent, row_scale_ptr, bias_ptr, y_ptr, partial_ptr,
            counters_ptr, b_ptr, shrunk_ptr, slices, first_end, second_end,
            SPLIT, EMULATED, RANK, RANK_TILE,
        )  # fmt: skip
