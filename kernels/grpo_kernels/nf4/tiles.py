"""Sizes of the tiles in which the fused kernels for NF4 weights compute y^T = W x^T."""

import math
from typing import Any, NamedTuple

FEW_ROWS_TILE = 16
"""weight rows per program of `nf4_few_rows`, which is also the number of rows of x up to which that kernel is faster"""
STEP = 128
"""columns of W that `nf4_scaled` multiplies per iteration"""


class Tiles(NamedTuple):
    """How a kernel is launched: `nf4_few_rows` if n is FEW_ROWS_TILE (with one split and stage), else `nf4_scaled`."""

    n: int  # weight rows per program
    rows: int  # rows of x per program
    splits: int  # programs that share the sum over k of one tile
    warps: int  # warps per program
    stages: int  # tiles of x in shared memory, of which all but one are on their way
    pdl: bool = False  # programmatic dependent launch: whether the kernel starts before the one ahead of it has ended
    registers: int | None = None  # largest number of registers per thread; None leaves it to the compiler

    @property
    def launch(self) -> dict[str, Any]:
        """Launch options of the product's kernel and of its prologue; empty for the interpreter, which knows none."""
        return {"launch_pdl": True} if self.pdl else {}

    @property
    def options(self) -> dict[str, Any]:
        """Launch options of the product's kernel."""
        return self.launch | ({"maxnreg": self.registers} if self.registers else {})


def choose_tiles(rows: int, n: int, k: int, multiprocessors: int) -> Tiles:
    """Tiles for x [rows, k] and W [n, k], as measured on an H100.

    They are small enough that each multiprocessor has some; where N is small, the sum over k is split as well."""
    if rows <= FEW_ROWS_TILE:  # where there are few programs, more warps share a sum
        warps = 8 if n // FEW_ROWS_TILE <= 2 * multiprocessors else 4
        return Tiles(FEW_ROWS_TILE, 8 if rows <= 8 else 16, 1, min(warps, 2 ** int(math.log2(k // 256))), 1)
    tiles, resident = _tiles_and_residents(rows, n, k, multiprocessors)
    programs = -(-n // tiles.n) * -(-rows // tiles.rows)
    splits = max(1, min(int(resident * multiprocessors / programs), k // 512, 16))
    steps = k // STEP
    return tiles._replace(splits=-(-steps // -(-steps // splits)))  # only splits that have work


def _tiles_and_residents(rows: int, n: int, k: int, multiprocessors: int) -> tuple[Tiles, float]:
    """Tiles of `nf4_scaled`, and the number of programs per multiprocessor that splitting aims at."""
    if rows <= 32 and n <= 32 * multiprocessors:
        return Tiles(64, 32, 1, 4, 3), 4
    if rows <= 32:
        return Tiles(128, 32, 1, 8, 3), 2.25
    if rows <= 64 and n <= 192 * multiprocessors:
        return Tiles(64, 64, 1, 4, 4), 3
    if rows <= 64:
        return Tiles(64, 64, 1, 4, 3), 4
    if rows <= 128 and n < 128 * multiprocessors:
        return Tiles(64, 128, 1, 4, 3), 2
    if rows <= 128:
        return Tiles(128, 128, 1, 8, 3, registers=128), 2
    if k <= n <= 32 * multiprocessors:
        return Tiles(128, 128, 1, 8, 4), 1
    return Tiles(128, 256, 1, 8, 3), 1
