"""The few collectives that GRPO needs. Every quantity is a function of rank and world size; in a single process each
collective is the identity."""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.lazy import torch


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int = 0
    size: int = 1
    """number of processes"""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """device of this process"""


def init_distributed() -> World:
    """Join the processes that `torchrun` started (its environment variables tell), or be the only one.

    Each process drives one GPU (`LOCAL_RANK`) and talks over NCCL; without a GPU the processes talk over gloo."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    if not torch.distributed.is_initialized():
        # The first optimizer imports this module. Imported after the group exists, its functions would take the group
        # as a default argument and hold it for good, and gloo's threads would outlive `_leave`.
        importlib.import_module("torch.distributed.nn")
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        atexit.register(_leave)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _leave() -> None:
    """End gloo's threads before the interpreter ends. A thread that asks for the interpreter's lock afterwards is
    unwound, and the process sometimes aborts (`terminate called without an active exception`)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_sum(values: torch.Tensor, world: World) -> torch.Tensor:
    """A new tensor: the elementwise sum over ranks of a tensor that has the same shape on every rank."""
    values = values.clone()
    if world.size > 1:
        torch.distributed.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Sum `.grad` over ranks in place.

    The sum and not the mean, because each rank's loss is already divided by the counts of the whole optimizer step: the
    sum is the gradient of one big batch. A parameter without a gradient gets zeros, in a single process too, so that
    the optimizer's next step is the same however the step was divided into ranks and micro-batches."""
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world.size == 1:
        return
    gradients: list[torch.Tensor] = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in gradients])  # one collective rather than one per parameter
    torch.distributed.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(total.view_as(gradient))


def all_gather(value: Any, world: World) -> list[Any]:
    """The values of all ranks, in order, on every rank. A value is any picklable object."""
    values: list[Any] = [value] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def all_means(columns: Mapping[str, Sequence[float | Exception | None]], world: World) -> dict[str, float]:
    """The mean of each column over the entries of all ranks; NaN for a column without entries.

    None, and an exception that a reward gives in place of a number, are left out. Every rank must call it with the same
    names; the columns may differ in length."""
    found = [[v for v in c if v is not None and not isinstance(v, Exception)] for c in columns.values()]
    sums = torch.tensor([[sum(f), len(f)] for f in found], dtype=torch.float64)
    totals = all_sum(sums.to(world.device), world).tolist()
    return {name: total / count if count else float("nan") for name, (total, count) in zip(columns, totals)}
