"""Where each tensor of a LoRA adapter goes in a sampler's stacked adapter buffers, and the copy that puts it there."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Adapter(NamedTuple):
    """The adapter of one linear layer: y += scaling * x A^T B^T."""

    a: torch.Tensor
    """[rank, in]"""
    b: torch.Tensor
    """[out, rank]"""
    scaling: float
    """alpha / rank, or whatever the adapter's kind makes of it"""


class Slot(NamedTuple):
    """Room for one linear layer's adapter; the sampler computes y += x A^T B^T, so B holds the scaling."""

    a: torch.Tensor
    """[largest rank, in]"""
    b: torch.Tensor
    """[out, largest rank]"""


class Move(NamedTuple):
    """One layer's adapter and the views of its slot, cut to its rank."""

    name: str
    adapter: Adapter
    slot: Slot


def adapters(model: nn.Module, name: str = "default") -> dict[str, Adapter]:
    """The PEFT adapter called `name`, layer by layer, under the layers' names in the base model.

    The tensors are the parameters themselves, not copies. Raises ValueError for what a plain low-rank product
    cannot express (DoRA, a bias)."""
    found: dict[str, Adapter] = {}
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in modules:
        lora_a = getattr(module, "lora_A", None)
        if not isinstance(lora_a, nn.ModuleDict) or name not in lora_a:
            continue
        if name in getattr(module, "lora_magnitude_vector", {}):
            raise ValueError(f"the adapter of {path} is DoRA, which the sampler cannot apply: use_dora=False")
        if module.lora_B[name].bias is not None:
            raise ValueError(f"the adapter of {path} has a bias, which the sampler cannot apply: lora_bias=False")
        a: Any = lora_a[name]
        found[path] = Adapter(a.weight, module.lora_B[name].weight, float(module.scaling[name]))
    if not found:
        raise ValueError(f"the model has no LoRA adapter named {name!r}: load it with load_policy")
    return found


def slices(module: str, members: Mapping[str, list[str]]) -> list[str]:
    """The layers that a sampler's (possibly fused) module stands for, in the order of its slices.

    members: {"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}; a module not in there stands for itself."""
    parent, _, leaf = module.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in members.get(leaf, [leaf])]


def plan(slots: Mapping[str, Slot], sources: Mapping[str, Adapter]) -> list[Move]:
    """Pair each layer's adapter with its slot. Both are keyed by the layer's name in the base model.

    Raises ValueError where a layer has no slot (the sampler would silently ignore it), or a shape does not fit."""
    missing = sorted(sources.keys() - slots.keys())
    if missing:
        raise ValueError(
            f"the sampler has no adapter slot for {len(missing)} layers, the first {missing[0]}; "
            "leave them out of --lora-targets"
        )
    moves = []
    for name, source in sources.items():
        slot = slots[name]
        rank = source.a.shape[0]
        if rank > slot.a.shape[0]:
            raise ValueError(f"{name}: adapter of rank {rank} in a slot of rank {slot.a.shape[0]}; raise max_lora_rank")
        cut = Slot(slot.a[:rank], slot.b[:, :rank])
        if cut.a.shape != source.a.shape or cut.b.shape != source.b.shape:
            raise ValueError(
                f"{name}: adapter A {list(source.a.shape)}, B {list(source.b.shape)} do not fit the slot's "
                f"{list(cut.a.shape)}, {list(cut.b.shape)}: the sampler runs another model than the trainer"
            )
        moves.append(Move(name, source, cut))
    return moves


@torch.no_grad()
def copy_adapter(moves: list[Move]) -> None:
    """Write every A, and every B times its scaling, into its slot: a few launches for all layers, no host copy."""
    b, scaling = [m.adapter.b for m in moves], [m.adapter.scaling for m in moves]
    if any(s != 1.0 for s in scaling):
        b = list(torch._foreach_mul(b, scaling))  # in the adapter's own precision, rounded once by the copy
    torch._foreach_copy_([m.slot.a for m in moves], [m.adapter.a for m in moves])
    torch._foreach_copy_([m.slot.b for m in moves], b)


@torch.no_grad()
def stale(moves: list[Move]) -> list[str]:
    """The layers whose slot does not hold exactly what `copy_adapter` would write there now."""
    differs = []
    for _, source, slot in moves:
        b = source.b if source.scaling == 1.0 else source.b * source.scaling
        differs.append((slot.a != source.a.to(slot.a.dtype)).any() | (slot.b != b.to(slot.b.dtype)).any())
    return [m.name for m, d in zip(moves, torch.stack(differs).tolist()) if d]
