"""The places of a LoRA adapter's tensors in a sampler's stacked adapter buffers, and the copy that fills them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from grpo.errors import UserError


class Adapter(NamedTuple):
    """The adapter of one linear layer: y += scaling * x A^T B^T."""

    a: torch.Tensor
    """[rank, in]"""
    b: torch.Tensor
    """[out, rank]"""
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA"""


class Slot(NamedTuple):
    """The sampler's buffers for the adapter of one linear layer: y += x A^T B^T, so B includes the scaling."""

    a: torch.Tensor
    """[largest rank, in]"""
    b: torch.Tensor
    """[out, largest rank]"""


class Pair(NamedTuple):
    """The adapter of one layer, and its slot."""

    name: str
    """name of the layer in the base model"""
    adapter: Adapter
    slot: Slot
    """views of the sampler's buffers, cut to the adapter's rank"""


def adapters(model: nn.Module, name: str = "default") -> dict[str, Adapter]:
    """The PEFT adapter called `name`, by the layers' names in the base model.

    The tensors are the parameters themselves, not copies. Raises UserError for an adapter that a plain low-rank product
    cannot express (DoRA, a bias)."""
    found: dict[str, Adapter] = {}
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in modules:
        lora_a = getattr(module, "lora_A", None)
        if not isinstance(lora_a, nn.ModuleDict) or name not in lora_a:
            continue
        if name in getattr(module, "lora_magnitude_vector", {}):
            raise UserError(
                f"the adapter of {path} is DoRA, which the vLLM engine cannot apply; make the adapter with "
                "use_dora=False, or take --engine torch"
            )
        if module.lora_B[name].bias is not None:
            raise UserError(
                f"the adapter of {path} has a bias, which the vLLM engine cannot apply; make the adapter with "
                "lora_bias=False, or take --engine torch"
            )
        a: Any = lora_a[name]
        found[path] = Adapter(a.weight, module.lora_B[name].weight, float(module.scaling[name]))
    if not found:
        raise ValueError(f"the model has no LoRA adapter named {name!r}: load it with load_policy")
    return found


def layers_of(module: str, merged: Mapping[str, list[str]]) -> list[str]:
    """The trainer's layers that a module of the sampler stands for, in the order of its rows.

    merged: {"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}; a module that is not in there stands for itself."""
    parent, _, leaf = module.rpartition(".")
    return [f"{parent}.{layer}" if parent else layer for layer in merged.get(leaf, [leaf])]


def pair_slots(slots: Mapping[str, Slot], layers: Mapping[str, Adapter]) -> list[Pair]:
    """Pair the adapter of each layer with its slot. Both mappings have the layers' names in the base model as keys.

    Raises UserError where a layer has no slot (the sampler would silently ignore its adapter), and ValueError where a
    shape does not fit."""
    missing = sorted(layers.keys() - slots.keys())
    if missing:
        raise UserError(
            f"the sampler has no adapter slot for {len(missing)} layers, the first of them {missing[0]}; "
            "leave them out of --lora-targets"
        )
    pairs = []
    for name, adapter in layers.items():
        slot = slots[name]
        rank = adapter.a.shape[0]
        if rank > slot.a.shape[0]:
            raise ValueError(f"{name}: adapter of rank {rank} in a slot of rank {slot.a.shape[0]}; raise max_lora_rank")
        cut = Slot(slot.a[:rank], slot.b[:, :rank])
        if cut.a.shape != adapter.a.shape or cut.b.shape != adapter.b.shape:
            raise ValueError(
                f"{name}: adapter A {list(adapter.a.shape)}, B {list(adapter.b.shape)} do not fit the slot's "
                f"{list(cut.a.shape)}, {list(cut.b.shape)}: the sampler runs another model than the trainer"
            )
        pairs.append(Pair(name, adapter, cut))
    return pairs


@torch.no_grad()
def copy_adapter(pairs: list[Pair]) -> None:
    """Write every A, and every B times its scaling, into its slot: a few launches for all layers, no host copy."""
    b, scaling = [p.adapter.b for p in pairs], [p.adapter.scaling for p in pairs]
    if any(s != 1.0 for s in scaling):
        b = list(torch._foreach_mul(b, scaling))  # in the adapter's own precision; the copy rounds once
    torch._foreach_copy_([p.slot.a for p in pairs], [p.adapter.a for p in pairs])
    torch._foreach_copy_([p.slot.b for p in pairs], b)


@torch.no_grad()
def mismatched(pairs: list[Pair]) -> list[str]:
    """Names of the layers whose slot does not hold exactly what `copy_adapter` would write there now."""
    differs = []
    for _, adapter, slot in pairs:
        b = adapter.b if adapter.scaling == 1.0 else adapter.b * adapter.scaling
        differs.append((slot.a != adapter.a.to(slot.a.dtype)).any() | (slot.b != b.to(slot.b.dtype)).any())
    return [pair.name for pair, differ in zip(pairs, torch.stack(differs).tolist()) if differ]
