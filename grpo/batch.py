"""From ragged token ids to padded tensors. Ids go in and ids come out; every mask is made from lengths.

A sequence is its prompt followed at once by its completion, padded on the right. Under causal attention nothing
real looks right, so no attention mask is needed, positions are 0, 1, 2, ..., and padding cannot change a value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from grpo.distributed import World, all_sum


class MicroBatch(NamedTuple):
    """Some whole sequences of an optimizer step, as tensors on one device. `time` counts completion tokens."""

    ids: torch.Tensor
    """[batch, prompt + time] int64, prompt then completion, padded on the right"""
    prompt_lengths: torch.Tensor
    """[batch] int64"""
    mask: torch.Tensor
    """[batch, time] float32, 1 at completion tokens, the EOS included"""
    sampler_logps: torch.Tensor
    """[batch, time] float32, nats, the engine's log-probabilities; 0 at padding"""
    advantages: torch.Tensor
    """[batch] float32"""
    sequences: list[int]
    """which sequences of the step these are"""


def micro_batches(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampler_logps: Sequence[Sequence[float]],
    advantages: torch.Tensor,
    *,
    max_tokens: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    keep: Sequence[bool] | None = None,
) -> list[MicroBatch]:
    """Cut a step's sequences into micro-batches of at most `max_tokens` padded tokens (at least one sequence).

    prompts, completions, sampler_logps: one entry a sequence. advantages: [sequences] float32, or one a token,
    [sequences, time], of which a micro-batch takes the columns of its longest completion.
    keep: sequences to take (None: all); what is left out still counts in the step's averages, if the caller
    counts it (`step_counts`). The longest sequences come first: memory that does not suffice shows at once,
    and neighbours in length share a micro-batch, so little is padding. Sequences of advantage 0 come last, in
    micro-batches of their own: without KL and entropy bonus these need no backward pass (`completion_logps`).
    Raises ValueError where the lists differ in length, a prompt or completion is empty, or has more tokens than
    advantages."""
    n = len(prompts)
    if not len(completions) == len(sampler_logps) == len(advantages) == n:
        raise ValueError(
            f"{n} prompts, {len(completions)} completions, {len(sampler_logps)} lists of log-probabilities "
            f"and {len(advantages)} advantages: one of each a sequence is needed"
        )
    for i in range(n):
        if not prompts[i] or not completions[i]:
            raise ValueError(f"sequence {i} has an empty {'completion' if prompts[i] else 'prompt'}")
        if len(completions[i]) != len(sampler_logps[i]):
            tokens, logps = len(completions[i]), len(sampler_logps[i])
            raise ValueError(f"sequence {i} has {tokens} tokens but {logps} log-probabilities")

    lengths = [len(p) + len(c) for p, c in zip(prompts, completions)]
    longest = max(map(len, completions), default=0)
    if advantages.dim() == 2 and advantages.shape[1] < longest:
        raise ValueError(f"advantages is {list(advantages.shape)}: the longest completion has {longest} tokens")
    idle = (advantages.reshape(n, -1) == 0).all(1).tolist()
    order = sorted((i for i in range(n) if keep is None or keep[i]), key=lambda i: (idle[i], -lengths[i]))
    groups: list[list[int]] = []
    for i in order:
        first = groups[-1][0] if groups else i
        if groups and idle[i] == idle[first] and (len(groups[-1]) + 1) * lengths[first] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_collate(prompts, completions, sampler_logps, advantages, group, pad_id, device) for group in groups]


def _collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampler_logps: Sequence[Sequence[float]],
    advantages: torch.Tensor,
    group: list[int],
    pad_id: int,
    device: torch.device | str,
) -> MicroBatch:
    width = max(len(prompts[i]) + len(completions[i]) for i in group)
    time = max(len(completions[i]) for i in group)
    ids = torch.full((len(group), width), pad_id)
    mask = torch.zeros(len(group), time)
    logps = torch.zeros(len(group), time)
    for row, i in enumerate(group):
        p, c = len(prompts[i]), len(completions[i])
        ids[row, : p + c] = torch.tensor([*prompts[i], *completions[i]])
        mask[row, :c] = 1.0
        logps[row, :c] = torch.tensor(sampler_logps[i])
    lengths = torch.tensor([len(prompts[i]) for i in group])
    of_group = advantages[group].float()
    return MicroBatch(
        ids.to(device),
        lengths.to(device),
        mask.to(device),
        logps.to(device),
        (of_group if of_group.dim() == 1 else of_group[:, :time]).to(device),
        group,
    )


def step_counts(completions: Sequence[Sequence[int]], world: World | None = None) -> tuple[int, int]:
    """(completion tokens, sequences) of the whole optimizer step, over all ranks: what every loss is divided by,
    so that micro-batches and ranks add up to exactly the gradient of one big batch."""
    world = world or World()
    counts = torch.tensor([sum(len(c) for c in completions), len(completions)], device=world.device)
    tokens, sequences = all_sum(counts, world).tolist()
    return tokens, sequences
