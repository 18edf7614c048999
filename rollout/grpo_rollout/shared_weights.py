"""One copy of the frozen weights: the trainer's linear layers and a sampler's fused ones as views of the same storage.

Samplers keep q, k and v (and gate and up) as one matrix. Here such neighbours are moved, in place, into one
buffer that the trainer's modules become views of. NF4 data is a flat sequence of blocks of 64 weights, so joining
matrices by rows is joining their bytes and scales, exact as long as each matrix is a whole number of blocks.
Doubly quantised scales are not: their blocks of 256 would straddle the seam. So they are expanded to fp32 once
(0.5 bits a weight instead of 0.127), the same values that bitsandbytes computes again at every product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn


class Quantized(NamedTuple):
    """A 4-bit matrix [rows, cols] in bitsandbytes' layout."""

    packed: torch.Tensor
    """[rows * cols / 2] uint8, two weights a byte, the first in the high half"""
    absmax: torch.Tensor
    """[rows * cols / blocksize] float32, the scale of each block of consecutive weights"""
    rows: int
    cols: int
    blocksize: int
    quant_type: str
    """nf4 or fp4"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols


class Dense(NamedTuple):
    """A 16 or 32-bit matrix."""

    weight: torch.Tensor
    """[rows, cols]"""

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.weight.shape
        return rows, cols


def base_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The frozen linear layers of a causal LM by their name in the base model, with PEFT's wrappers looked through."""
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, nn.Linear) and not any(p in ("lora_A", "lora_B") for p in parts):
            found[".".join(p for p in parts if p != "base_layer")] = module
    return found


def _state(module: nn.Linear) -> Any:
    """bitsandbytes' QuantState of a 4-bit layer."""
    weight: Any = module.weight
    return weight.quant_state


def expand_scales(module: nn.Linear) -> None:
    """Replace a 4-bit layer's doubly quantised scales by their fp32 values, in place. Changes no product."""
    if not isinstance(module, bnb.nn.Linear4bit):
        return
    state = _state(module)
    if state is None:
        raise ValueError("a 4-bit layer is not quantised yet: move the model to its device before it is shared")
    if state.nested:
        state.absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        state.nested, state.state2, state.offset = False, None, None


def matrix(module: nn.Linear) -> Quantized | Dense:
    """The layer's weight as it is stored, without a copy."""
    if not isinstance(module, bnb.nn.Linear4bit):
        return Dense(module.weight.data)
    state = _state(module)
    rows, cols = state.shape
    return Quantized(module.weight.data.view(-1), state.absmax, rows, cols, state.blocksize, state.quant_type)


def share(modules: Sequence[nn.Linear]) -> list[Quantized | Dense]:
    """The layers' weights, joined by rows in the order given wherever that is exact, without a second copy.

    Neighbours of one kind become views of one new buffer and are returned as one matrix; where kinds meet (a
    dynamic checkpoint that leaves some layers in 16 bits) there are several. Concatenated, their rows are those
    of the layers. Peak extra memory: one such buffer."""
    runs: list[list[nn.Linear]] = []
    for module in modules:
        expand_scales(module)
        if runs and _joinable(matrix(runs[-1][-1]), matrix(module)):
            runs[-1].append(module)
        else:
            runs.append([module])
    return [matrix(run[0]) if len(run) == 1 else _join(run) for run in runs]


def _joinable(a: Quantized | Dense, b: Quantized | Dense) -> bool:
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        same = (a.cols, a.blocksize, a.quant_type) == (b.cols, b.blocksize, b.quant_type)
        return same and a.rows * a.cols % a.blocksize == 0
    if isinstance(a, Dense) and isinstance(b, Dense):
        return a.weight.dtype == b.weight.dtype and a.weight.shape[1] == b.weight.shape[1]
    return False


def _join(modules: list[nn.Linear]) -> Quantized | Dense:
    parts = [matrix(m) for m in modules]
    if all(isinstance(p, Dense) for p in parts):
        joined = torch.cat([p.weight for p in parts if isinstance(p, Dense)])
        for module, view in zip(modules, joined.split([m.out_features for m in modules])):
            module.weight.data = view
        return Dense(joined)
    quantized = [p for p in parts if isinstance(p, Quantized)]
    packed = torch.cat([p.packed for p in quantized])
    absmax = torch.cat([p.absmax for p in quantized])
    views = zip(
        packed.split([p.packed.numel() for p in quantized]), absmax.split([p.absmax.numel() for p in quantized])
    )
    for module, (packed_view, absmax_view) in zip(modules, views):
        module.weight.data = packed_view.view(module.weight.data.shape)
        _state(module).absmax = absmax_view
    rows = sum(p.rows for p in quantized)
    return quantized[0]._replace(packed=packed, absmax=absmax, rows=rows)


def dequantized(weight: Quantized | Dense, dtype: torch.dtype) -> torch.Tensor:
    """[rows, cols] in `dtype`: a new tensor for a quantised matrix, the matrix itself for a dense one of that dtype."""
    if isinstance(weight, Dense):
        return weight.weight.to(dtype)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed.view(-1, 1), weight.absmax, weight.blocksize, weight.quant_type, (weight.rows, weight.cols), dtype
    )
