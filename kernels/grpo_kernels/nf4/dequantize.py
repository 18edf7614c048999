"""Dequantize a weight in bitsandbytes' NF4 (QLoRA, https://arxiv.org/abs/2305.14314).

The weight is [N, K] with K a multiple of 64. packed holds two 4-bit codes per byte, that of the even k in the high
bits, and each block of 64 weights has one scale, its absmax: W[n, k] = NF4[code[n, k]] * absmax[n, k // 64]."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.nf4.lookup import NF4, interpreter_table, lookup_lines

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None

BLOCK = 64
"""number of weights that share one absmax"""


class NestedAbsmax(NamedTuple):
    """Double-quantized scales: absmax[i] = code[quantized[i]] * absmax[i // 256] + offset.

    Matrices that were quantized apart and merged by rows have an offset per second-level scale, offset[i // 256]."""

    quantized: Tensor  # [N * K / 64] uint8
    code: Tensor  # [256] float32
    absmax: Tensor  # [ceil(N * K / 64 / 256)] float32
    offset: Tensor  # [] or [ceil(N * K / 64 / 256)] float32


def absmax_of(quant_state: Any) -> Tensor | NestedAbsmax:
    """The scales of a bitsandbytes QuantState (NF4 in blocks of 64) as `nf4_linear` takes them, without a copy.

    Raises ValueError for another format."""
    if quant_state.quant_type != "nf4" or quant_state.blocksize != BLOCK:
        raise ValueError(
            f"quant_state is {quant_state.quant_type} in blocks of {quant_state.blocksize}: only nf4 in blocks of "
            f"{BLOCK} is supported; quantize with bnb_4bit_quant_type='nf4' and the default block size"
        )
    if not quant_state.nested:
        return quant_state.absmax
    inner = quant_state.state2
    if inner.blocksize != 256:
        raise ValueError(f"quant_state.state2 has blocks of {inner.blocksize}, must be 256 (bitsandbytes' default)")
    offset = torch.as_tensor(quant_state.offset, dtype=torch.float32, device=quant_state.absmax.device)
    return NestedAbsmax(quant_state.absmax, inner.code, inner.absmax, offset)


def expand_absmax(absmax: Tensor | NestedAbsmax) -> Tensor:
    """The scales [N * K / 64] in float32: 4 bytes per block of 64 weights instead of about 1; the codes take 32."""
    if not isinstance(absmax, NestedAbsmax):
        return absmax.float()
    flat = absmax.quantized.reshape(-1)
    outer, offset = (t.expand(len(absmax.absmax)).repeat_interleave(256)[: len(flat)] for t in (absmax[2], absmax[3]))
    return absmax.code[flat.int()] * outer + offset


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    rows: slice = slice(None),
    columns: slice = slice(None),
    out: Tensor | None = None,
) -> Tensor:
    """W[rows, columns] in dtype, by a Triton kernel; for expanded scales equal to the reference to the bit.

    packed, absmax, shape: as for `nf4_linear`. columns must begin and end at multiples of 64. out: contiguous buffer of
    the result's shape and dtype. Raises ValueError if K is no multiple of 64."""
    if shape[1] % BLOCK:
        raise ValueError(f"shape is (N, K) = {tuple(shape)}: K must be a multiple of {BLOCK}, the weights per scale")
    row_start, row_stop, _ = rows.indices(shape[0])
    start, stop, _ = columns.indices(shape[1])
    size = (row_stop - row_start, stop - start)
    if out is None:
        out = torch.empty(size, dtype=dtype, device=packed.device)
    blocks = size[0] * (size[1] // BLOCK)
    if blocks:
        _dequantize_kernel[(triton.cdiv(blocks, 32),)](
            packed.view(-1).view(torch.int16), *scale_arguments(absmax), out,
            None if packed.is_cuda else interpreter_table(torch.float32),
            blocks, size[1] // BLOCK, shape[1] // BLOCK, row_start, start // BLOCK,
            NESTED=isinstance(absmax, NestedAbsmax), BLOCKS=32,
        )  # fmt: skip
    return out


def nf4_dequantize_reference(
    packed: Tensor, absmax: Tensor | NestedAbsmax, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """W [N, K] in dtype, in plain torch; rounded once from the float32 product, as in bitsandbytes (float64: not)."""
    codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), -1)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.tensor(NF4, dtype=exact, device=packed.device)[codes.reshape(-1, BLOCK).int()]
    return (values * expand_absmax(absmax).to(exact)[:, None]).to(dtype).view(shape)


def scale_arguments(
    absmax: Tensor | NestedAbsmax,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """The kernels' arguments for scales: absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride.

    outer_ptr: the second-level scales. offset_stride: 1 where each of these has an offset, else 0."""
    return (*absmax, absmax.offset.dim()) if isinstance(absmax, NestedAbsmax) else (absmax, None, None, None, 0)


def lookup_ptx() -> str:
    """PTX that turns the four bytes of codes in $8 into their eight float32 values, $0 to $7 (see `lookup_lines`)."""
    lines = lookup_lines(torch.float32, "$8", [f"${i}" for i in range(8)])
    return "{ .reg .b32 m, s, p, q, a, b, c, d;\n" + "\n".join(lines) + "\n}"


if triton is not None:
    _LOOKUP = tl.constexpr(lookup_ptx())

    @triton.jit
    def _interpreted_lookup(codes, table_ptr):
        """What the PTX does, for the interpreter: the four results q0 to q3 have the shape of codes, in float32.

        codes: [BLOCKS, 16] int16, each element four codes. The PTX takes them in pairs: q_i[:, 2 p + e] is the value at
        k = 8 p + 2 i + e of the block."""
        first, second = tl.split(tl.reshape(codes.to(tl.int32), (codes.shape[0], codes.shape[1] // 2, 2)))
        q0 = tl.join(tl.load(table_ptr + ((first >> 4) & 15)), tl.load(table_ptr + (first & 15)))
        q1 = tl.join(tl.load(table_ptr + ((first >> 12) & 15)), tl.load(table_ptr + ((first >> 8) & 15)))
        q2 = tl.join(tl.load(table_ptr + ((second >> 4) & 15)), tl.load(table_ptr + (second & 15)))
        q3 = tl.join(tl.load(table_ptr + ((second >> 12) & 15)), tl.load(table_ptr + ((second >> 8) & 15)))
        return (
            tl.reshape(q0, codes.shape), tl.reshape(q1, codes.shape),
            tl.reshape(q2, codes.shape), tl.reshape(q3, codes.shape),
        )  # fmt: skip

    @triton.jit
    def _absmax_at(absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, index, NESTED: tl.constexpr):
        """absmax[index] in float32, of a `NestedAbsmax` too."""
        outer_index = index // 256
        absmax = tl.load(absmax_ptr + index)
        if NESTED:
            outer = tl.load(outer_ptr + outer_index)
            return tl.load(code_ptr + absmax) * outer + tl.load(offset_ptr + outer_index * offset_stride)
        else:
            return absmax.to(tl.float32)

    @triton.jit(do_not_specialize=["blocks", "row_start", "start"])
    def _dequantize_kernel(
        packed_ptr, absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, out_ptr, table_ptr,
        blocks, width, row_width, row_start, start,
        NESTED: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """Dequantize BLOCKS blocks of 64 weights of a part of W.

        The part has width blocks per row, out of row_width, and begins at row row_start and at the row's block start.
        packed_ptr: int16, each element four codes."""
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < blocks
        source = (row_start + block // width).to(tl.int64) * row_width + start + block % width
        source = tl.where(inside, source, 0)
        codes = tl.load(packed_ptr + source[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0)
        scales = _absmax_at(absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, source, NESTED)
        if table_ptr is None:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                _LOOKUP, "=r,=r,=r,=r,=r,=r,=r,=r,r", [codes],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            q0, q1, q2, q3 = _interpreted_lookup(codes, table_ptr)
        values = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [BLOCKS, 2 p + e, i // 2, i % 2]
        values = tl.permute(tl.reshape(values, (BLOCKS, 8, 2, 4)), (0, 1, 3, 2))
        values = tl.reshape(values, (BLOCKS, 64)) * scales[:, None]
        pointers = out_ptr + block.to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
