"""From ragged token ids to padded tensors. Ids go in and ids come out; every mask is made from lengths.

A sequence is its prompt followed at once by its completion, padded on the right. Under causal attention no real token
looks to the right, so no attention mask is needed, positions are 0, 1, 2, ..., and padding cannot change a value: any
id will do, and it is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from grpo.distributed import World, all_sum
from grpo.errors import UserError
from grpo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import Objective
    from grpo.sampler import Samples


class StepTotals(NamedTuple):
    """What the losses of one optimizer step are divided by: totals over all micro-batches and all ranks."""

    tokens: Tensor | int
    """completion tokens that count"""
    sequences: Tensor | int
    """completions that count"""
    max_completion_tokens: int | None
    """limit of a completion, by which Dr. GRPO divides"""


class MicroBatch(NamedTuple):
    """Some whole sequences of an optimizer step, as tensors on one device. `time` counts completion tokens."""

    ids: Tensor
    """[batch, prompt + time] int64, prompt then completion, padded on the right"""
    prompt_lengths: Tensor
    """[batch] int64"""
    mask: Tensor
    """[batch, time] float32, 1 at completion tokens, the EOS included"""
    sampler_logps: Tensor | None
    """[batch, time] float32, nats, the engine's log-probabilities; 0 at padding. None: not known"""
    advantages: Tensor
    """[batch] float32, or [batch, time]"""
    sequences: list[int]
    """indices of these sequences among the step's samples"""
    step: StepTotals
    """totals of the whole optimizer step"""
    needs_grad: Tensor | None = None
    """[batch] bool, the sequences whose gradient can differ from 0; None: all"""


class StepBatch(NamedTuple):
    """The samples of one optimizer step on this rank, in micro-batches."""

    micros: list[MicroBatch]
    """micro-batches whose gradients add up to that of one big batch; none where no sample counts"""
    tokens: int
    """completion tokens that count, over all ranks"""


def make_batch(
    samples: Samples,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    max_tokens: int,
    world: World,
    *,
    every_gradient: bool = False,
) -> StepBatch:
    """Divide a step's samples into micro-batches that know the totals of the step.

    advantages: [samples], or [samples, time] for one per token. mask: [samples] bool, the samples that count
    (`grpo.advantages.sample_mask`). max_tokens: padded tokens of one micro-batch. Every rank must call it.

    Without KL penalty and entropy bonus a sequence of advantage 0 has no gradient under any loss of `grpo.losses`, so
    it gets no backward pass (`MicroBatch.needs_grad`). every_gradient: True gives it one, for a loss of your own that
    is not proportional to the advantage; `grpo.objective.merge_metrics` refuses such a loss without it."""
    completions = [completion.token_ids for completion in samples.completions]
    counted = [ids for ids, counts in zip(completions, mask.tolist()) if counts]
    tokens, sequences = step_counts(counted, world)
    micros = micro_batches(
        samples.prompts,
        completions,
        [completion.logps for completion in samples.completions],
        advantages,
        max_tokens=max_tokens,
        step=StepTotals(tokens, sequences, samples.max_completion_tokens),
        device=world.device,
        keep=mask.tolist(),
    )
    if not (objective.beta or objective.entropy_bonus or every_gradient):
        micros = [micro._replace(needs_grad=rows_with_gradient(micro)) for micro in micros]
    return StepBatch(micros, tokens)


def step_counts(completions: Sequence[Sequence[int]], world: World | None = None) -> tuple[int, int]:
    """(completion tokens, sequences) of the whole optimizer step, over all ranks.

    Every loss is divided by them, so that micro-batches and ranks add up to exactly the gradient of one big batch."""
    world = world or World()
    counts = torch.tensor([sum(len(c) for c in completions), len(completions)], device=world.device)
    tokens, sequences = all_sum(counts, world).tolist()
    return tokens, sequences


def micro_batches(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampler_logps: Sequence[Sequence[float]],
    advantages: Tensor,
    *,
    max_tokens: int,
    step: StepTotals,
    device: torch.device | str = "cpu",
    keep: Sequence[bool] | None = None,
) -> list[MicroBatch]:
    """Divide a step's sequences into micro-batches of at most `max_tokens` padded tokens (at least one sequence).

    prompts, completions, sampler_logps: one entry per sequence. advantages: [sequences] float32, or one per token,
    [sequences, time], of which a micro-batch takes the columns of its longest completion. keep: the sequences to take;
    None takes all.

    The longest sequences come first: memory that does not suffice shows at once, and neighbours in length share a
    micro-batch, so little of it is padding. Sequences of advantage 0 come last, in micro-batches of their own: without
    KL penalty and entropy bonus those need no backward pass.
    Raises UserError where the lists differ in length, a prompt or completion is empty, or has more tokens than
    advantages."""
    n = len(prompts)
    if not len(completions) == len(sampler_logps) == len(advantages) == n:
        raise UserError(
            f"{n} prompts, {len(completions)} completions, {len(sampler_logps)} lists of log-probabilities "
            f"and {len(advantages)} advantages: one of each is needed per sequence"
        )
    for i in range(n):
        if not prompts[i] or not completions[i]:
            raise UserError(f"sequence {i} has an empty {'completion' if prompts[i] else 'prompt'}")
        if len(completions[i]) != len(sampler_logps[i]):
            tokens, logps = len(completions[i]), len(sampler_logps[i])
            raise UserError(f"sequence {i} has {tokens} tokens but {logps} log-probabilities")

    lengths = [len(p) + len(c) for p, c in zip(prompts, completions)]
    longest = max(map(len, completions), default=0)
    if advantages.dim() == 2 and advantages.shape[1] < longest:
        raise UserError(f"advantages is {list(advantages.shape)}: the longest completion has {longest} tokens")
    zero_advantage = (advantages.reshape(n, -1) == 0).all(1).tolist()
    order = sorted((i for i in range(n) if keep is None or keep[i]), key=lambda i: (zero_advantage[i], -lengths[i]))
    groups: list[list[int]] = []
    for i in order:
        first = groups[-1][0] if groups else i
        fits = groups and (len(groups[-1]) + 1) * lengths[first] <= max_tokens
        if fits and zero_advantage[i] == zero_advantage[first]:
            groups[-1].append(i)
        else:
            groups.append([i])

    def pad(group: list[int]) -> MicroBatch:
        width = max(lengths[i] for i in group)
        time = max(len(completions[i]) for i in group)
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        mask, logps = torch.zeros(len(group), time), torch.zeros(len(group), time)
        for row, i in enumerate(group):
            ids[row, : lengths[i]] = torch.tensor([*prompts[i], *completions[i]])
            mask[row, : len(completions[i])] = 1.0
            logps[row, : len(completions[i])] = torch.tensor(sampler_logps[i])
        prompt_lengths = torch.tensor([len(prompts[i]) for i in group])
        of_group = advantages[group].float()
        of_group = of_group if of_group.dim() == 1 else of_group[:, :time]
        ids, prompt_lengths, mask, logps, of_group = (
            tensor.to(device) for tensor in (ids, prompt_lengths, mask, logps, of_group)
        )
        return MicroBatch(ids, prompt_lengths, mask, logps, of_group, group, step)

    return [pad(group) for group in groups]


def rows_with_gradient(micro: MicroBatch) -> Tensor:
    """[batch] bool: the sequences to which a policy loss gives a gradient.

    Every loss of `grpo.losses` is proportional to the advantage of its token, at level 'sequence' to those of the
    sequence's tokens, so a sequence whose advantages are all 0 has none."""
    advantages = micro.advantages[:, None] if micro.advantages.dim() == 1 else micro.advantages
    return ((advantages != 0) & micro.mask.bool()).any(-1)
