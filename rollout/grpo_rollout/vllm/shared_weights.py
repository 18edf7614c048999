"""One copy of the frozen weights: the trainer's linear layers and a sampler's fused ones as views of the same storage.

Samplers keep q, k and v (and gate and up) as one matrix. Here such neighbours are moved, in place, into one
buffer that the trainer's modules become views of. NF4 data is a flat sequence of blocks of 64 weights, so joining
matrices by rows is joining their bytes and scales, exact as long as each matrix is a whole number of blocks. So it
is for doubly quantized scales where seams fall between their blocks of 256 (16,384 weights), each of which then keeps
its own matrix's offset. In models so small that they do not, the scales are expanded to fp32 first (0.5 bits a weight
instead of 0.127), the same values that bitsandbytes computes again at every product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

from grpo_kernels.nf4.dequantize import NestedAbsmax


class Quantized(NamedTuple):
    """A 4-bit matrix [rows, cols] in bitsandbytes' layout."""

    packed: torch.Tensor
    """[rows * cols / 2] uint8, two weights a byte, the first in the high half"""
    absmax: torch.Tensor | NestedAbsmax
    """[rows * cols / blocksize], the scale of each block of consecutive weights: float32, or doubly quantized"""
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


NESTED_BLOCK = 256
"""scales that share one second-level scale"""


def expand_scales(module: nn.Linear) -> None:
    """Replace a 4-bit layer's doubly quantized scales by their fp32 values, in place. Changes no product."""
    state = _state(module)
    if state.nested:
        state.absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        state.nested, state.state2, state.offset = False, None, None


def matrix(module: nn.Linear) -> Quantized | Dense:
    """The layer's weight as it is stored, without a copy. Scales doubly quantized in another way than bitsandbytes'
    usual one are expanded."""
    if not isinstance(module, bnb.nn.Linear4bit):
        return Dense(module.weight.data)
    state = _state(module)
    if state is None:
        raise ValueError("a 4-bit layer is not quantized yet: move the model to its device before it is shared")
    if state.nested and state.state2.blocksize != NESTED_BLOCK:
        expand_scales(module)
    absmax = state.absmax
    if state.nested:
        offset = torch.as_tensor(state.offset, dtype=torch.float32, device=absmax.device)
        absmax = NestedAbsmax(absmax, state.state2.code, state.state2.absmax, offset)
    rows, cols = state.shape
    return Quantized(module.weight.data.view(-1), absmax, rows, cols, state.blocksize, state.quant_type)


def share(modules: Sequence[nn.Linear]) -> list[Quantized | Dense]:
    """The layers' weights, joined by rows in the order given wherever that is exact, without a second copy.

    Neighbours of one kind become views of one new buffer and are returned as one matrix; where kinds meet (a
    dynamic checkpoint that leaves some layers in 16 bits) there are several. Concatenated, their rows are those
    of the layers. Peak extra memory: one such buffer."""
    runs: list[list[nn.Linear]] = []
    for module in modules:
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
    if not _nested_joinable(quantized):
        for module in modules:
            expand_scales(module)
        quantized = [p for p in map(matrix, modules) if isinstance(p, Quantized)]
    packed, views = _cat([p.packed for p in quantized])
    for module, view in zip(modules, views):
        module.weight.data = view.view(module.weight.data.shape)
    rows = sum(p.rows for p in quantized)
    return quantized[0]._replace(packed=packed, absmax=_join_scales(modules, quantized), rows=rows)


def _nested_joinable(parts: list[Quantized]) -> bool:
    """Whether all scales are doubly quantized, alike, and in whole blocks up to the last matrix."""
    nested = [p.absmax for p in parts if isinstance(p.absmax, NestedAbsmax)]
    return (
        len(nested) == len(parts)
        and all(a.quantized.numel() % NESTED_BLOCK == 0 for a in nested[:-1])
        and all(torch.equal(a.code, nested[0].code) for a in nested[1:])
    )


def _join_scales(modules: list[nn.Linear], parts: list[Quantized]) -> torch.Tensor | NestedAbsmax:
    """The parts' scales in one buffer, which the modules' become views of. A few bytes of it are new: offsets."""
    nested = [p.absmax for p in parts if isinstance(p.absmax, NestedAbsmax)]
    absmax, views = _cat([p.absmax.quantized if isinstance(p.absmax, NestedAbsmax) else p.absmax for p in parts])
    for module, view in zip(modules, views):
        _state(module).absmax = view
    if not nested:
        return absmax
    outer, outer_views = _cat([a.absmax for a in nested])
    for module, view in zip(modules, outer_views):
        _state(module).state2.absmax = view
    return NestedAbsmax(absmax, nested[0].code, outer, torch.cat([a.offset.expand(len(a.absmax)) for a in nested]))


def _cat(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One buffer, and the views of it that take the tensors' places."""
    joined = torch.cat(tensors)
    return joined, joined.split([t.numel() for t in tensors])


def scales(weight: Quantized) -> torch.Tensor:
    """[rows * cols / blocksize] float32, bit for bit what bitsandbytes makes of each of the joined layers."""
    absmax = weight.absmax
    if not isinstance(absmax, NestedAbsmax):
        return absmax
    inner = torch.ops.bitsandbytes.dequantize_blockwise.default(
        absmax.quantized, absmax.absmax, absmax.code, NESTED_BLOCK, torch.float32
    )
    if absmax.offset.dim() == 0:
        return inner + absmax.offset
    return inner + absmax.offset.repeat_interleave(NESTED_BLOCK)[: inner.numel()]


def dequantized(weight: Quantized | Dense, dtype: torch.dtype) -> torch.Tensor:
    """[rows, cols] in `dtype`: a new tensor for a quantized matrix, the matrix itself for a dense one of that dtype."""
    if isinstance(weight, Dense):
        return weight.weight.to(dtype)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed.view(-1, 1), scales(weight), weight.blocksize, weight.quant_type, weight.shape, dtype
    )
