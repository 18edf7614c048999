"""Policy losses per token: one plain function each, from log-probabilities to a number that is to be minimized.

With w the ratio of the new to the old probability (of a token, or of a sequence: the geometric mean over its tokens),
A the advantage, sg() a stop-gradient and [low, high] the clip range:

    clipped     -min(min(w, delta) A, clip(w, low, high) A)            grpo bnpo dr_grpo dapo gspo luspo
    cispo       -sg(min(w, high)) A logp
    sapo        -(4 / tau) sigmoid(tau (w - 1)) A                      tau by the sign of A
    vespo       -sg(phi(W)) A logp,  phi(W) = e^lambda W^k e^(-lambda W)   W: the whole sequence's probability ratio
    reinforce   -A logp

To add a loss for all recipes, write its function here and its row in `LOSSES`. To try one in a single recipe, write the
function there and call it in the place of `surrogate`. How token losses become one number is a separate choice
(`grpo.objective.average`); a row only names the average that the loss's paper uses.

Clamps: a log-ratio is cut at `MAX_LOG_RATIO` = 20 from above before it is exponentiated, so w is at most 4.9e8 and the
gradient through w is zero there; likewise the reference's log-ratio in k3. Nothing else is cut, except for what
VESPO's definition cuts itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from grpo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0

Level = Literal["token", "sequence"]
Kl = Literal["k1", "k2", "k3", "k3_ratio"]


class Tokens(NamedTuple):
    """What a loss may look at. All [batch, time], float32 (float64 if the log-probabilities are)."""

    logps: Tensor
    """log-probabilities under the policy that is trained, nats; 0 where masked"""
    log_ratio: Tensor
    """logps - old_logps; 0 where masked"""
    log_weight: Tensor
    """log w: the token's log-ratio or, at level 'sequence', its mean over the sequence; at most 20"""
    advantages: Tensor
    """[batch, time] or [batch, 1]; 0 where masked"""
    mask: Tensor
    """1 at completion tokens, else 0"""
    sampler_weights: Tensor | None
    """constant weights for the mismatch of sampler and trainer; None: 1"""


class LossParameters(NamedTuple):
    """The parameters of the formulas, with the loss's defaults filled in."""

    low: float
    """lower end of the clip range of w"""
    high: float
    """upper end of the clip range of w"""
    delta: float | None = None
    """upper bound of w where the advantage is negative, too (two-sided clip)"""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """tau for A > 0, and tau for the others"""
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    """k and lambda for A >= 0; k and lambda for A < 0"""


def clipped(t: Tokens, p: LossParameters) -> Tensor:
    """-min(min(w, delta) A, clip(w, low, high) A). PPO (arXiv 1707.06347), GRPO (2402.03300); delta: INTELLECT-2
    (2505.07291). With delta > high it is the dual clip of 1912.09729 with c = delta."""
    w = t.log_weight.exp()
    bounded = w if p.delta is None else w.clamp(max=p.delta)
    return -torch.min(bounded * t.advantages, w.clamp(p.low, p.high) * t.advantages)


def cispo(t: Tokens, p: LossParameters) -> Tensor:
    """-sg(min(w, high)) A logp: no token loses its gradient. MiniMax-M1 (arXiv 2506.13585), ScaleRL (2510.13786)."""
    return -t.log_weight.detach().exp().clamp(max=p.high) * t.advantages * t.logps


def sapo(t: Tokens, p: LossParameters) -> Tensor:
    """-(4 / tau) sigmoid(tau (w - 1)) A: a soft gate in place of the clip, of slope 1 at w = 1. arXiv 2511.20347."""
    positive, other = p.sapo_temperatures
    tau = torch.where(t.advantages > 0, positive, other)
    return -4 / tau * torch.sigmoid(tau * (t.log_weight.exp() - 1)) * t.advantages


def vespo(t: Tokens, p: LossParameters) -> Tensor:
    """-sg(phi(W)) A logp, phi(W) = e^lambda W^k e^(-lambda W), log W the sum of the sequence's log-ratios and of the
    logarithms of its sampler weights. arXiv 2602.10693, with TRL 1.16's clamps: each logarithm within [-20, 20] (from
    below at log 1e-8 for the sampler weights), log W within [log 1e-8, 20]."""
    with torch.no_grad():
        lowest = math.log(1e-8)
        log_ratio = t.log_ratio.clamp(-20, 20)
        if t.sampler_weights is not None:
            log_ratio = log_ratio + t.sampler_weights.log().clamp(lowest, 20)
        log_w = (log_ratio * t.mask).sum(-1, keepdim=True).clamp(lowest, 20)
        k_positive, lambda_positive, k_negative, lambda_negative = p.vespo_shape
        k = torch.where(t.advantages >= 0, k_positive, k_negative)
        rate = torch.where(t.advantages >= 0, lambda_positive, lambda_negative)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
    return -phi * t.advantages * t.logps


def reinforce(t: Tokens, p: LossParameters) -> Tensor:
    """-A logp (Williams 1992). It has no ratio, so nothing bounds how far old samples carry the policy."""
    return -t.advantages * t.logps


class Loss(NamedTuple):
    """A row of the table of losses: the values of the loss's paper for what a flag may override."""

    term: Callable[[Tokens, LossParameters], Tensor]
    level: Level | None
    """level of the ratio w; None: the loss has no w to choose"""
    average: str
    """average over tokens, see `grpo.objective.AVERAGES`"""
    clip: Literal["around 1", "cap"] | None
    """kind of clip range: [1 - epsilon, 1 + epsilon_high], or [0, epsilon_high], or none"""
    epsilon: float = math.nan
    epsilon_high: float = math.nan
    folds_sampler_weights: bool = False
    """whether the term takes the sampler weights in itself, rather than being multiplied by them"""


LOSSES: dict[str, Loss] = {
    "grpo": Loss(clipped, "token", "sequence_mean", "around 1", 0.2, 0.2),
    "bnpo": Loss(clipped, "token", "local_token_mean", "around 1", 0.2, 0.2),
    "dr_grpo": Loss(clipped, "token", "constant", "around 1", 0.2, 0.2),
    "dapo": Loss(clipped, "token", "token_mean", "around 1", 0.2, 0.28),
    "gspo": Loss(clipped, "sequence", "sequence_mean", "around 1", 3e-4, 4e-4),
    "luspo": Loss(clipped, "sequence", "sequence_sum", "around 1", 3e-4, 4e-4),
    "cispo": Loss(cispo, "token", "token_mean", "cap", epsilon_high=5.0),
    "sapo": Loss(sapo, "token", "sequence_mean", None),
    "vespo": Loss(vespo, None, "token_mean", None, folds_sampler_weights=True),
    "reinforce": Loss(reinforce, None, "token_mean", None),
}


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


def log_weights(log_ratio: Tensor, mask: Tensor, level: Level) -> Tensor:
    """[batch, time] log w, at most 20: each token's log-ratio, or at level 'sequence' its mean over the sequence (GSPO,
    arXiv 2507.18071). log_ratio: [batch, time] logps - old_logps, 0 where masked. mask: [batch, time], 1 or 0."""
    if level == "sequence":
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_ratio)
    return log_ratio.clamp(max=MAX_LOG_RATIO)


def kl_terms(logps: Tensor, ref_logps: Tensor, log_ratio: Tensor, kl: Kl) -> Tensor:
    """Per-token estimate of KL(policy || reference), [batch, time], from tokens sampled by the policy.

    With d = ref_logps - logps (http://joschu.net/blog/kl-approx.html):
    k1 = -d; k2 = d^2 / 2; k3 = e^d - d - 1; k3_ratio = e^log_ratio k3 (DeepSeek-V3.2, arXiv 2512.02556; the default of
    TRL >= 1.10), which on policy has the value of k3 and the gradient of the KL divergence itself. Its ratio is the
    token's whatever the loss's level: a sequence's geometric mean would pass each token 1 / |o| of its part."""
    d = ref_logps - logps
    if kl == "k1":
        return -d
    if kl == "k2":
        return d.square() / 2
    d = d.clamp(max=MAX_LOG_RATIO)
    k3 = d.exp() - d - 1
    return k3 * log_ratio.clamp(max=MAX_LOG_RATIO).exp() if kl == "k3_ratio" else k3
