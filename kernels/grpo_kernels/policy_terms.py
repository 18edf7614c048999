"""Per-token policy losses from log-probabilities: one table of small functions.

With w the ratio of the new to the old probability (of a token, or of a sequence: the geometric mean over its tokens),
A the advantage, sg() a stop-gradient and [low, high] the clip range, a loss is a function of one token:

    clipped     -min(min(w, delta) A, clip(w, low, high) A)              grpo bnpo dr_grpo dapo gspo luspo
    cispo       -sg(min(w, high)) A logp
    sapo        -(4 / tau) sigmoid(tau (w - 1)) A                        tau by the sign of A
    vespo       -sg(phi(W)) A logp,  phi(W) = e^lambda W^k e^(-lambda W) W the whole sequence's probability ratio
    reinforce   -A logp

To add a loss: write its function and its row in `LOSSES`. How tokens are averaged is the caller's part (a row only
names the averaging that the loss's paper uses).

Clamps, the same everywhere: a log-ratio is cut at `MAX_LOG_RATIO` = 20 from above before it is exponentiated (w at
most 4.9e8; the gradient through w is zero there), likewise the reference's log-ratio in k3. Nothing else is cut, but
for what VESPO's definition cuts itself. At masked positions every input may be anything, NaN and infinities
included: terms and gradients are exactly zero there.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0

Level = Literal["token", "sequence"]
Kl = Literal["k1", "k2", "k3", "k3_ratio"]


class Tokens(NamedTuple):
    """What a loss may look at. All [batch, time], float32 (float64 if the log-probabilities are)."""

    logps: Tensor
    """log-probabilities under the policy being trained, nats; 0 where masked"""
    log_ratio: Tensor
    """logps - old_logps; 0 where masked"""
    log_weight: Tensor
    """log w: the log-ratio of the token or, at level 'sequence', its mean over the sequence; at most 20"""
    advantages: Tensor
    mask: Tensor
    """1 at completion tokens, else 0"""
    importance: Tensor | None
    """constant weight for the sampler's mismatch; None: 1"""


class Shape(NamedTuple):
    """The parameters of the formulas."""

    low: float
    high: float
    """clip range of w"""
    delta: float | None = None
    """upper bound of w also where the advantage is negative (two-sided clip)"""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """tau for A > 0, tau else"""
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    """k, lambda for A >= 0; k, lambda for A < 0"""


def clipped(t: Tokens, p: Shape) -> Tensor:
    """-min(min(w, delta) A, clip(w, low, high) A). PPO (arXiv 1707.06347), GRPO (2402.03300); delta: INTELLECT-2
    (2505.07291). With delta > high it is the dual clip of 1912.09729 with c = delta."""
    w = t.log_weight.exp()
    bounded = w if p.delta is None else w.clamp(max=p.delta)
    return -torch.min(bounded * t.advantages, w.clamp(p.low, p.high) * t.advantages)


def cispo(t: Tokens, p: Shape) -> Tensor:
    """-sg(min(w, high)) A logp: no token loses its gradient. MiniMax-M1 (arXiv 2506.13585), ScaleRL (2510.13786)."""
    return -t.log_weight.detach().exp().clamp(max=p.high) * t.advantages * t.logps


def sapo(t: Tokens, p: Shape) -> Tensor:
    """-(4 / tau) sigmoid(tau (w - 1)) A: a soft gate in place of the clip, of slope 1 at w = 1. arXiv 2511.20347."""
    positive, other = p.sapo_temperatures
    tau = torch.where(t.advantages > 0, positive, other)
    return -4 / tau * torch.sigmoid(tau * (t.log_weight.exp() - 1)) * t.advantages


def vespo(t: Tokens, p: Shape) -> Tensor:
    """-sg(phi(W)) A logp, phi(W) = e^lambda W^k e^(-lambda W), log W the sum of the sequence's log-ratios and of the
    logs of its sampler weights. arXiv 2602.10693, with TRL 1.16's clamps: each log within [-20, 20] (log 1e-8 from
    below for the sampler weights), log W within [log 1e-8, 20]."""
    with torch.no_grad():
        lowest = math.log(1e-8)
        log_ratio = t.log_ratio.clamp(-20, 20)
        if t.importance is not None:
            log_ratio = log_ratio + t.importance.log().clamp(lowest, 20)
        log_w = (log_ratio * t.mask).sum(-1, keepdim=True).clamp(lowest, 20)
        k_positive, lambda_positive, k_negative, lambda_negative = p.vespo_shape
        k = torch.where(t.advantages >= 0, k_positive, k_negative)
        rate = torch.where(t.advantages >= 0, lambda_positive, lambda_negative)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
    return -phi * t.advantages * t.logps


def reinforce(t: Tokens, p: Shape) -> Tensor:
    """-A logp (Williams 1992): no ratio, so nothing bounds how far old samples carry the policy."""
    return -t.advantages * t.logps


class Loss(NamedTuple):
    """A row of the table of losses; what a user may override has the paper's value here."""

    term: Callable[[Tokens, Shape], Tensor]
    level: Level | None
    """whose ratio w is; None: the loss has no w to choose"""
    average: str
    """how the caller averages tokens (grpo.objective.AVERAGES)"""
    clip: Literal["around 1", "cap"] | None
    """clip range [1 - epsilon, 1 + epsilon_high], or [0, epsilon_high], or none"""
    epsilon: float = math.nan
    epsilon_high: float = math.nan
    folds_importance: bool = False
    """the term takes the sampler weights in itself, rather than being multiplied by them"""


LOSSES: dict[str, Loss] = {
    "grpo": Loss(clipped, "token", "sequence_mean", "around 1", 0.2, 0.2),
    "bnpo": Loss(clipped, "token", "local_token_mean", "around 1", 0.2, 0.2),
    "dr_grpo": Loss(clipped, "token", "constant", "around 1", 0.2, 0.2),
    "dapo": Loss(clipped, "token", "token_mean", "around 1", 0.2, 0.28),
    "gspo": Loss(clipped, "sequence", "sequence_mean", "around 1", 3e-4, 4e-4),
    "luspo": Loss(clipped, "sequence", "sequence_sum", "around 1", 3e-4, 4e-4),
    "cispo": Loss(cispo, "token", "token_mean", "cap", epsilon_high=5.0),
    "sapo": Loss(sapo, "token", "sequence_mean", None),
    "vespo": Loss(vespo, None, "token_mean", None, folds_importance=True),
    "reinforce": Loss(reinforce, None, "token_mean", None),
}


def kl_terms(logps: Tensor, ref_logps: Tensor, log_weight: Tensor, kl: Kl) -> Tensor:
    """Per-token estimate of KL(policy || reference), [batch, time], from tokens sampled by the policy.

    With d = ref_logps - logps (http://joschu.net/blog/kl-approx.html):
    k1 = -d; k2 = d^2 / 2; k3 = e^d - d - 1; k3_ratio = w k3 (DeepSeek-V3.2, arXiv 2512.02556; the default of
    TRL >= 1.10): the value of k3 on policy, and the gradient of the KL divergence itself."""
    d = ref_logps - logps
    if kl == "k1":
        return -d
    if kl == "k2":
        return d.square() / 2
    d = d.clamp(max=MAX_LOG_RATIO)
    k3 = d.exp() - d - 1
    return k3 * log_weight.exp() if kl == "k3_ratio" else k3


def clip_range(loss: str, epsilon: float | None = None, epsilon_high: float | None = None) -> tuple[float, float]:
    """The bounds of w. A missing epsilon_high is the given epsilon; if both are missing, the loss's paper decides."""
    row = LOSSES[loss]
    if row.clip is None:
        return 0.0, math.inf
    if row.clip == "cap":
        return 0.0, row.epsilon_high if epsilon_high is None else epsilon_high
    if epsilon_high is None:
        epsilon_high = row.epsilon_high if epsilon is None else epsilon
    return 1 - (row.epsilon if epsilon is None else epsilon), 1 + epsilon_high


class PolicyTerms(NamedTuple):
    """All [batch, time] float32, 0 where masked."""

    policy: Tensor
    """the policy loss of each token, to be minimised, before any averaging; sampler weights applied"""
    kl: Tensor | None
    """the KL estimate of each token, not yet multiplied by beta; None without ref_logps"""
    log_weight: Tensor
    """log w as the loss saw it, detached"""


def policy_terms(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss: str = "grpo",
    level: Level | None = None,
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    delta: float | None = None,
    ref_logps: Tensor | None = None,
    kl: Kl = "k3_ratio",
    importance: Tensor | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0),
) -> PolicyTerms:
    """Per-token loss and KL estimate of every loss in `LOSSES`, differentiable in logps only.

    Args:
        logps: [batch, time] nats, of the policy being trained. Any float dtype; the arithmetic is float32 (float64
            for float64). Must be finite where mask is set.
        old_logps: [batch, time] nats, of the policy that sampled, by the trainer's own forward pass.
        advantages: [batch] or [batch, time].
        mask: [batch, time] bool or 0 / 1, completion tokens.
        loss: a name in `LOSSES`.
        level: whose ratio, 'token' or 'sequence'; None: the loss's own.
        epsilon, epsilon_high: see `clip_range`.
        delta: two-sided clip of the clipped losses, more than 1 + epsilon_high. None: off.
        ref_logps: [batch, time] nats, of the reference policy. None: no KL.
        kl: the estimator, see `kl_terms`.
        importance: [batch, time] or [batch, 1], constant weights for the mismatch between sampler and trainer.
        sapo_temperatures, vespo_shape: see `Shape`.
    """
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    keep = mask.bool()

    def clean(x: Tensor) -> Tensor:  # torch.where, not a product: NaN * 0 is NaN, in the gradient too
        return torch.where(keep, x.to(dtype), 0.0)

    row = LOSSES[loss]
    logps, old_logps = clean(logps), clean(old_logps.detach())
    log_ratio = logps - old_logps
    log_weight = log_ratio
    if (level or row.level) == "sequence":
        log_weight = (log_ratio.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    log_weight = log_weight.clamp(max=MAX_LOG_RATIO)
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).to(dtype).expand_as(logps)
    if importance is not None:
        importance = importance.to(dtype).expand_as(logps)

    low, high = clip_range(loss, epsilon, epsilon_high)
    tokens = Tokens(logps, log_ratio, log_weight, clean(advantages), keep.to(dtype), importance)
    policy = row.term(tokens, Shape(low, high, delta, sapo_temperatures, vespo_shape))
    if importance is not None and not row.folds_importance:
        policy = policy * importance
    estimate = None if ref_logps is None else clean(kl_terms(logps, clean(ref_logps.detach()), log_weight, kl))
    return PolicyTerms(clean(policy), estimate, clean(log_weight.detach()))
