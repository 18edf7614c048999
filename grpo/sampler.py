"""Which questions a step sees: a function of seed, step and rank, so that a resumed run sees the same ones."""

import torch

from grpo.runs.cli import check_prompts_per_step


def prompt_indices(
    seed: int, step: int, prompts_per_step: int, dataset_size: int, *, rank: int = 0, world_size: int = 1
) -> list[int]:
    """The indices of this rank's questions at one step.

    The data are shuffled anew each epoch; step `s` (from 0) takes the entries `s * prompts_per_step` onward of
    the endless concatenation of the epochs, so every question is seen once before any is seen twice. Rank `r`
    takes every `world_size`-th of them from the `r`-th: together the ranks see what one process alone would.

    seed, step: non-negative. prompts_per_step: of all ranks together, a multiple of world_size.
    Returns prompts_per_step / world_size indices in [0, dataset_size).
    Raises ValueError, naming the flag, where the numbers do not fit."""
    if dataset_size < 1:
        raise ValueError("no training questions: the data set is empty after filtering; check --data and the lengths")
    check_prompts_per_step(prompts_per_step, world_size)
    positions = range(step * prompts_per_step + rank, (step + 1) * prompts_per_step, world_size)
    shuffles: dict[int, list[int]] = {}
    indices = []
    for position in positions:
        epoch, offset = divmod(position, dataset_size)
        if epoch not in shuffles:
            # Seeds of different (seed, epoch) must not collide: seed 0 epoch 1 is not seed 1 epoch 0.
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
            shuffles[epoch] = torch.randperm(dataset_size, generator=generator).tolist()
        indices.append(shuffles[epoch][offset])
    return indices
