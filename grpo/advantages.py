"""From rewards to advantages. Samples are prompt-major: sample i belongs to group i // group_size.

A reward of None or NaN means "could not be scored": its sample gets advantage 0 and is left out of every mean and
standard deviation, so the rest of its group is as if it had been sampled without it. Standard deviations divide by
n - 1, as in TRL and verl.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from grpo.distributed import World, all_gather
from grpo.tasks.rewards import Scores

Rewards = Sequence[float | None] | Tensor
Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "rloo"]


@dataclass(frozen=True)
class Estimator:
    """Flags of the advantage estimator."""

    scale: Scale = "group"
    """advantages are divided by the deviation of the group's rewards (GRPO), of the batch's, or not (none: Dr. GRPO)"""
    baseline: Baseline = "mean"
    """what is subtracted: the mean of the group, or of the group's other samples (rloo)"""
    aggregate: Literal["sum", "gdpo"] = "sum"
    """several reward functions: sum, then normalise; or normalise each in its group, then sum (gdpo)"""
    drop_zero_variance: bool = False
    """groups of equal rewards do not count in averages (dynamic sampling without the resampling)"""
    mask_truncated: bool = False
    """completions cut off by the token limit do not count and give no gradient (overlong filtering)"""


def check_estimator(estimator: Estimator) -> None:
    """Refuse flags that have no effect beside another: ValueError naming both."""
    if estimator.aggregate == "gdpo":
        for flag in ("scale", "baseline"):
            value = getattr(estimator, flag)
            if value != getattr(Estimator(), flag):
                raise ValueError(
                    f"--{flag} {value} has no effect with --aggregate gdpo, which normalises by group and then by "
                    f"batch: drop one of the two"
                )


def counted_samples(estimator: Estimator, zero_variance: Tensor, truncated: Sequence[bool]) -> Tensor:
    """[samples] bool: the samples that count in the step's averages and give gradient.

    zero_variance: [prompts] bool, see `zero_variance_groups`. truncated: one a sample. What is not counted must be
    left out of the masks and of the token and sequence counts alike: it is then as if it had not been sampled,
    but for its part in its group's baseline."""
    counted = torch.ones(len(truncated), dtype=torch.bool)
    if estimator.drop_zero_variance:
        group_size = len(truncated) // len(zero_variance)
        counted &= ~repeat(zero_variance.cpu(), "prompts -> (prompts group)", group=group_size)
    if estimator.mask_truncated:
        counted &= ~torch.tensor(truncated)
    return counted


def estimate_advantages(estimator: Estimator, scores: Scores, group_size: int, *, world: World | None = None) -> Tensor:
    """`group_advantages` of the total rewards or `gdpo_advantages` of each function's by its weight, as the flags say.

    scores: this rank's (`grpo.tasks.rewards.score`), whole groups; returns this rank's advantages, [samples] float32.
    world: "the batch" of --scale batch and --aggregate gdpo is the whole step's, of all ranks. Every rank must call it.
    """
    world = world or World()
    mine: list[Rewards] = [scores.total] if estimator.aggregate == "sum" else [*scores.by_function.values()]
    ranks = all_gather([_tensor(rewards) for rewards in mine], world)  # [ranks][functions][the rank's samples]
    step = [torch.cat(of_function) for of_function in zip(*ranks)]
    if estimator.aggregate == "gdpo":
        weights = [scores.weights[name] for name in scores.by_function]
        advantages = gdpo_advantages(step, group_size, weights=weights)
    else:
        advantages = group_advantages(step[0], group_size, scale=estimator.scale, baseline=estimator.baseline)
    return advantages.split([len(of_rank[0]) for of_rank in ranks])[world.rank]


def group_advantages(
    rewards: Rewards, group_size: int, *, scale: Scale = "group", baseline: Baseline = "mean", eps: float = 1e-4
) -> Tensor:
    """A = (r - b) / (s + eps), [prompts * group_size] float32.

    rewards: one a sample, a list (None: not scored) or a tensor (NaN: not scored), [prompts * group_size].
    baseline: b is the group's mean (GRPO, arXiv 2402.03300), or the mean of the other samples of the group ('rloo',
        arXiv 2402.14740), which is n / (n - 1) times the former difference.
    scale: s is the group's standard deviation ('group'), that of all rewards ('batch', arXiv 2508.08221), or the
        division is left out ('none', Dr. GRPO, arXiv 2503.20783).
    A group with fewer than two scored samples has advantage 0: it has no baseline.
    Raises ValueError where the sizes do not fit or an option is unknown.
    """
    grouped, scored = _grouped(rewards, group_size)
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale!r}: choose 'group', 'batch' or 'none'")
    if baseline not in ("mean", "rloo"):
        raise ValueError(f"baseline is {baseline!r}: choose 'mean' or 'rloo'")
    advantages = _centred(grouped, scored)
    if baseline == "rloo":
        n = scored.sum(1, keepdim=True)
        advantages = advantages * n / (n - 1).clamp(min=1)
    if scale == "group":
        advantages = advantages / (_std(grouped, scored) + eps)
    elif scale == "batch":
        batch = (rearrange(x, "prompts group -> 1 (prompts group)") for x in (grouped, scored))
        advantages = advantages / (_std(*batch) + eps)
    return rearrange(advantages, "prompts group -> (prompts group)").float()


def gdpo_advantages(
    rewards: Sequence[Rewards] | Tensor, group_size: int, *, weights: Sequence[float] | None = None, eps: float = 1e-4
) -> Tensor:
    """GDPO (arXiv 2601.05242) for several reward functions, [prompts * group_size] float32.

    Each reward is normalised in its group, A_k = (r_k - mean_k) / (std_k + eps), so that a reward of small spread
    is not drowned by one of large spread; then summed by weight and normalised over the batch.
    rewards: [functions][prompts * group_size]; None or NaN: this function did not score this sample (it adds 0).
    A sample that no function scored gets advantage 0 and is left out of the batch's mean and deviation.
    weights: one a function; None: all 1.
    """
    if weights is None:
        weights = [1.0] * len(rewards)
    if len(rewards) == 0 or len(weights) != len(rewards):
        raise ValueError(f"weights has {len(weights)} entries for {len(rewards)} reward functions: give one each")
    total, any_scored = torch.zeros(()), torch.zeros((), dtype=torch.bool)
    for weight, reward in zip(weights, rewards):
        grouped, scored = _grouped(reward, group_size)
        total = total + weight * _centred(grouped, scored) / (_std(grouped, scored) + eps)
        any_scored = any_scored | scored
    total, any_scored = total.reshape(1, -1), any_scored.reshape(1, -1)
    return (_centred(total, any_scored) / (_std(total, any_scored) + eps)).flatten().float()


def zero_variance_groups(rewards: Rewards, group_size: int) -> Tensor:
    """[prompts] bool: groups whose scored rewards are all equal (or that have fewer than two): all their advantages
    are 0 under `group_advantages`. Log their share; dynamic sampling (DAPO, arXiv 2503.14476) drops them."""
    grouped, scored = _grouped(rewards, group_size)
    highest = torch.where(scored, grouped, -torch.inf).amax(1)
    lowest = torch.where(scored, grouped, torch.inf).amin(1)
    return highest <= lowest


def _tensor(rewards: Rewards) -> Tensor:
    """[samples] float64; NaN where not scored."""
    if isinstance(rewards, Tensor):
        return rewards.double()
    return torch.tensor([float("nan") if r is None else float(r) for r in rewards], dtype=torch.float64)


def _grouped(rewards: Rewards, group_size: int) -> tuple[Tensor, Tensor]:
    """([prompts, group_size] float64 with 0 where not scored, bool: scored)."""
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: at least 2 samples a prompt are needed for a baseline")
    rewards = _tensor(rewards)
    if rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(
            f"rewards is {list(rewards.shape)}: must be [prompts * group_size] with group_size {group_size}"
        )
    if rewards.isinf().any():
        raise ValueError("rewards holds an infinity: return None or NaN for a sample that could not be scored")
    grouped = rearrange(rewards, "(prompts group) -> prompts group", group=group_size)
    scored = ~grouped.isnan()
    return torch.where(scored, grouped, 0.0), scored


def _centred(values: Tensor, scored: Tensor) -> Tensor:
    """Minus the row's mean; 0 where not scored, and exactly 0 in rows of equal values."""
    first = values.gather(1, scored.int().argmax(1, keepdim=True))  # shift, so that equal values give an exact 0
    shifted = torch.where(scored, values - first, 0.0)
    mean = shifted.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
    return torch.where(scored, shifted - mean, 0.0)


def _std(values: Tensor, scored: Tensor) -> Tensor:
    """[rows, 1]: the row's standard deviation over n - 1; 0 for fewer than two."""
    n = scored.sum(1, keepdim=True)
    return (_centred(values, scored).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
