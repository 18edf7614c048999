"""The policy objective: per-token losses (grpo.losses), KL, corrections, masks, averaging, metrics.

    loss = average(importance * keep * policy + beta * kl) - entropy_bonus * mean entropy

Every average divides by counts of the whole optimizer step, so that losses, gradients and metrics of micro-batches
and ranks add up to those of one big batch. `docs/objectives.md` has the table of losses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grpo.distributed import World, all_gather
from grpo.errors import flag
from grpo.losses import LOSSES, MAX_LOG_RATIO, Kl, Level, clip_range, clipped, policy_terms

Importance = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Average = Literal["sequence_mean", "sequence_sum", "token_mean", "local_token_mean", "constant"]


@dataclass(frozen=True)
class Objective:
    """Flags of the objective. None: what the loss's own paper has (docs/objectives.md)."""

    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "cispo", "sapo", "vespo", "reinforce"] = "grpo"
    """per-token loss, with its own ratio level, clip range and averaging"""
    level: Level | None = None
    """whose probability ratio: each token's, or the sequence's geometric mean (GSPO)"""
    average: Average | None = None
    """how token losses become one number"""
    epsilon: float | None = None
    """the ratio is clipped from below at 1 - epsilon"""
    epsilon_high: float | None = None
    """and from above at 1 + epsilon_high (as epsilon, if only that is given); for cispo the bound itself"""
    delta: float | None = None
    """bound of the ratio where the advantage is negative (two-sided or dual clip; usual: 3 to 10)"""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """sapo's gate: tau for positive advantages, tau for the others"""
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    """vespo's weight: k and lambda for advantages >= 0, k and lambda for negative ones"""
    beta: float = 0.0
    """weight of the KL divergence to the reference policy; 0: no reference policy is needed"""
    kl: Kl | None = None
    """KL estimator (None: k3_ratio, the only one here whose expected gradient is the KL divergence's off policy too)"""
    importance: Importance = "token_truncate"
    """weights for the mismatch between sampler and trainer, where the sampler's log-probabilities are given"""
    importance_cap: float | None = None
    """weights above this are cut to it (truncate) or zero (mask); None: 2"""
    importance_floor: float | None = None
    """weights below this are raised to it (truncate) or zero (mask); None: off"""
    off_policy_threshold: float | None = None
    """leave out sequences of negative advantage whose mean log-ratio, sampler to policy, exceeds this (nats a token)"""
    entropy_bonus: float = 0.0
    """weight of the mean token entropy, subtracted from the loss"""
    top_entropy_quantile: float = 1.0
    """share of a step's tokens, those of highest entropy, that keep their policy loss (paper: 0.2); below 1 it takes a
    pass of its own before the first update"""


def check_objective(objective: Objective, *, num_iterations: int | None = None) -> None:
    """Refuse values out of range and flags that have no effect beside another: ValueError naming the flags.

    num_iterations: optimizer steps on one batch, where the recipe knows them. With one the ratio is 1, and no bound
    of it is ever reached."""
    o, default = objective, Objective()
    _known("loss", o.loss, LOSSES)
    _known("average", o.average or LOSSES[o.loss].average, AVERAGES)
    _known("level", o.level or "token", ("token", "sequence"))
    _known("kl", o.kl or "k3", ("k1", "k2", "k3", "k3_ratio"))
    _known("importance", o.importance, _IMPORTANCE)
    row = LOSSES[o.loss]

    for name in ("epsilon", "epsilon_high", "delta", "importance_cap", "importance_floor"):
        value = getattr(o, name)
        if value is not None and not value > 0:
            raise ValueError(f"{flag(name)} is {value}: must be positive")
    for name in ("beta", "entropy_bonus", "off_policy_threshold"):
        value = getattr(o, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{flag(name)} is {value}: must not be negative")
    if not 0 < o.top_entropy_quantile <= 1:
        raise ValueError(f"--top-entropy-quantile is {o.top_entropy_quantile}: must be in (0, 1]; 1 keeps every token")
    if not all(tau > 0 for tau in o.sapo_temperatures):
        raise ValueError(f"--sapo-temperatures is {o.sapo_temperatures}: both must be positive")
    if not all(x > 0 for x in o.vespo_shape):
        raise ValueError(f"--vespo-shape is {o.vespo_shape}: all four must be positive")

    useless = [
        ("epsilon", o.epsilon is not None and row.clip != "around 1"),
        ("epsilon_high", o.epsilon_high is not None and row.clip is None),
        ("delta", o.delta is not None and row.term is not clipped),
        ("level", o.level is not None and row.level is None),
        ("sapo_temperatures", o.sapo_temperatures != default.sapo_temperatures and o.loss != "sapo"),
        ("vespo_shape", o.vespo_shape != default.vespo_shape and o.loss != "vespo"),
    ]
    for name, wrong in useless:
        if wrong:
            raise ValueError(f"{flag(name)} has no effect with --loss {o.loss}: drop one of the two")
    if num_iterations == 1:
        for name in ("level", "epsilon", "epsilon_high", "delta"):
            if getattr(o, name) is not None:
                raise ValueError(
                    f"{flag(name)} has no effect with one optimizer step a batch, where the ratio is always 1: drop "
                    f"it, or take several (--num-iterations, in a recipe that has it)"
                )
    if o.kl is not None and o.beta == 0:
        raise ValueError(f"--kl {o.kl} has no effect with --beta 0: give --beta or drop --kl")
    for name in ("importance_cap", "importance_floor"):
        if getattr(o, name) is not None and o.importance == "none":
            raise ValueError(f"{flag(name)} has no effect with --importance none: drop one of the two")
    if o.importance_floor is not None and o.importance_floor >= _cap(o):
        raise ValueError(f"--importance-floor {o.importance_floor} must be below --importance-cap {_cap(o)}")
    if o.importance.startswith("sequence") and row.folds_importance:
        raise ValueError(
            f"--importance {o.importance} does not fit --loss {o.loss}, which multiplies token weights into its own "
            f"sequence weight: use token_truncate, token_mask or none"
        )
    high = clip_range(o.loss, o.epsilon, o.epsilon_high)[1]
    if o.delta is not None and o.delta <= high:
        raise ValueError(
            f"--delta {o.delta} must exceed 1 + --epsilon-high = {high:g}, or it would cut inside the clip range"
        )


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective | None = None,
    *,
    ref_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_threshold: Tensor | float | None = None,
    token_count: Tensor | int | None = None,
    sequence_count: Tensor | int | None = None,
    max_completion_length: int | None = None,
    **flags: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's part of the optimizer step's loss, and of its metrics.

    Args:
        logps: [batch, time] nats, the policy being trained; the gradient goes here.
        old_logps: [batch, time] nats, the policy at the time of sampling, by the trainer's own forward pass. None:
            the batch is on policy, logps.detach().
        advantages: [batch], or [batch, time].
        mask: [batch, time] bool or 0 / 1: the tokens that count. A sequence with none is as if it were not there.
        objective: see `Objective`; None: its defaults.
        flags: fields of the objective to set for this call: `policy_loss(..., loss="dapo", beta=0.04)`.
        ref_logps: [batch, time] nats, the reference policy; required with beta > 0.
        sampler_logps: [batch, time] nats, as the engine that sampled gave them. NaN: unknown, no correction there.
        entropy: [batch, time] nats; required with entropy_bonus (then differentiable) and top_entropy_quantile.
        entropy_threshold: entropy from which a token counts as high; None: the quantile over this micro-batch, the
            one place where micro-batches do not add up to the one big batch (beside bnpo). The step's own:
            `grpo.objective.entropy_threshold`.
        token_count, sequence_count: tokens and sequences in the masks of the WHOLE optimizer step, all micro-batches
            and ranks. None: of this batch.
        max_completion_length: tokens; required by average 'constant' (dr_grpo).

    Returns:
        loss: scalar. Summing it (or calling backward on each) over micro-batches and ranks gives the step's loss.
        metrics: scalars, detached, to be put together by `merge_metrics`; each is a share or mean over the step.

    Raises:
        ValueError: a shape does not fit or a required tensor is missing.
        TypeError: a flag that no objective has.
    """
    o = replace(objective or Objective(), **flags)
    row = LOSSES[o.loss]
    average = o.average or row.average
    _check_tensors(logps, old_logps, advantages, mask, ref_logps, sampler_logps, entropy)
    if o.beta and ref_logps is None:
        raise ValueError(f"ref_logps is None with beta {o.beta}: pass the reference's log-probabilities or beta=0")
    if entropy is None and (o.entropy_bonus or o.top_entropy_quantile < 1):
        raise ValueError("entropy is None with entropy_bonus or top_entropy_quantile: pass [batch, time] entropies")
    if average == "constant" and max_completion_length is None:
        raise ValueError("max_completion_length is None: average 'constant' (dr_grpo) divides by it")

    keep = mask.bool()
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    logps = logps.to(dtype)
    old_logps = logps.detach() if old_logps is None else old_logps.detach().to(dtype)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    weights = mismatch = None
    if sampler_logps is not None:
        mismatch = torch.where(keep, old_logps - sampler_logps.to(dtype), 0.0).nan_to_num(nan=0.0)
        weights = importance_weights(mismatch, o)

    terms = policy_terms(
        logps, old_logps, advantages, mask, loss=o.loss, level=o.level, epsilon=o.epsilon, epsilon_high=o.epsilon_high,
        delta=o.delta, ref_logps=ref_logps, kl=o.kl or "k3_ratio", importance=weights,
        sapo_temperatures=o.sapo_temperatures, vespo_shape=o.vespo_shape,
    )  # fmt: skip
    ones = keep.to(dtype)
    counts = Counts(
        _at_least_one(ones.sum() if token_count is None else token_count),
        _at_least_one(keep.any(-1).sum() if sequence_count is None else sequence_count),
        max_completion_length,
    )

    policy = terms.policy
    on_policy = high_entropy = None
    if o.off_policy_threshold is not None:
        sampled = old_logps if sampler_logps is None else sampler_logps
        on_policy = off_policy_mask(logps, sampled, advantages, keep, o.off_policy_threshold)
        policy = policy * on_policy
    if o.top_entropy_quantile < 1:
        assert entropy is not None
        if entropy_threshold is None:
            entropy_threshold = entropy_quantile(entropy[keep], o.top_entropy_quantile)
        high_entropy = keep & (entropy.detach() >= entropy_threshold)
        policy = policy * high_entropy

    policy_part = AVERAGES[average](policy, ones, counts)
    loss = policy_part
    if o.beta and terms.kl is not None:
        loss = loss + o.beta * AVERAGES[average](terms.kl, ones, counts)
    if o.entropy_bonus and entropy is not None:
        loss = loss - o.entropy_bonus * torch.where(keep, entropy.to(dtype), 0.0).sum() / counts.tokens

    with torch.no_grad():
        log_ratio = torch.where(keep, logps - old_logps, 0.0)
        w = terms.log_weight.exp()
        low, high = clip_range(o.loss, o.epsilon, o.epsilon_high)
        per_token = {
            "approx_kl": log_ratio.clamp(max=MAX_LOG_RATIO).expm1() - log_ratio,
            "ratio_mean": w,
            "clip_low": (w < low) & (advantages < 0),
            "clip_high": (w > high) & (advantages > 0),
            "kl": terms.kl,
            "entropy": entropy,
            "high_entropy": high_entropy,
            "off_policy_masked": None if on_policy is None else ~on_policy,
        }
        maxima = {"ratio_max": w}
        if mismatch is not None and weights is not None:
            ratio = mismatch.clamp(max=MAX_LOG_RATIO).exp()
            per_token |= {
                "mismatch_mean": mismatch.abs(),
                "mismatch_k3": ratio - 1 - mismatch,
                "mismatch_capped": weights != unbounded_weights(mismatch, o.importance),
            }
            maxima["mismatch_ratio_max"] = ratio
        metrics = {
            name: torch.where(keep, value, 0).to(dtype).sum() / counts.tokens
            for name, value in per_token.items()
            if value is not None
        }
        metrics |= {name: torch.where(keep, value, 0.0).max() for name, value in maxima.items()}
        metrics |= {"loss": loss.detach(), "policy_loss": policy_part.detach()}
    return loss, metrics


def rows_with_gradient(objective: Objective, advantages: Tensor, mask: Tensor) -> Tensor | None:
    """[batch] bool: the sequences that `policy_loss` gives a gradient; None: all of them may have one.

    Every loss of the table is proportional to the advantage of its token, at level 'sequence' to those of the
    sequence's tokens (tested for all of `LOSSES`), so without KL and entropy bonus a sequence of advantage 0 has none.
    advantages: [batch] or [batch, time]; mask: [batch, time]."""
    if objective.beta or objective.entropy_bonus:
        return None
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    return ((advantages != 0) & mask.bool()).any(-1)


def merge_metrics(metrics: Sequence[Mapping[str, Tensor]], world: World | None = None) -> dict[str, float]:
    """A step's metrics from those of its micro-batches, and of all ranks: sums, but maxima of names ending in
    '_max'. Waits for the device once. Every rank must call it; one without micro-batches brings an empty list.
    A step without any has the loss 0 and no other metric."""
    rows: list[dict[str, float]] = []
    if metrics:
        names = list(metrics[0])
        values = torch.stack([torch.stack([m[name].float() for name in names]) for m in metrics])
        rows = [dict(zip(names, row)) for row in values.tolist()]
    rows = [row for of_rank in all_gather(rows, world or World()) for row in of_rank]
    if not rows:  # nothing counted in the step, as when --drop-zero-variance drops every group
        return {"loss": 0.0}
    return {name: (max if name.endswith("_max") else sum)(row[name] for row in rows) for name in rows[0]}


# Averages: [batch, time] token losses, 0 where masked -> this micro-batch's part of the step's loss.


class Counts(NamedTuple):
    """Of the whole optimizer step."""

    tokens: Tensor | int
    sequences: Tensor | int
    max_completion_length: int | None


def sequence_mean(losses: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Mean over sequences of the sequence's token mean: a token of a long answer weighs less. GRPO (2402.03300)."""
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / counts.sequences


def sequence_sum(losses: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Mean over sequences of the sequence's token sum. LUSPO (2602.05261)."""
    return losses.sum() / counts.sequences


def token_mean(losses: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Mean over all tokens of the optimizer step. DAPO (2503.14476)."""
    return losses.sum() / counts.tokens


def local_token_mean(losses: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Mean over the tokens of the micro-batch, weighed by its share of the step's sequences: depends on how the
    step is cut into micro-batches, by definition. TRL's bnpo, whose 1 / accumulation steps it equals when all
    micro-batches have as many sequences."""
    return losses.sum() / mask.sum().clamp(min=1) * mask.any(-1).sum() / counts.sequences


def constant(losses: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """Sum over tokens, divided by sequences * max_completion_length: no length in it. Dr. GRPO (2503.20783)."""
    assert counts.max_completion_length is not None
    return losses.sum() / (counts.sequences * counts.max_completion_length)


AVERAGES: dict[str, Callable[[Tensor, Tensor, Counts], Tensor]] = {
    f.__name__: f for f in (sequence_mean, sequence_sum, token_mean, local_token_mean, constant)
}


# Masks and weights


def entropy_threshold(
    objective: Objective, entropies: Sequence[Tensor], masks: Sequence[Tensor], world: World | None = None
) -> Tensor | None:
    """The `entropy_threshold` of the whole optimizer step for `policy_loss`; None where the objective needs none.

    entropies, masks: [batch, time] of each micro-batch, from a pass without gradient before the first update.
    Every rank must call it; one without micro-batches brings empty lists."""
    if objective.top_entropy_quantile == 1:
        return None
    found = [entropy[mask.bool()].cpu() for entropy, mask in zip(entropies, masks)]
    found = [part for of_rank in all_gather(found, world or World()) for part in of_rank]
    device = entropies[0].device if entropies else None
    return entropy_quantile(torch.cat([torch.zeros(0), *found]), objective.top_entropy_quantile).to(device)


def entropy_quantile(entropies: Tensor, share: float) -> Tensor:
    """The entropy that the `share` of highest-entropy tokens reaches (arXiv 2506.01939); inf without tokens.

    entropies: [tokens] of valid tokens; give those of the whole optimizer step for exact accumulation."""
    if not entropies.numel():
        return torch.full((), float("inf"), device=entropies.device)
    return torch.quantile(entropies.detach().float(), 1 - share)


def off_policy_mask(logps: Tensor, sampled: Tensor, advantages: Tensor, keep: Tensor, threshold: float) -> Tensor:
    """[batch, 1] bool (or as advantages): False where A < 0 and the mean over tokens of sampled - logps exceeds
    `threshold`: an answer that the policy has left already is not pushed down further. DeepSeek-V3.2 (2512.02556).

    sampled: [batch, time] log-probabilities when sampled, the engine's if known; NaN is no evidence."""
    drift = torch.where(keep, sampled.to(logps.dtype) - logps.detach(), 0.0).nan_to_num(nan=0.0)
    drift = drift.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
    return (advantages >= 0) | (drift <= threshold)


def unbounded_weights(mismatch: Tensor, importance: Importance) -> Tensor:
    """exp of the mismatch of each token, or of its sum over the sequence; 1 with 'none'. [batch, time]."""
    if importance == "none":
        return torch.ones_like(mismatch)
    if importance.startswith("sequence"):
        mismatch = mismatch.sum(-1, keepdim=True).expand_as(mismatch)
    return mismatch.clamp(max=MAX_LOG_RATIO).exp()


def importance_weights(mismatch: Tensor, objective: Objective) -> Tensor:
    """[batch, time] weights that make samples of the engine into samples of the trainer's policy, bounded.

    mismatch: [batch, time] old_logps - sampler_logps, nats, 0 where masked. 'truncate' cuts a weight to the bounds
    (TIS), 'mask' sets it to 0 outside them (MIS, IcePop); 'token' and 'sequence' say whose weight it is."""
    weights = unbounded_weights(mismatch, objective.importance)
    if objective.importance == "none":
        return weights
    low, high = objective.importance_floor or 0.0, _cap(objective)
    if objective.importance.endswith("truncate"):
        return weights.clamp(low, high)
    return torch.where((weights < low) | (weights > high), 0.0, weights)


_IMPORTANCE = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def _cap(objective: Objective) -> float:
    return 2.0 if objective.importance_cap is None else objective.importance_cap


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _known(name: str, value: str, choices: Sequence[str] | Mapping[str, object]) -> None:
    if value not in choices:
        raise ValueError(f"{flag(name)} is {value!r}: choose one of {', '.join(choices)}")


def _check_tensors(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None,
    sampler_logps: Tensor | None,
    entropy: Tensor | None,
) -> None:
    if logps.dim() != 2:
        raise ValueError(f"logps is {list(logps.shape)}: must be [batch, time]")
    others = {"old_logps": old_logps, "mask": mask, "ref_logps": ref_logps, "sampler_logps": sampler_logps}
    for name, tensor in (others | {"entropy": entropy}).items():
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, logps {list(logps.shape)}: both must be [batch, time]")
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        raise ValueError(f"advantages is {list(advantages.shape)}: must be [batch] or [batch, time] of logps")
