"""Look up NF4's sixteen values by 4-bit codes, in registers; the kernels for NF4 weights share this.

A byte permute (PTX prmt) looks up four codes at once in eight bytes of a table. The low bytes and the high bytes of the
sixteen 16-bit values fill eight registers. A lookup takes about three integer instructions per weight, and no table in
memory."""

import functools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""values of the sixteen codes, in units of the absmax of a weight's block (QLoRA, https://arxiv.org/abs/2305.14314)"""
TABLE_SCALE = {torch.bfloat16: 1.436767578125, torch.float16: 1.3661956787109375, torch.float32: 1.0}
"""factor of the table per dtype: the table holds round(NF4[i] * factor), and the product's result is divided by it. At
these factors the rounded values come closest: weighted by how often a code occurs, their error is 0.08% in bfloat16,
half of what dequantizing to bfloat16 costs, and 0.008% in float16."""
SELECTORS = 0x32103210
"""nibbles that select byte i or, with 4 added, byte i of prmt's other operand"""


def lookup_lines(dtype: torch.dtype, word: str, out: list[str], constants: list[str] | None = None) -> list[str]:
    """Lines of PTX that turn four bytes of codes into their eight values, NF4[code] * TABLE_SCALE in dtype.

    word: register of the codes. The lowest byte is the first in memory, and its high four bits are the code of its even
        k; so from the lowest bits on it holds the codes of k = 1, 0, 3, 2, 5, 4, 7, 6.
    out: registers of the values: four pairs (k = 2 i, 2 i + 1) for a 16-bit dtype, eight values for float32.
    constants: registers that hold `lookup_constants`; None writes the whole table into the instructions.
    The registers m, s, p, q, a, b (and, for float32, c, d) are overwritten.

    One prmt, with the low three bits of four codes as selectors, picks four bytes out of eight. This is done in both
    halves of the table, and a third prmt, with bit 3 of the codes as selector, picks between the two; once for each
    byte of dtype."""
    tables = [[f"{t:#010x}" for t in table] for table in _table_words(dtype)]
    selectors = f"{SELECTORS:#010x}"
    if constants is not None:
        tables = [[constants[2 * i], t1, constants[2 * i + 1], t3] for i, (_, t1, _, t3) in enumerate(tables)]
        selectors = constants[4]
    lines = [
        f"shr.u32 m, {word}, 1;",
        f"lop3.b32 m, m, 0x44444444, {selectors}, 0xea;",  # (m & ..) | ..: selector i + 4 * bit 3 of code i
        f"and.b32 s, {word}, 0x77777777;",
    ]
    for half in (0, 1):
        if half:
            lines += ["shr.u32 m, m, 16;", "shr.u32 s, s, 16;"]
        for name, (t0, t1, t2, t3) in zip("abcd", tables):
            lines.append(f"prmt.b32 p, {t0}, {t1}, s;")
            lines.append(f"prmt.b32 q, {t2}, {t3}, s;")
            lines.append(f"prmt.b32 {name}, p, q, m;")
        if dtype.itemsize == 2:
            lines.append(f"prmt.b32 {out[2 * half]}, a, b, 0x4051;")
            lines.append(f"prmt.b32 {out[2 * half + 1]}, a, b, 0x6273;")
        else:
            for code in range(4):
                pick = f"{(code + 4) << 4 | code:#06x}"
                lines.append(f"prmt.b32 p, a, b, {pick};")
                lines.append(f"prmt.b32 q, c, d, {pick};")
                lines.append(f"prmt.b32 {out[4 * half + (code ^ 1)]}, p, q, 0x5410;")
    return lines


def _table_words(dtype: torch.dtype) -> list[list[int]]:
    """The table as 32-bit words: for each byte of dtype, lowest first, four words with that byte of the 16 values."""
    values = (torch.tensor(NF4, dtype=torch.float64) * TABLE_SCALE[dtype]).to(dtype)
    planes = values.view(torch.uint8).view(16, dtype.itemsize).T
    return [[int.from_bytes(bytes(plane[i : i + 4]), "little") for i in (0, 4, 8, 12)] for plane in planes.tolist()]


@functools.cache
def lookup_constants(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[5, 32] int32: the words of a 16-bit dtype's table that a prmt takes from a register (its other one is part of
    the code), and SELECTORS; once for each lane of a warp.

    Every lane loads its own copy, so that the compiler keeps the words in ordinary registers: from uniform registers it
    copied them before every prmt, a fifth of all instructions."""
    low, high = _table_words(dtype)
    words = torch.tensor([low[0], low[2], high[0], high[2], SELECTORS], dtype=torch.int64)
    words = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    return words[:, None].repeat(1, 32).to(device)


def lookup_table(x: Tensor) -> Tensor:
    """The table from which a kernel looks up values of x's 16-bit dtype: `lookup_constants`, or `interpreter_table`."""
    return lookup_constants(x.dtype, x.device) if x.is_cuda else interpreter_table(x.dtype)


def interpreter_table(dtype: torch.dtype) -> Tensor:
    """[16] float32: the table's values, for Triton's interpreter, which runs no PTX."""
    return (torch.tensor(NF4, dtype=torch.float64) * TABLE_SCALE[dtype]).to(dtype).float()


if triton is not None:
    _CONSTANT_0, _CONSTANT_1, _CONSTANT_2, _CONSTANT_3, _CONSTANT_4 = (
        tl.constexpr(
            "{ .reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; mad.wide.u32 a, l, 4, $1; "
            f"ld.global.b32 $0, [a + {128 * i}]; }}"
        )
        for i in range(5)
    )

    @triton.jit
    def load_constants(table_ptr, INTERPRET: tl.constexpr):
        """The lane's copy of `lookup_constants`; zeros under the interpreter, which does not use them."""
        if INTERPRET:
            return 0, 0, 0, 0, 0
        else:
            c0 = tl.inline_asm_elementwise(_CONSTANT_0, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c1 = tl.inline_asm_elementwise(_CONSTANT_1, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c2 = tl.inline_asm_elementwise(_CONSTANT_2, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c3 = tl.inline_asm_elementwise(_CONSTANT_3, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c4 = tl.inline_asm_elementwise(_CONSTANT_4, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            return c0, c1, c2, c3, c4
