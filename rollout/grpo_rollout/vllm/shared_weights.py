"""One copy of the frozen weights: the trainer's linear layers and the sampler's merged ones are views of one storage.

Samplers keep q, k and v (and gate and up) as one matrix. Here such neighbours are moved, in place, into one buffer that
the trainer's modules become views of. NF4 data is a flat sequence of blocks of 64 weights, so merging matrices by rows
is concatenating their bytes and scales, which is exact as long as each matrix is a whole number of blocks.

Doubly quantized scales can be concatenated in the same way where the seams fall between their blocks of 256 (16,384
weights); each block then keeps the offset of its own matrix. Only models a few hundred values wide have seams inside a
block. There the scales are expanded to fp32 first (0.5 bits per weight instead of 0.127): the same values that
bitsandbytes computes again in every product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

from grpo.errors import UserError
from grpo_kernels.nf4.dequantize import NestedAbsmax

NESTED_BLOCK = 256
"""number of scales that share one second-level scale in bitsandbytes' double quantization"""
NEIGHBOURS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""names of the linear layers that vLLM merges into one, in the order of their rows"""


class Quantized(NamedTuple):
    """A 4-bit matrix [rows, cols] in bitsandbytes' layout."""

    packed: torch.Tensor
    """[rows * cols / 2] uint8, two weights per byte, the first one in the high half"""
    absmax: torch.Tensor | NestedAbsmax
    """[rows * cols / blocksize] scale of each block of consecutive weights: float32, or doubly quantized"""
    rows: int
    cols: int
    blocksize: int
    """number of consecutive weights that share a scale"""
    quant_type: str
    """nf4 or fp4"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols


class Dense(NamedTuple):
    """A matrix in 16 or 32 bits."""

    weight: torch.Tensor
    """[rows, cols]"""

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.weight.shape
        return rows, cols


def base_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The frozen linear layers of a causal LM, by their names in the base model (PEFT's wrappers left out)."""
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, nn.Linear) and not any(p in ("lora_A", "lora_B") for p in parts):
            found[".".join(p for p in parts if p != "base_layer")] = module
    return found


class MergedLinears:
    """The trainer's linear layers, merged as vLLM wants them, each of them once.

    The usual neighbours are merged when this is made: a buffer that is allocated later, while vLLM loads its model,
    would come from the memory pool of vLLM's allocator.

    linears: layers by name (`base_linears`)."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self.linears = linears
        self.merged: dict[tuple[str, ...], list[Quantized | Dense]] = {}
        """names of the layers that were merged -> their weights (see `share`)"""
        self.taken: set[str] = set()
        """names of the layers that `take` has given to vLLM"""
        for name in linears:
            parent, _, leaf = name.rpartition(".")
            neighbours = next((group for group in NEIGHBOURS if leaf in group), (leaf,))
            names = tuple(f"{parent}.{neighbour}" for neighbour in neighbours)
            if not all(n in linears for n in names):
                names = (name,)
            if names not in self.merged:
                self.merged[names] = share([linears[n] for n in names])

    def quantized(self, leaf: str = "") -> list[Quantized]:
        """The 4-bit matrices, or those whose last layer has a name that ends in `leaf`."""
        chosen = (weights for names, weights in self.merged.items() if names[-1].endswith(leaf))
        return [weight for weights in chosen for weight in weights if isinstance(weight, Quantized)]

    def take(self, names: Sequence[str]) -> tuple[list[Quantized | Dense], torch.Tensor | None]:
        """The weights of the named layers (see `share`), and their biases concatenated, or None without biases."""
        missing = [name for name in names if name not in self.linears]
        if missing:
            raise UserError(
                f"vLLM's model has a layer {missing[0]} that the trainer's model does not have; take --engine torch"
            )
        self.taken |= set(names)
        modules = [self.linears[name] for name in names]
        biases = [module.bias.data for module in modules if module.bias is not None]
        if tuple(names) not in self.merged:
            self.merged[tuple(names)] = share(modules)
        return self.merged[tuple(names)], torch.cat(biases) if biases else None


def share(modules: Sequence[nn.Linear]) -> list[Quantized | Dense]:
    """The layers' weights, merged by rows in the given order wherever that is exact, without a second copy.

    Neighbours of one kind become views of one new buffer and are returned as one matrix. Where kinds meet (a dynamic
    checkpoint leaves some layers in 16 bits), several matrices are returned, whose concatenated rows are the layers'
    rows. Peak extra memory: one such buffer."""
    runs: list[list[nn.Linear]] = []
    for module in modules:
        if runs and _can_be_merged(matrix(runs[-1][-1]), matrix(module)):
            runs[-1].append(module)
        else:
            runs.append([module])
    return [matrix(run[0]) if len(run) == 1 else _merge(run) for run in runs]


def matrix(module: nn.Linear) -> Quantized | Dense:
    """The layer's weight as it is stored, without a copy.

    Scales that are doubly quantized in blocks of another size than bitsandbytes' 256 are expanded in place."""
    if not isinstance(module, bnb.nn.Linear4bit):
        return Dense(module.weight.data)
    state = _quant_state(module)
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


def expand_scales(module: nn.Linear) -> None:
    """Replace the doubly quantized scales of a 4-bit layer by their fp32 values, in place. No product changes."""
    state = _quant_state(module)
    if state.nested:
        state.absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        state.nested, state.state2, state.offset = False, None, None


def scales(weight: Quantized) -> torch.Tensor:
    """[rows * cols / blocksize] float32 scales, equal to the bit to bitsandbytes' for each of the merged layers."""
    absmax = weight.absmax
    if not isinstance(absmax, NestedAbsmax):
        return absmax
    inner = torch.ops.bitsandbytes.dequantize_blockwise.default(
        absmax.quantized, absmax.absmax, absmax.code, NESTED_BLOCK, torch.float32
    )
    if absmax.offset.dim() == 0:
        return inner + absmax.offset
    return inner + absmax.offset.repeat_interleave(NESTED_BLOCK)[: inner.numel()]


def dequantize(weight: Quantized | Dense, dtype: torch.dtype) -> torch.Tensor:
    """[rows, cols] in `dtype`: a new tensor for a quantized matrix, the matrix itself for a dense one of that dtype."""
    if isinstance(weight, Dense):
        return weight.weight.to(dtype)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed.view(-1, 1), scales(weight), weight.blocksize, weight.quant_type, weight.shape, dtype
    )


def _can_be_merged(a: Quantized | Dense, b: Quantized | Dense) -> bool:
    """Whether the rows of `b` can follow those of `a` in one matrix."""
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        same_format = (a.cols, a.blocksize, a.quant_type) == (b.cols, b.blocksize, b.quant_type)
        return same_format and a.rows * a.cols % a.blocksize == 0
    if isinstance(a, Dense) and isinstance(b, Dense):
        return a.weight.dtype == b.weight.dtype and a.weight.shape[1] == b.weight.shape[1]
    return False


def _merge(modules: list[nn.Linear]) -> Quantized | Dense:
    """The weights of layers of one kind in one new buffer, which the layers become views of."""
    parts = [matrix(m) for m in modules]
    if all(isinstance(p, Dense) for p in parts):
        merged = torch.cat([p.weight for p in parts if isinstance(p, Dense)])
        for module, view in zip(modules, merged.split([m.out_features for m in modules])):
            module.weight.data = view
        return Dense(merged)
    quantized = [p for p in parts if isinstance(p, Quantized)]
    if not _scales_can_be_merged(quantized):
        for module in modules:
            expand_scales(module)
        quantized = [p for p in map(matrix, modules) if isinstance(p, Quantized)]
    packed, views = _concatenate([p.packed for p in quantized])
    for module, view in zip(modules, views):
        module.weight.data = view.view(module.weight.data.shape)
    rows = sum(p.rows for p in quantized)
    return quantized[0]._replace(packed=packed, absmax=_merge_scales(modules, quantized), rows=rows)


def _scales_can_be_merged(parts: list[Quantized]) -> bool:
    """Whether all scales are doubly quantized with the same code, and all but the last matrix in whole blocks."""
    nested = [p.absmax for p in parts if isinstance(p.absmax, NestedAbsmax)]
    return (
        len(nested) == len(parts)
        and all(a.quantized.numel() % NESTED_BLOCK == 0 for a in nested[:-1])
        and all(torch.equal(a.code, nested[0].code) for a in nested[1:])
    )


def _merge_scales(modules: list[nn.Linear], parts: list[Quantized]) -> torch.Tensor | NestedAbsmax:
    """The scales of the parts in one buffer, which the layers' scales become views of.

    The offsets, a few bytes, are copied: bitsandbytes keeps one per layer, the merged matrix one per block."""
    nested = [p.absmax for p in parts if isinstance(p.absmax, NestedAbsmax)]
    absmax, views = _concatenate(
        [p.absmax.quantized if isinstance(p.absmax, NestedAbsmax) else p.absmax for p in parts]
    )
    for module, view in zip(modules, views):
        _quant_state(module).absmax = view
    if not nested:
        return absmax
    outer, outer_views = _concatenate([a.absmax for a in nested])
    for module, view in zip(modules, outer_views):
        _quant_state(module).state2.absmax = view
    return NestedAbsmax(absmax, nested[0].code, outer, torch.cat([a.offset.expand(len(a.absmax)) for a in nested]))


def _concatenate(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One new buffer, and the views of it that take the places of the given flat tensors."""
    merged = torch.cat(tensors)
    return merged, merged.split([t.numel() for t in tensors])


def _quant_state(module: nn.Linear) -> Any:
    """bitsandbytes' QuantState of a 4-bit layer."""
    weight: Any = module.weight
    return weight.quant_state
