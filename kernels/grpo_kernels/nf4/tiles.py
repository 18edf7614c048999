"""Sizes of the tiles in which the fused kernels for NF4 weights compute y^T = W x^T."""

import math
from typing import Any, NamedTuple

from grpo_kernels.nf4.dequantize import BLOCK

FEW_ROWS_TILE = 16
"""weight rows a program of the kernel for few rows, and the rows of x up to which it is the faster one"""
SCALED_STEP = 128
"""along k, of the kernel that scales weights before the product"""


class Tiles(NamedTuple):
    """How a fused kernel is launched; with n = 16 the one for few rows, of rows, warps and registers only."""

    n: int  # weight rows a program
    rows: int  # rows of x a program
    splits: int  # programs that share the sum over k of one tile
    warps: int
    stages: int
    group: int = 4  # blocks of 64 along k an iteration: 4 or 2; not of the scaled one
    wide: bool = True  # load a group's words at once rather than block by block; not of the scaled one
    pdl: bool = False  # start before the kernel ahead has ended
    scaled: bool = False  # `nf4_scaled`: for bf16 x (of fp16 it loses a bit), NestedAbsmax, Hopper
    registers: int | None = None  # at most so many a thread

    @property
    def step(self) -> int:
        """along k, of an iteration"""
        return SCALED_STEP if self.scaled else BLOCK * self.group

    @property
    def launch(self) -> dict[str, Any]:
        """Options of every launch, of the product's kernel and of the one ahead of it; the interpreter knows none."""
        return {"launch_pdl": True} if self.pdl else {}

    @property
    def options(self) -> dict[str, Any]:
        """Those of the product's kernel."""
        return self.launch | ({"maxnreg": self.registers} if self.registers else {})


def choose_tiles(rows: int, n: int, k: int, multiprocessors: int, scaled: bool = False) -> Tiles:
    """Tiles measured on an H100: small enough that every multiprocessor has some, split over k where N is small.

    scaled: those of `nf4_scaled`, which has none for few rows."""
    if rows <= FEW_ROWS_TILE:  # more warps share a sum where there are few programs
        warps = 8 if n // FEW_ROWS_TILE <= 2 * multiprocessors else 4
        return Tiles(FEW_ROWS_TILE, 8 if rows <= 8 else 16, 1, min(warps, 2 ** int(math.log2(k // 256))), 1)
    resident: float
    if scaled:
        tiles, resident = _scaled_tiles(rows, n, k, multiprocessors)
    elif rows <= 32:
        tiles, resident = Tiles(64, 32, 1, 4, 2), 3
    elif rows <= 64:
        tiles, resident = Tiles(64, 64, 1, 4, 2), 2
    else:
        tiles, resident = Tiles(64, 128, 1, 4, 3, group=2), 2
    programs = -(-n // tiles.n) * -(-rows // tiles.rows)
    splits = resident * multiprocessors / programs  # as many programs as are resident; a few more where rows are few
    splits = max(1, min(math.ceil(splits) if rows <= 32 and not scaled else int(splits), k // 512, 16))
    steps = k // tiles.step
    return tiles._replace(splits=-(-steps // -(-steps // splits)))  # only those that have work


def _scaled_tiles(rows: int, n: int, k: int, multiprocessors: int) -> tuple[Tiles, float]:
    """Tiles of `nf4_scaled`, and how many programs a multiprocessor their splits aim at."""
    if rows <= 32 and n <= 32 * multiprocessors:
        return Tiles(64, 32, 1, 4, 3, scaled=True), 4
    if rows <= 32:
        return Tiles(128, 32, 1, 8, 3, scaled=True), 2.25
    if rows <= 64 and n <= 192 * multiprocessors:
        return Tiles(64, 64, 1, 4, 4, scaled=True), 3
    if rows <= 64:
        return Tiles(64, 64, 1, 4, 3, scaled=True), 4
    if rows <= 128 and n < 128 * multiprocessors:
        return Tiles(64, 128, 1, 4, 3, scaled=True), 2
    if rows <= 128:
        return Tiles(128, 128, 1, 8, 3, scaled=True, registers=128), 2
    if k <= n <= 32 * multiprocessors:
        return Tiles(128, 128, 1, 8, 4, scaled=True), 1
    return Tiles(128, 256, 1, 8, 3, scaled=True), 1
