"""The few collectives GRPO needs. Every quantity is a function of rank and world size; alone, each is the identity."""

import atexit
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class World(NamedTuple):
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


def init_distributed() -> World:
    """The processes `torchrun` started (its environment variables say so), or this one alone.

    One process drives one GPU (`LOCAL_RANK`), over NCCL; without a GPU they are CPU processes over gloo."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    if not dist.is_initialized():
        # Imported later (the first optimizer does), its functions would take the group for a default argument and hold
        # it for good: gloo's threads then outlive `_leave`.
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _leave() -> None:
    """gloo's threads must have ended before the interpreter does: one that asks for its lock afterwards is unwound, and
    now and then the process aborts when all its work is done (`terminate called without an active exception`)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(values: torch.Tensor, world: World) -> torch.Tensor:
    """The elementwise sum over ranks of a tensor of one shape on every rank; a new tensor."""
    values = values.clone()
    if world.size > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Sum `.grad` over ranks in place. Sum, not mean: each rank's loss is already divided by the counts of the
    whole optimizer step, so the sum is the gradient of the one big batch. A parameter without one gets zeros, on one
    rank too: the optimizer's next step then is the same however the step was cut into ranks and micro-batches."""
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world.size == 1:
        return
    gradients: list[torch.Tensor] = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in gradients])  # one collective, not one a parameter
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(total.view_as(gradient))


def all_gather(value: Any, world: World) -> list[Any]:
    """One entry a rank, on every rank: any picklable object."""
    values: list[Any] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def all_means(columns: Mapping[str, Sequence[float | Exception | None]], world: World) -> dict[str, float]:
    """The mean of each column over all ranks' entries; NaN for a column without any. Left out are None and what a
    reward gives in place of a number it could not have, an exception.

    Every rank must call it with the same names; the columns may differ in length."""
    found = [[v for v in c if v is not None and not isinstance(v, Exception)] for c in columns.values()]
    sums = torch.tensor([[sum(f), len(f)] for f in found], dtype=torch.float64)
    totals = all_sum(sums.to(world.device), world).tolist()
    return {name: total / count if count else float("nan") for name, (total, count) in zip(columns, totals)}
