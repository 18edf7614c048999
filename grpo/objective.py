"""The objective of one optimizer step, in the pieces that a recipe composes:

    loss = average(surrogate * token_filter) + beta * average(kl_penalty) - entropy_bonus

    log_ratio          log w = log(pi / pi_old) per token
    sampler_weights    c = min(pi_old / pi_sampler, cap): samples of the engine count as samples of the trainer's policy
    surrogate          the policy loss per token, c * loss(w, A)   (grpo.losses)
    token_filter       1 for the tokens whose policy loss is kept; all, unless a flag leaves some out
    kl_penalty         an estimate of KL(pi || pi_ref) per token
    average            from token losses to one number

`policy_loss` is their composition in one call. Every average divides by counts of the whole optimizer step, so losses,
gradients and metrics of micro-batches and ranks add up to those of one big batch. docs/objectives.md has the table of
losses, docs/algorithm.md the walk through a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from grpo.batch import MicroBatch, StepBatch, StepTotals
from grpo.distributed import World, all_gather
from grpo.errors import UserError, flag
from grpo.lazy import torch
from grpo.losses import (
    LOSSES,
    MAX_LOG_RATIO,
    Kl,
    Level,
    LossParameters,
    Tokens,
    clip_range,
    clipped,
    kl_terms,
    log_weights,
)

if TYPE_CHECKING:
    from torch import Tensor

Importance = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Average = Literal["sequence_mean", "sequence_sum", "token_mean", "local_token_mean", "constant"]


@dataclass(frozen=True)
class Objective:
    """Flags of the objective. None stands for the value of the loss's own paper (docs/objectives.md)."""

    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "cispo", "sapo", "vespo", "reinforce"] = "grpo"
    """policy loss per token, with its own ratio level, clip range and average"""
    level: Level | None = None
    """level of the probability ratio: the token's, or the sequence's geometric mean (GSPO)"""
    average: Average | None = None
    """average over tokens and sequences"""
    epsilon: float | None = None
    """distance below 1 at which the ratio is clipped"""
    epsilon_high: float | None = None
    """distance above 1 at which the ratio is clipped (None: epsilon, if that is given); for cispo the bound itself"""
    delta: float | None = None
    """upper bound of the ratio where the advantage is negative (two-sided or dual clip; usually 3 to 10)"""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """temperatures of sapo's gate: for positive advantages, and for the others"""
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    """shape of vespo's weight: k and lambda for advantages >= 0, k and lambda for negative ones"""
    beta: float = 0.0
    """weight of the KL divergence to the reference policy; 0 needs no reference policy"""
    kl: Kl | None = None
    """KL estimator; None is k3_ratio, the only one whose expected gradient is the KL divergence's off policy, too"""
    importance: Importance = "token_truncate"
    """correction for the mismatch between sampler and trainer: per token or sequence, truncated or masked weights"""
    importance_cap: float | None = None
    """upper bound of the correction's weights: larger ones are cut to it (truncate) or set to 0 (mask); None is 2"""
    importance_floor: float | None = None
    """lower bound of the correction's weights: smaller ones are raised to it or set to 0; None is off"""
    off_policy_threshold: float | None = None
    """mean log-ratio, sampler to policy, in nats per token, above which a sequence of negative advantage is left out"""
    entropy_bonus: float = 0.0
    """weight of the mean token entropy, which is subtracted from the loss"""
    top_entropy_quantile: float = 1.0
    """fraction of a step's tokens, those of highest entropy, that keep their policy loss (paper: 0.2; an extra pass)"""

    @property
    def cap(self) -> float:
        """Upper bound of the sampler weights."""
        return 2.0 if self.importance_cap is None else self.importance_cap

    @property
    def parameters(self) -> LossParameters:
        """The loss's parameters, with its defaults filled in."""
        bounds = clip_range(self.loss, self.epsilon, self.epsilon_high)
        return LossParameters(*bounds, self.delta, self.sapo_temperatures, self.vespo_shape)

    def check(self, num_iterations: int | None = None) -> None:
        """Refuse values out of range, and flags that have no effect beside another: UserError naming the flags.

        num_iterations: optimizer steps on one batch, where the recipe knows them. With one the ratio is 1, and no bound
        of it is ever reached."""
        _check_choices(self)
        _check_ranges(self)
        _check_effect(self, num_iterations)


# --------------------------------------------------------------------------------- the pieces that a recipe composes


def sampler_weights(old_logps: Tensor, micro: MicroBatch, objective: Objective) -> Tensor | None:
    """[batch, time] constant weights c = pi_old / pi_sampler, bounded; None where the sampler's log-probabilities are
    not known.

    The engine and the trainer compute the same policy with different kernels and precisions, so their probabilities
    differ a little. The weights make samples of the engine into samples of the trainer's policy. 'truncate' cuts a
    weight to the bounds (TIS, https://fengyao.notion.site/off-policy-rl), 'mask' sets it to 0 outside them (MIS,
    IcePop); 'token' and 'sequence' tell whether the ratio is the token's or the whole sequence's.

    old_logps: [batch, time] nats, the trainer's log-probabilities at the time of sampling."""
    mismatch = _mismatch(old_logps, micro)
    if mismatch is None:
        return None
    weights = _unbounded_weights(mismatch, objective.importance)
    if objective.importance == "none":
        return weights
    low, high = objective.importance_floor or 0.0, objective.cap
    if objective.importance.endswith("truncate"):
        return weights.clamp(low, high)
    return torch.where((weights < low) | (weights > high), 0.0, weights)


def log_ratio(logps: Tensor, old_logps: Tensor, micro: MicroBatch) -> Tensor:
    """[batch, time] log w = log(pi / pi_old) per token, nats, 0 where masked. Differentiable in logps.

    logps, old_logps: [batch, time] nats, of the policy that is trained and of the one that sampled, by the trainer's
    own forward pass."""
    keep = micro.mask.bool()
    return _clean(logps, keep) - _clean(old_logps.detach(), keep)


def surrogate(logps: Tensor, log_w: Tensor, weights: Tensor | None, micro: MicroBatch, objective: Objective) -> Tensor:
    """[batch, time] policy loss per token, to be minimized; 0 where masked. Differentiable in logps.

    The row of `grpo.losses.LOSSES` that --loss names, times the sampler weights. At masked positions every input may be
    anything, NaN and infinities included: losses and gradients are exactly 0 there.

    logps: [batch, time] nats, of the policy that is trained. log_w: [batch, time] of `log_ratio`. weights: [batch,
    time] of `sampler_weights`."""
    row = LOSSES[objective.loss]
    keep = micro.mask.bool()
    logps = _clean(logps, keep)
    log_weight = log_weights(log_w, micro.mask, objective.level or row.level or "token")
    advantages = _clean(_per_token(micro.advantages, logps), keep)
    weights = None if weights is None else torch.where(keep, weights, 1.0)
    tokens = Tokens(logps, log_w, log_weight, advantages, micro.mask, weights)
    losses = row.term(tokens, objective.parameters)
    if weights is not None and not row.folds_sampler_weights:
        losses = losses * weights
    return _clean(losses, keep)


def token_filter(
    logps: Tensor,
    old_logps: Tensor,
    entropy: Tensor | None,
    threshold: Tensor | float | None,
    micro: MicroBatch,
    objective: Objective,
) -> Tensor | float:
    """The tokens whose policy loss is kept, as factors 0 or 1 that broadcast to [batch, time]; 1.0 by default.

    --off-policy-threshold leaves out sequences that the policy has left already (`off_policy_mask`);
    --top-entropy-quantile keeps the tokens whose entropy reaches `threshold` alone (`step_entropy_threshold`).
    entropy: [batch, time] nats."""
    kept: Tensor | float = 1.0
    if objective.off_policy_threshold is not None:
        kept = kept * off_policy_mask(logps, old_logps, micro, objective.off_policy_threshold)
    if objective.top_entropy_quantile < 1:
        kept = kept * _high_entropy(entropy, threshold, micro)
    return kept


def kl_penalty(
    logps: Tensor, ref_logps: Tensor | None, log_w: Tensor, micro: MicroBatch, objective: Objective
) -> Tensor:
    """[batch, time] estimate of KL(policy || reference) per token, 0 where masked; all 0 without a reference policy.

    logps, ref_logps: [batch, time] nats. log_w: [batch, time] of `log_ratio`. See `grpo.losses.kl_terms`."""
    if ref_logps is None:
        return torch.zeros_like(log_w)
    keep = micro.mask.bool()
    logps, ref_logps = _clean(logps, keep), _clean(ref_logps.detach(), keep)
    return _clean(kl_terms(logps, ref_logps, log_w, objective.kl or "k3_ratio"), keep)


def average(losses: Tensor, micro: MicroBatch, objective: Objective) -> Tensor:
    """This micro-batch's part of the step's loss, a scalar: those of all micro-batches and ranks add up to the average
    over the whole step. losses: [batch, time], 0 where masked."""
    name = objective.average or LOSSES[objective.loss].average
    return AVERAGES[name](losses, micro.mask, micro.step)


def entropy_bonus(entropy: Tensor, micro: MicroBatch, objective: Objective) -> Tensor:
    """This micro-batch's part of --entropy-bonus times the mean entropy over the step's tokens, a scalar to subtract
    from the loss. entropy: [batch, time] nats."""
    return objective.entropy_bonus * _clean(entropy, micro.mask.bool()).sum() / micro.step.tokens


# --------------------------------------------------------------------------------------------------- all in one call


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
    """One micro-batch's part of the optimizer step's loss and of its metrics: what the recipes compose, in one call.

    Args:
        logps: [batch, time] nats, the policy that is trained; the gradient goes here.
        old_logps: [batch, time] nats, the policy at the time of sampling, by the trainer's own forward pass. None: the
            batch is on policy, so they are logps.detach().
        advantages: [batch], or [batch, time].
        mask: [batch, time] bool or 0 / 1: the tokens that count. A sequence without any is as if it were not there.
        objective: see `Objective`; None: its defaults.
        flags: fields of the objective to set for this call: `policy_loss(..., loss="dapo", beta=0.04)`.
        ref_logps: [batch, time] nats, the reference policy; required with beta > 0.
        sampler_logps: [batch, time] nats, as the engine that sampled gave them. NaN: unknown, no correction there.
        entropy: [batch, time] nats; required with entropy_bonus (then differentiable) and top_entropy_quantile.
        entropy_threshold: entropy from which a token counts as high; None: the quantile over this micro-batch, the one
            place, beside bnpo, where micro-batches do not add up to one big batch. `step_entropy_threshold` gives the
            whole step's.
        token_count, sequence_count: tokens and sequences in the masks of the WHOLE optimizer step, all micro-batches
            and ranks. None: of this batch.
        max_completion_length: tokens; required by average 'constant' (dr_grpo).

    Returns:
        loss: scalar. Summing it (or calling backward on each) over micro-batches and ranks gives the step's loss.
        metrics: scalars, detached, to be put together by `merge_metrics`: parts of sums and means over the step.

    Raises:
        ValueError: a shape does not fit or a required tensor is missing.
        TypeError: a flag that no objective has.
    """
    o = replace(objective or Objective(), **flags)
    _check_choices(o)
    _check_tensors(logps, old_logps, advantages, mask, ref_logps, sampler_logps, entropy)
    _check_required(o, ref_logps, entropy, max_completion_length)
    keep = mask.bool()
    ones = keep.to(torch.float64 if logps.dtype == torch.float64 else torch.float32)
    logps = logps.to(ones.dtype)
    old_logps = logps.detach() if old_logps is None else old_logps
    totals = StepTotals(
        _at_least_one(ones.sum() if token_count is None else token_count),
        _at_least_one(keep.any(-1).sum() if sequence_count is None else sequence_count),
        max_completion_length,
    )
    micro = MicroBatch(logps, logps, ones, sampler_logps, advantages, [], totals)  # ids are not looked at here
    if entropy is not None and entropy_threshold is None and o.top_entropy_quantile < 1:
        entropy_threshold = entropy_quantile(entropy[keep], o.top_entropy_quantile)

    weights = sampler_weights(old_logps, micro, o)
    log_w = log_ratio(logps, old_logps, micro)
    policy = surrogate(logps, log_w, weights, micro, o)
    policy = policy * token_filter(logps, old_logps, entropy, entropy_threshold, micro, o)
    kl = kl_penalty(logps, ref_logps, log_w, micro, o)
    loss = average(policy, micro, o) + o.beta * average(kl, micro, o)
    if entropy is not None:
        loss = loss - entropy_bonus(entropy, micro, o)
    return loss, token_metrics(loss, policy, kl, logps, old_logps, entropy, entropy_threshold, micro, o)


# ----------------------------------------------------------------------------------------------------------- metrics


def token_metrics(
    loss: Tensor,
    policy: Tensor,
    kl: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    entropy: Tensor | None,
    threshold: Tensor | float | None,
    micro: MicroBatch,
    objective: Objective,
) -> dict[str, Tensor]:
    """What a micro-batch says of the step, as detached scalars for `merge_metrics`; docs/metrics.md explains each.

    loss: scalar. policy, kl, logps, old_logps, entropy: [batch, time]. threshold: of `step_entropy_threshold`."""
    with torch.no_grad():
        keep, dtype = micro.mask.bool(), micro.mask.dtype
        old_logps = old_logps.to(dtype)
        log_w = torch.where(keep, logps - old_logps, 0.0)
        row = LOSSES[objective.loss]
        w = log_weights(log_w, micro.mask, objective.level or row.level or "token")
        w = torch.where(keep, w, 0.0).exp()
        low, high = clip_range(objective.loss, objective.epsilon, objective.epsilon_high)
        advantages = _per_token(micro.advantages, logps)
        per_token: dict[str, Tensor | None] = {
            "approx_kl": log_w.clamp(max=MAX_LOG_RATIO).expm1() - log_w,
            "ratio_mean": w,
            "clip_low": (w < low) & (advantages < 0),
            "clip_high": (w > high) & (advantages > 0),
            "kl": kl if objective.beta else None,
            "entropy": entropy,
        }
        if objective.top_entropy_quantile < 1:
            per_token["high_entropy"] = _high_entropy(entropy, threshold, micro)
        if objective.off_policy_threshold is not None:
            on_policy = off_policy_mask(logps, old_logps, micro, objective.off_policy_threshold)
            per_token["off_policy_masked"] = ~on_policy
        maxima = {"ratio_max": w}
        mismatch = _mismatch(old_logps, micro)
        weights = sampler_weights(old_logps, micro, objective)
        if mismatch is not None and weights is not None:
            ratio = mismatch.clamp(max=MAX_LOG_RATIO).exp()
            per_token |= {
                "mismatch_mean": mismatch.abs(),
                "mismatch_k3": ratio - 1 - mismatch,
                "mismatch_capped": weights != _unbounded_weights(mismatch, objective.importance),
            }
            maxima["mismatch_ratio_max"] = ratio
        metrics = {
            name: torch.where(keep, value, 0).to(dtype).sum() / micro.step.tokens
            for name, value in per_token.items()
            if value is not None
        }
        metrics |= {name: torch.where(keep, value, 0.0).max() for name, value in maxima.items()}
        if micro.needs_grad is not None:  # see merge_metrics
            metrics[_SKIPPED] = torch.where(micro.needs_grad[:, None], 0.0, policy.abs()).max()
        return metrics | {"loss": loss.detach(), "policy_loss": average(policy, micro, objective)}


def merge_metrics(metrics: Sequence[Mapping[str, Tensor]], world: World | None = None) -> dict[str, float]:
    """A step's metrics from those of its micro-batches and of all ranks: sums, or maxima where a name ends in '_max'.

    It waits for the device once. Every rank must call it; one without micro-batches brings an empty list. A step
    without any has the loss 0 and no other metric.
    Raises UserError where a sequence whose backward pass was skipped has a policy loss: a loss of your own that is not
    proportional to the advantage would train on a part of its gradient only."""
    rows: list[dict[str, float]] = []
    if metrics:
        names = list(metrics[0])
        values = torch.stack([torch.stack([m[name].float() for name in names]) for m in metrics])
        rows = [dict(zip(names, row)) for row in values.tolist()]
    rows = [row for of_rank in all_gather(rows, world or World()) for row in of_rank]
    if not rows:  # no sample counted in the step, as when --drop-zero-variance drops every group
        return {"loss": 0.0}
    merged = {name: (max if name.endswith("_max") else sum)(row[name] for row in rows) for name in rows[0]}
    if merged.pop(_SKIPPED, 0.0) > 0:
        raise UserError(
            "a sequence of advantage 0 has a policy loss, and its backward pass was skipped: for a loss that is not "
            "proportional to the advantage call make_batch(..., every_gradient=True)"
        )
    return merged


_SKIPPED = "skipped_loss_max"
"""name of the largest policy loss of a sequence whose backward pass was skipped; it should be 0, and is not logged"""


# ---------------------------------------------------- averages: [batch, time] -> this micro-batch's part of the loss


def sequence_mean(losses: Tensor, mask: Tensor, step: StepTotals) -> Tensor:
    """Mean over sequences of the sequence's token mean: a token of a long answer weighs less. GRPO (2402.03300)."""
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / step.sequences


def sequence_sum(losses: Tensor, mask: Tensor, step: StepTotals) -> Tensor:
    """Mean over sequences of the sequence's token sum. LUSPO (2602.05261)."""
    return losses.sum() / step.sequences


def token_mean(losses: Tensor, mask: Tensor, step: StepTotals) -> Tensor:
    """Mean over all tokens of the optimizer step. DAPO (2503.14476)."""
    return losses.sum() / step.tokens


def local_token_mean(losses: Tensor, mask: Tensor, step: StepTotals) -> Tensor:
    """Mean over the tokens of the micro-batch, weighed by its fraction of the step's sequences. By definition it
    depends on how the step is divided into micro-batches. TRL's bnpo, whose 1 / accumulation steps it equals when all
    micro-batches have the same number of sequences."""
    return losses.sum() / mask.sum().clamp(min=1) * mask.any(-1).sum() / step.sequences


def constant(losses: Tensor, mask: Tensor, step: StepTotals) -> Tensor:
    """Sum over tokens, divided by sequences * max_completion_tokens: no length in it. Dr. GRPO (2503.20783)."""
    assert step.max_completion_tokens is not None
    return losses.sum() / (step.sequences * step.max_completion_tokens)


AVERAGES: dict[str, Callable[[Tensor, Tensor, StepTotals], Tensor]] = {
    f.__name__: f for f in (sequence_mean, sequence_sum, token_mean, local_token_mean, constant)
}


# --------------------------------------------------------------------------------------------------- masks and weights


def step_entropy_threshold(
    forward: Callable[[MicroBatch], tuple[Tensor, Tensor]], batch: StepBatch, objective: Objective, world: World
) -> Tensor | None:
    """The entropy from which a token of this step counts as high, found by a forward pass of its own over the step's
    micro-batches of all ranks; None, and no pass, where --top-entropy-quantile is 1. Every rank must call it.

    forward: micro-batch -> ([batch, time] log-probabilities, [batch, time] entropies, nats)."""
    if objective.top_entropy_quantile == 1:
        return None
    with torch.no_grad():
        entropies = [forward(micro)[1][micro.mask.bool()].cpu() for micro in batch.micros]
    entropies = [part for of_rank in all_gather(entropies, world) for part in of_rank]
    threshold = entropy_quantile(torch.cat([torch.zeros(0), *entropies]), objective.top_entropy_quantile)
    return threshold.to(world.device)


def old_policy_logps(
    forward: Callable[[MicroBatch], tuple[Tensor, Tensor]], batch: StepBatch, num_iterations: int
) -> list[Tensor | None]:
    """Log-probabilities of each micro-batch under the policy that sampled, [batch, time] nats, for a batch that takes
    several optimizer steps. With one step that policy is the present one, so no pass is needed and they are None.

    Call it before the first update. forward: as in `step_entropy_threshold`."""
    if num_iterations == 1:
        return [None for _ in batch.micros]
    with torch.no_grad():
        return [forward(micro)[0] for micro in batch.micros]


def entropy_quantile(entropies: Tensor, fraction: float) -> Tensor:
    """The entropy that the `fraction` of highest-entropy tokens reaches (arXiv 2506.01939); inf without tokens.

    entropies: [tokens] of valid tokens; those of the whole optimizer step make accumulation exact."""
    if not entropies.numel():
        return torch.full((), float("inf"), device=entropies.device)
    return torch.quantile(entropies.detach().float(), 1 - fraction)


def off_policy_mask(logps: Tensor, old_logps: Tensor, micro: MicroBatch, threshold: float) -> Tensor:
    """[batch, 1] bool (or as the advantages): False where A < 0 and the mean over tokens of sampled - logps exceeds
    `threshold`. An answer that the policy has left already is not pushed down further. DeepSeek-V3.2 (2512.02556).

    sampled: the engine's log-probabilities, or old_logps where those are not known; NaN is no evidence."""
    sampled = old_logps if micro.sampler_logps is None else micro.sampler_logps
    advantages = micro.advantages[:, None] if micro.advantages.dim() == 1 else micro.advantages
    keep = micro.mask.bool()
    drift = torch.where(keep, sampled.to(logps.dtype) - logps.detach(), 0.0).nan_to_num(nan=0.0)
    drift = drift.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
    return (advantages >= 0) | (drift <= threshold)


def _high_entropy(entropy: Tensor | None, threshold: Tensor | float | None, micro: MicroBatch) -> Tensor:
    """[batch, time] bool: completion tokens whose entropy reaches the threshold."""
    assert entropy is not None, "--top-entropy-quantile needs entropies"
    assert threshold is not None, "--top-entropy-quantile needs the threshold of step_entropy_threshold"
    return micro.mask.bool() & (entropy.detach() >= threshold)


def _mismatch(old_logps: Tensor, micro: MicroBatch) -> Tensor | None:
    """[batch, time] log(pi_old / pi_sampler), nats, 0 where masked or not known; None without the sampler's."""
    if micro.sampler_logps is None:
        return None
    dtype = micro.mask.dtype
    difference = old_logps.detach().to(dtype) - micro.sampler_logps.to(dtype)
    return torch.where(micro.mask.bool(), difference, 0.0).nan_to_num(nan=0.0)


def _unbounded_weights(mismatch: Tensor, importance: Importance) -> Tensor:
    """[batch, time] exp of the mismatch of each token, or of its sum over the sequence; 1 with 'none'."""
    if importance == "none":
        return torch.ones_like(mismatch)
    if importance.startswith("sequence"):
        mismatch = mismatch.sum(-1, keepdim=True).expand_as(mismatch)
    return mismatch.clamp(max=MAX_LOG_RATIO).exp()


def _clean(values: Tensor, keep: Tensor) -> Tensor:
    """The values in float32 (float64 if they are), and 0 where masked. It is torch.where and not a product, since
    NaN * 0 is NaN, in the gradient, too."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(keep, values.to(dtype), 0.0)


def _per_token(advantages: Tensor, logps: Tensor) -> Tensor:
    """[batch] or [batch, time] -> [batch, time], in the dtype of logps."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    return advantages.detach().to(logps.dtype).expand_as(logps)


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


# ------------------------------------------------------------------------------------------------------------- checks


def _check_choices(o: Objective) -> None:
    _known("loss", o.loss, LOSSES)
    _known("average", o.average or LOSSES[o.loss].average, AVERAGES)
    _known("level", o.level or "token", ("token", "sequence"))
    _known("kl", o.kl or "k3", ("k1", "k2", "k3", "k3_ratio"))
    _known("importance", o.importance, _IMPORTANCE)


def _check_ranges(o: Objective) -> None:
    for name in ("epsilon", "epsilon_high", "delta", "importance_cap", "importance_floor"):
        value = getattr(o, name)
        if value is not None and not value > 0:
            raise UserError(f"{flag(name)} is {value}: must be positive")
    for name in ("beta", "entropy_bonus", "off_policy_threshold"):
        value = getattr(o, name)
        if value is not None and not value >= 0:
            raise UserError(f"{flag(name)} is {value}: must not be negative")
    if not 0 < o.top_entropy_quantile <= 1:
        raise UserError(f"--top-entropy-quantile is {o.top_entropy_quantile}: must be in (0, 1]; 1 keeps every token")
    if not all(tau > 0 for tau in o.sapo_temperatures):
        raise UserError(f"--sapo-temperatures is {o.sapo_temperatures}: both must be positive")
    if not all(x > 0 for x in o.vespo_shape):
        raise UserError(f"--vespo-shape is {o.vespo_shape}: all four must be positive")
    if o.importance_floor is not None and o.importance != "none" and o.importance_floor >= o.cap:
        raise UserError(f"--importance-floor {o.importance_floor} must be below --importance-cap {o.cap}")


def _check_effect(o: Objective, num_iterations: int | None) -> None:
    """Refuse a flag that has no effect beside another."""
    row, default = LOSSES[o.loss], Objective()
    without_effect = {
        "epsilon": o.epsilon is not None and row.clip != "around 1",
        "epsilon_high": o.epsilon_high is not None and row.clip is None,
        "delta": o.delta is not None and row.term is not clipped,
        "level": o.level is not None and row.level is None,
        "sapo_temperatures": o.sapo_temperatures != default.sapo_temperatures and o.loss != "sapo",
        "vespo_shape": o.vespo_shape != default.vespo_shape and o.loss != "vespo",
    }
    for name, wrong in without_effect.items():
        if wrong:
            raise UserError(f"{flag(name)} has no effect with --loss {o.loss}: drop one of the two")
    for name in ("level", "epsilon", "epsilon_high", "delta"):
        if num_iterations == 1 and getattr(o, name) is not None:
            raise UserError(
                f"{flag(name)} has no effect with one optimizer step per batch, where the ratio is always 1: drop "
                f"it, or take several (--num-iterations, in a recipe that has it)"
            )
    if o.kl is not None and o.beta == 0:
        raise UserError(f"--kl {o.kl} has no effect with --beta 0: give --beta or drop --kl")
    for name in ("importance_cap", "importance_floor"):
        if getattr(o, name) is not None and o.importance == "none":
            raise UserError(f"{flag(name)} has no effect with --importance none: drop one of the two")
    if o.importance.startswith("sequence") and row.folds_sampler_weights:
        raise UserError(
            f"--importance {o.importance} does not fit --loss {o.loss}, which multiplies token weights into its own "
            f"sequence weight: use token_truncate, token_mask or none"
        )
    high = clip_range(o.loss, o.epsilon, o.epsilon_high)[1]
    if o.delta is not None and o.delta <= high:
        raise UserError(
            f"--delta {o.delta} must exceed 1 + --epsilon-high = {high:g}, or it would cut inside the clip range"
        )


_IMPORTANCE = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def _known(name: str, value: str, choices: Sequence[str] | Mapping[str, object]) -> None:
    if value not in choices:
        raise UserError(f"{flag(name)} is {value!r}: choose one of {', '.join(choices)}")


def _check_required(
    o: Objective, ref_logps: Tensor | None, entropy: Tensor | None, max_completion_length: int | None
) -> None:
    if o.beta and ref_logps is None:
        raise UserError(f"ref_logps is None with beta {o.beta}: pass the reference's log-probabilities or beta=0")
    if entropy is None and (o.entropy_bonus or o.top_entropy_quantile < 1):
        raise UserError("entropy is None with entropy_bonus or top_entropy_quantile: pass [batch, time] entropies")
    if (o.average or LOSSES[o.loss].average) == "constant" and max_completion_length is None:
        raise UserError("max_completion_length is None: average 'constant' (dr_grpo) divides by it")


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
        raise UserError(f"logps is {list(logps.shape)}: must be [batch, time]")
    others = {"old_logps": old_logps, "mask": mask, "ref_logps": ref_logps, "sampler_logps": sampler_logps}
    for name, tensor in (others | {"entropy": entropy}).items():
        if tensor is not None and tensor.shape != logps.shape:
            raise UserError(f"{name} is {list(tensor.shape)}, logps {list(logps.shape)}: both must be [batch, time]")
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        raise UserError(f"advantages is {list(advantages.shape)}: must be [batch] or [batch, time] of logps")
