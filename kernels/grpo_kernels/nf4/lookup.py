"""NF4's sixteen values looked up by 4-bit codes, in registers: what the kernels on 4-bit weights share.

A byte permute (PTX prmt) looks four codes up at once in eight bytes of table; the 16 values' low and high bytes fill
eight registers. About three integer instructions a weight, no table in memory."""

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
"""of a weight that its block's absmax divides (QLoRA, https://arxiv.org/abs/2305.14314)"""
TABLE_SCALE = {torch.bfloat16: 1.436767578125, torch.float16: 1.3661956787109375}
"""a product's table holds round(NF4[i] * TABLE_SCALE): the factor at which the 16 values round best in the dtype"""
SELECTORS = 0x32103210
"""byte i or, with 4 added, byte i of the other operand"""


def lookup_ptx(dtype: torch.dtype, scale: float, registers: bool = False) -> str:
    """PTX that turns four bytes of codes into their eight values, NF4[code] * scale in dtype.

    The lowest byte is the first in memory and its high four bits are its even k, so from the lowest bits on the word
    holds k = 1, 0, 3, 2, 5, 4, 7, 6. Operands: for a 16-bit dtype $0 to $3 the pairs k = 2 i, 2 i + 1 and $4 the word;
    for float32 $0 to $7 the values and $8 the word.

    One prmt with the low three bits of four codes as selectors picks four bytes out of eight; this is done in both
    halves of the table, and a third prmt, with bit 3 of the codes, picks one of the two. Once for each byte of dtype.

    registers: `lookup_constants` in the operands that follow, two each, the same.
    """
    size = dtype.itemsize
    constants = [f"${2 * size + 1 + 2 * i}" for i in range(5)] if registers else None
    lines = lookup_lines(dtype, scale, f"${2 * size}", [f"${i}" for i in range(2 * size)], constants)
    return "{ .reg .b32 m, s, p, q, a, b, c, d;\n" + "\n".join(lines) + "\n}"


def lookup_lines(
    dtype: torch.dtype, scale: float, word: str, out: list[str], constants: list[str] | None = None
) -> list[str]:
    """`lookup_ptx` of a word into out. constants: registers that hold `lookup_constants`; None: all are immediate."""
    tables = [[f"{t:#010x}" for t in table] for table in _table_words(dtype, scale)]
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


def _table_words(dtype: torch.dtype, scale: float) -> list[list[int]]:
    """The table as 32-bit words: for each byte of dtype, lowest first, that of the 16 values."""
    planes = (torch.tensor(NF4, dtype=torch.float64) * scale).to(dtype).view(torch.uint8).view(16, dtype.itemsize).T
    return [[int.from_bytes(bytes(plane[i : i + 4]), "little") for i in (0, 4, 8, 12)] for plane in planes.tolist()]


@functools.cache
def lookup_constants(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[5, 32] int32: the words of the table that a prmt takes from a register (its other one is immediate), and
    SELECTORS; for each lane of a warp.

    Loaded, and by each lane, so that the compiler keeps them in registers: from uniform registers it copied them for
    every prmt, a fifth of all instructions."""
    low, high = _table_words(dtype, TABLE_SCALE[dtype])
    words = torch.tensor([low[0], low[2], high[0], high[2], SELECTORS], dtype=torch.int64)
    words = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    return words[:, None].repeat(1, 32).to(device)


def lookup_table(x: Tensor) -> Tensor:
    """What the fused kernels look values of x's dtype up with."""
    if x.is_cuda:
        return lookup_constants(x.dtype, x.device)
    return emulation_table(x.dtype, TABLE_SCALE[x.dtype])


def emulation_table(dtype: torch.dtype, scale: float) -> Tensor:
    """The values themselves, as float32, for the interpreter, which runs no PTX."""
    return (torch.tensor(NF4, dtype=torch.float64) * scale).to(dtype).float()


if triton is not None:
    _CONSTANT_0, _CONSTANT_1, _CONSTANT_2, _CONSTANT_3, _CONSTANT_4 = (
        tl.constexpr(
            "{ .reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; mad.wide.u32 a, l, 4, $1; "
            f"ld.global.b32 $0, [a + {128 * i}]; }}"
        )
        for i in range(5)
    )

    @triton.jit
    def load_constants(table_ptr, EMULATED: tl.constexpr):
        """`lookup_constants`, each lane's own. Nothing under the interpreter."""
        if EMULATED:
            return 0, 0, 0, 0, 0
        else:
            c0 = tl.inline_asm_elementwise(_CONSTANT_0, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c1 = tl.inline_asm_elementwise(_CONSTANT_1, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c2 = tl.inline_asm_elementwise(_CONSTANT_2, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c3 = tl.inline_asm_elementwise(_CONSTANT_3, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            c4 = tl.inline_asm_elementwise(_CONSTANT_4, "=r,l", [table_ptr], dtype=tl.int32, is_pure=True, pack=1)
            return c0, c1, c2, c3, c4

    @triton.jit
    def emulated_lookup(words, table_ptr):
        """What the PTX does with pairs of words, for the interpreter: four tensors like words, float32."""
        first, second = tl.split(tl.reshape(words.to(tl.int32), (words.shape[0], words.shape[1] // 2, 2)))
        q0 = tl.join(tl.load(table_ptr + ((first >> 4) & 15)), tl.load(table_ptr + (first & 15)))
        q1 = tl.join(tl.load(table_ptr + ((first >> 12) & 15)), tl.load(table_ptr + ((first >> 8) & 15)))
        q2 = tl.join(tl.load(table_ptr + ((second >> 4) & 15)), tl.load(table_ptr + (second & 15)))
        q3 = tl.join(tl.load(table_ptr + ((second >> 12) & 15)), tl.load(table_ptr + ((second >> 8) & 15)))
        return (
            tl.reshape(q0, words.shape), tl.reshape(q1, words.shape),
            tl.reshape(q2, words.shape), tl.reshape(q3, words.shape),
        )  # fmt: skip
