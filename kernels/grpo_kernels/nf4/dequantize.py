"""A weight in bitsandbytes' NF4, dequantized.

The weight is [N, K] with K a multiple of 64. packed holds two 4-bit codes a byte, the even k in the high bits; every 64
weights share one absmax: W[n, k] = NF4[code[n, k]] * absmax[n, k // 64] (QLoRA, https://arxiv.org/abs/2305.14314)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.nf4.lookup import NF4, emulation_table, lookup_ptx

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None

BLOCK = 64
"""weights that share one absmax"""


class NestedAbsmax(NamedTuple):
    """Double-quantized absmax: absmax[i] = code[quantized[i]] * absmax[i // 256] + offset, or + offset[i // 256] for
    matrices that were quantized apart and joined by rows."""

    quantized: Tensor  # [N * K / 64] uint8
    code: Tensor  # [256] float32
    absmax: Tensor  # [ceil(N * K / 64 / 256)] float32
    offset: Tensor  # [] or [ceil(N * K / 64 / 256)] float32


def absmax_of(quant_state: Any) -> Tensor | NestedAbsmax:
    """The scales of a bitsandbytes QuantState (NF4, block 64), as `nf4_linear` takes them; shares its tensors.

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
    """absmax: [N * K / 64] float32. Kept so it takes 4 bytes for 64 weights, 12.5% of their codes, instead of 1."""
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
    """W[rows, columns] in dtype, by a Triton kernel; bit for bit `nf4_dequantize_reference` for expanded scales.

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
        _dequantize_kernel[(triton.cdiv(blocks, 32),)](
            packed.view(-1).view(torch.int16), *scale_arguments(absmax), out,
            None if packed.is_cuda else emulation_table(torch.float32, 1.0),
            blocks, size[1] // BLOCK, shape[1] // BLOCK, row_start, start // BLOCK,
            NESTED=isinstance(absmax, NestedAbsmax), BLOCKS=32,
        )  # fmt: skip
    return out


def nf4_dequantize_reference(
    packed: Tensor, absmax: Tensor | NestedAbsmax, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """[N, K] in dtype, rounded once from the float32 product as bitsandbytes does (float64 is not rounded)."""
    codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), -1)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.tensor(NF4, dtype=exact, device=packed.device)[codes.reshape(-1, BLOCK).int()]
    return (values * expand_absmax(absmax).to(exact)[:, None]).to(dtype).view(shape)


def scale_arguments(
    absmax: Tensor | NestedAbsmax,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """The kernels' pointers to scales, and 1 if each second-level scale has an offset of its own."""
    return (*absmax, absmax.offset.dim()) if isinstance(absmax, NestedAbsmax) else (absmax, None, None, None, 0)


if triton is not None:
    from grpo_kernels.nf4.lookup import emulated_lookup

    _PTX_FP32 = tl.constexpr(lookup_ptx(torch.float32, 1.0))

    @triton.jit
    def absmax_at(absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, index, outer_index, NESTED: tl.constexpr):
        """absmax at index, fp32, of a `NestedAbsmax` too. outer_index: index // 256, of one for all that share it."""
        absmax = tl.load(absmax_ptr + index)
        if NESTED:
            outer = tl.load(outer_ptr + outer_index)
            return tl.load(code_ptr + absmax) * outer + tl.load(offset_ptr + outer_index * offset_stride)
        else:
            return absmax.to(tl.float32)

    @triton.jit(do_not_specialize=["blocks", "row_start", "start"])
    def _dequantize_kernel(
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
        scales = absmax_at(absmax_ptr, code_ptr, outer_ptr, offset_ptr, offset_stride, source, source // 256, NESTED)
        if table_ptr is None:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                _PTX_FP32, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            q0, q1, q2, q3 = emulated_lookup(words, table_ptr)
        values = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [BLOCKS, 2 p + e, i // 2, i % 2]
        values = tl.permute(tl.reshape(values, (BLOCKS, 8, 2, 4)), (0, 1, 3, 2))
        values = tl.reshape(values, (BLOCKS, 64)) * scales[:, None]
        pointers = out_ptr + block.to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
