"""From rewards to advantages: each answer is compared with the other answers to its question.

PPO learns a value network to say how good an answer was to be expected. GRPO (arXiv 2402.03300) samples a group of
answers to each question and takes their mean reward instead:

    A = (reward - baseline) / scale        baseline: the group's mean; scale: the group's standard deviation + 1e-4

Samples are prompt-major: sample i belongs to group i // group_size. Rewards are grouped as [prompts, group], in
float64, with NaN where no reward could be had: such a sample gets advantage 0 and is left out of every mean and
standard deviation, as if the rest of its group had been sampled without it. Standard deviations divide by n - 1, as in
TRL and verl. docs/algorithm.md walks through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from einops import rearrange, repeat

from grpo.distributed import World, all_gather
from grpo.errors import UserError, flag
from grpo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.sampler import Samples

    Rewards = Sequence[float | None] | Tensor

EPS = 1e-4
"""added to every standard deviation, so that a group of nearly equal rewards does not explode"""


@dataclass(frozen=True)
class Advantage:
    """Flags of the advantage."""

    scale: Literal["group", "batch", "none"] = "group"
    """divisor of the advantages: standard deviation of the group (GRPO), of the batch, or no division (Dr. GRPO)"""
    baseline: Literal["mean", "rloo"] = "mean"
    """value subtracted from a reward: mean of its group, or of the group's other samples (rloo)"""
    aggregate: Literal["sum", "gdpo"] = "sum"
    """order for several reward functions: sum, then normalize; or normalize each within its group, then sum (gdpo)"""
    drop_zero_variance: bool = False
    """whether groups of equal rewards are left out of the averages (dynamic sampling without the resampling)"""
    mask_truncated: bool = False
    """whether completions cut off by the token limit are left out of averages and gradient (overlong filtering)"""

    def check(self) -> None:
        """Raise UserError for a flag that has no effect beside another, naming both."""
        for name in ("scale", "baseline"):
            value = getattr(self, name)
            if self.aggregate == "gdpo" and value != getattr(Advantage(), name):
                raise UserError(
                    f"{flag(name)} {value} has no effect with --aggregate gdpo, which normalizes by group and then by "
                    f"batch: drop one of the two"
                )


class Scores(NamedTuple):
    """The rewards of a step's samples, as `grpo.tasks.scoring.score` gives them."""

    total: list[float | None]
    """[samples] weighted sum of the functions; None where a function failed, or none had anything to say"""
    by_function: dict[str, list[float | None]]
    """each function's own values, [samples], without its weight"""
    weights: dict[str, float]
    """weight of each function in the total"""
    failures: list[Any]
    """the samples for which a function failed, with the reason"""


# ------------------------------------------------------------------------- the three pieces that a recipe composes


def group_rewards(scores: Scores, group_size: int, flags: Advantage) -> Tensor:
    """[prompts, group] float64: the rewards that are compared within a group; NaN where a sample has none.

    The weighted sum of the reward functions, or with --aggregate gdpo (GDPO, arXiv 2601.05242) the weighted sum of
    (r - group mean) / (group standard deviation + 1e-4) of each, so that a reward of small spread is not drowned by
    one of large spread. A function that did not score a sample adds 0 to that sum."""
    if flags.aggregate == "sum":
        return _grouped(scores.total, group_size)
    total: Tensor | float = 0.0
    missing = torch.tensor(True)
    for name, values in scores.by_function.items():
        rewards = _grouped(values, group_size)
        normalized = (rewards - _mean(rewards)) / (_std(rewards) + EPS)
        total = total + scores.weights[name] * normalized.nan_to_num(nan=0.0)
        missing = missing & rewards.isnan()
    return torch.where(missing, float("nan"), total)


def reward_baseline(rewards: Tensor, flags: Advantage, world: World | None = None) -> Tensor:
    """[prompts, group] or [prompts, 1]: the reward that was to be expected, which PPO would ask a value network for.

    The mean of the group (GRPO, arXiv 2402.03300); with --baseline rloo the mean of the group's other samples (arXiv
    2402.14740); with --aggregate gdpo the mean of the whole step over all ranks, each of which must call it."""
    if flags.aggregate == "gdpo":
        return _mean(_of_all_ranks(rewards, world))
    mean = _mean(rewards)
    if flags.baseline == "mean":
        return mean
    scored = (~rewards.isnan()).sum(1, keepdim=True)
    return mean - (rewards - mean) / (scored - 1).clamp(min=1)  # (n mean - r) / (n - 1), exact where all are equal


def reward_scale(rewards: Tensor, flags: Advantage, world: World | None = None) -> Tensor:
    """[prompts, 1] or [1, 1]: the divisor of the advantages.

    The standard deviation of the group + 1e-4; with --scale batch that of the whole step over all ranks, each of which
    must call it (arXiv 2508.08221); with --scale none 1 (Dr. GRPO, arXiv 2503.20783)."""
    if flags.scale == "none":
        return torch.ones(1, 1, dtype=rewards.dtype)
    whole_step = flags.scale == "batch" or flags.aggregate == "gdpo"
    return _std(_of_all_ranks(rewards, world) if whole_step else rewards) + EPS


def per_sample(advantages: Tensor) -> Tensor:
    """[prompts, group] advantages -> [samples] float32; 0 where there was no reward."""
    return rearrange(advantages, "prompts group -> (prompts group)").nan_to_num(nan=0.0).float()


# ------------------------------------------------------------------------------------------- other views of rewards


def group_advantages(
    rewards: Rewards,
    group_size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    baseline: Literal["mean", "rloo"] = "mean",
) -> Tensor:
    """[samples] float32: A = (reward - baseline) / scale, the composition that the recipes write out.

    rewards: [prompts * group_size], a list (None: not scored) or a tensor (NaN: not scored). The batch of scale 'batch'
    is these rewards. A group with fewer than two scored samples has advantage 0, since it has no baseline.
    Raises ValueError where the sizes do not fit or an option is unknown."""
    if scale not in ("group", "batch", "none"):
        raise UserError(f"scale is {scale!r}: choose 'group', 'batch' or 'none'")
    if baseline not in ("mean", "rloo"):
        raise UserError(f"baseline is {baseline!r}: choose 'mean' or 'rloo'")
    flags = Advantage(scale=scale, baseline=baseline)
    grouped = _grouped(rewards, group_size)
    return per_sample((grouped - reward_baseline(grouped, flags)) / reward_scale(grouped, flags))


def zero_variance_groups(rewards: Rewards, group_size: int) -> Tensor:
    """[prompts] bool: groups whose scored rewards are all equal, or that have fewer than two.

    All their advantages are 0, so they teach nothing: log their share. Dynamic sampling (DAPO, arXiv 2503.14476) drops
    them."""
    grouped = _grouped(rewards, group_size)
    scored = ~grouped.isnan()
    highest = torch.where(scored, grouped, -torch.inf).amax(1)
    lowest = torch.where(scored, grouped, torch.inf).amin(1)
    return highest <= lowest


def sample_mask(flags: Advantage, scores: Scores, samples: Samples) -> Tensor:
    """[samples] bool: the samples that count in the step's averages and give a gradient.

    All of them, unless --drop-zero-variance or --mask-truncated leaves some out: those are then as if they had not been
    sampled, except for their part in their group's baseline."""
    mask = torch.ones(len(scores.total), dtype=torch.bool)
    if flags.drop_zero_variance:
        dropped = zero_variance_groups(scores.total, samples.group_size)
        mask &= ~repeat(dropped, "prompts -> (prompts group)", group=samples.group_size)
    if flags.mask_truncated:
        mask &= ~torch.tensor(samples.truncated)
    return mask


# ---------------------------------------------------------------------------------------------------------- within


def _grouped(rewards: Rewards, group_size: int) -> Tensor:
    """[prompts, group_size] float64; NaN where not scored."""
    if group_size < 2:
        raise UserError(f"group_size is {group_size}: a baseline needs at least 2 samples per prompt")
    if isinstance(rewards, torch.Tensor):
        values = rewards.double()
    else:
        values = torch.tensor([float("nan") if r is None else float(r) for r in rewards], dtype=torch.float64)
    if values.dim() != 1 or len(values) == 0 or len(values) % group_size:
        raise UserError(f"rewards is {list(values.shape)}: must be [prompts * group_size] with group_size {group_size}")
    if values.isinf().any():
        raise UserError("rewards holds an infinity: return None or NaN for a sample that could not be scored")
    return rearrange(values, "(prompts group) -> prompts group", group=group_size)


def _of_all_ranks(rewards: Tensor, world: World | None) -> Tensor:
    """[1, samples of all ranks]: the rewards of the whole step, as one row."""
    return rearrange(torch.cat(all_gather(rewards, world or World())), "prompts group -> 1 (prompts group)")


def _mean(values: Tensor) -> Tensor:
    """[rows, 1] mean of the entries that are not NaN. It is exact where all entries of a row are equal, since it is
    taken of the differences to one of them: a group of equal rewards must have advantages of exactly 0."""
    scored = ~values.isnan()
    first = values.gather(1, scored.int().argmax(1, keepdim=True))
    differences = torch.where(scored, values - first, 0.0)
    return first + differences.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)


def _std(values: Tensor) -> Tensor:
    """[rows, 1] standard deviation over n - 1 of the entries that are not NaN; 0 for fewer than two."""
    scored = ~values.isnan()
    differences = torch.where(scored, values - _mean(values), 0.0)
    return (differences.square().sum(1, keepdim=True) / (scored.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
