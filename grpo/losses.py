"""Per-token policy losses from log-probabilities: one table of small functions.

With w the ratio of the new to the old probability (of a token, or of a sequence: the geometric mean over its tokens),
A the advantage, sg() a stop-gradient and [low, high] the clip range, a loss is a function of one token:

    clipped     -min(min(w, delta) A, clip(w, low, high) A)              grpo bnpo dr_grpo dapo gspo luspo
    cispo       -sg(min(w, high)) A logp
    sapo        -(4 / tau) sigmoid(tau (w - 1)) A                        tau by the sign of A
    vespo       -sg(phi(W)) A logp,  phi(W) = e^lambda W^k e^(-lambda W) W the whole sequence's probability ratio
    reinforce   -A logp

To add a loss: write its function and its row in `LOSSES`. How tokens are averaged is the caller's part (a row only
names the averaging that the loss's paper uses). On CUDA one Triton kernel computes terms and derivatives of the
functions above in one pass; a loss it does not know runs in torch, as everything does without CUDA.

Clamps, the same everywhere: a log-ratio is cut at `MAX_LOG_RATIO` = 20 from above before it is exponentiated (w at
most 4.9e8; the gradient through w is zero there), likewise the reference's log-ratio in k3. Nothing else is cut, but
for what VESPO's definition cuts itself. At masked positions every input may be anything, NaN and infinities
included: terms and gradients are exactly zero there.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.backend import triton_or_torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS: the torch functions serve
    triton = None

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
    """The parameters of the formulas, resolved."""

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


def kl_terms(logps: Tensor, ref_logps: Tensor, log_ratio: Tensor, kl: Kl) -> Tensor:
    """Per-token estimate of KL(policy || reference), [batch, time], from tokens sampled by the policy.

    With d = ref_logps - logps (http://joschu.net/blog/kl-approx.html):
    k1 = -d; k2 = d^2 / 2; k3 = e^d - d - 1; k3_ratio = e^log_ratio k3 (DeepSeek-V3.2, arXiv 2512.02556; the default of
    TRL >= 1.10): the value of k3 on policy, and the gradient of the KL divergence itself. The ratio is the token's
    whatever the loss's level: a sequence's geometric mean would pass each token a 1 / |o| of its share."""
    d = ref_logps - logps
    if kl == "k1":
        return -d
    if kl == "k2":
        return d.square() / 2
    d = d.clamp(max=MAX_LOG_RATIO)
    k3 = d.exp() - d - 1
    return k3 * log_ratio.clamp(max=MAX_LOG_RATIO).exp() if kl == "k3_ratio" else k3


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
    backend: Literal["triton", "torch"] | None = None,
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
        backend: None picks the Triton kernel on CUDA for the losses it knows, torch otherwise.

    Raises:
        ValueError: loss, level, kl or backend is unknown, or the backend cannot do it.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}")
    row = LOSSES[loss]
    level = level or row.level or "token"
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}: choose 'token' or 'sequence'")
    if kl not in ("k1", "k2", "k3", "k3_ratio"):
        raise ValueError(f"kl is {kl!r}: choose 'k1', 'k2', 'k3' or 'k3_ratio'")
    fused = triton is not None and row.term in (clipped, cispo, sapo, vespo, reinforce) and logps.dtype != torch.float64
    backend = triton_or_torch(backend, logps, fused, "not for float64 or losses of one's own")

    shape = Shape(*clip_range(loss, epsilon, epsilon_high), delta, sapo_temperatures, vespo_shape)
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).expand_as(logps)
    importance = None if importance is None else importance.expand_as(logps)
    if backend == "triton":
        return PolicyTerms(
            *_FusedTerms.apply(logps, old_logps, advantages, mask, ref_logps, importance, row, shape, level, kl)
        )
    return _terms(logps, old_logps, advantages, mask, ref_logps, importance, row, shape, level, kl)


def _terms(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None,
    importance: Tensor | None,
    row: Loss,
    shape: Shape,
    level: Level,
    kl: Kl,
) -> PolicyTerms:
    """The torch reference."""
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    keep = mask.bool()

    def clean(x: Tensor) -> Tensor:  # torch.where, not a product: NaN * 0 is NaN, in the gradient too
        return torch.where(keep, x.to(dtype), 0.0)

    logps = clean(logps)
    log_ratio = logps - clean(old_logps.detach())
    log_weight = log_ratio
    if level == "sequence":
        log_weight = (log_ratio.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    log_weight = log_weight.clamp(max=MAX_LOG_RATIO)
    importance = None if importance is None else torch.where(keep, importance.detach().to(dtype), 1.0)

    tokens = Tokens(logps, log_ratio, log_weight, clean(advantages.detach()), keep.to(dtype), importance)
    policy = row.term(tokens, shape)
    if importance is not None and not row.folds_importance:
        policy = policy * importance
    estimate = None if ref_logps is None else clean(kl_terms(logps, clean(ref_logps.detach()), log_ratio, kl))
    return PolicyTerms(clean(policy), estimate, clean(log_weight.detach()))


class _FusedTerms(torch.autograd.Function):
    """Terms and their derivatives by the kernel in the forward pass; the backward pass multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logps: Tensor | None,
        importance: Tensor | None,
        row: Loss,
        shape: Shape,
        level: Level,
        kl: Kl,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        batch, time = logps.shape
        keep = mask.bool().contiguous()
        policy, policy_slope, log_weight = (torch.empty_like(keep, dtype=torch.float32) for _ in range(3))
        estimate = kl_slope = None
        if ref_logps is not None:
            estimate, kl_slope = torch.empty_like(policy), torch.empty_like(policy)
        if batch and time:
            _terms_kernel[(batch,)](
                logps.contiguous(), old_logps.contiguous(), None if ref_logps is None else ref_logps.contiguous(),
                advantages, keep.view(torch.uint8), importance,
                policy, policy_slope, estimate, kl_slope, log_weight,
                time, *advantages.stride(), *((0, 0) if importance is None else importance.stride()),
                shape.low, shape.high, math.inf if shape.delta is None else shape.delta,
                *shape.sapo_temperatures, *shape.vespo_shape, MAX_LOG_RATIO, math.log(1e-8),
                TERM=row.term.__name__, SEQUENCE=level == "sequence", KL=None if ref_logps is None else kl,
                IMPORTANCE=importance is not None, BLOCK=min(1024, triton.next_power_of_2(time)),
            )  # fmt: skip
        ctx.save_for_backward(keep, policy_slope, kl_slope)
        # at sequence level a term moves with w, and w with every token of the sequence; what has w under a
        # stop-gradient, and the KL estimate, move with their own token only
        ctx.by_sequence = level == "sequence" and row.term in (clipped, sapo)
        ctx.mark_non_differentiable(log_weight)
        return policy, estimate, log_weight

    @staticmethod
    def backward(ctx: Any, grad_policy: Tensor, grad_kl: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        keep, policy_slope, kl_slope = ctx.saved_tensors
        grad = grad_policy * policy_slope
        if ctx.by_sequence:
            share = grad.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
            grad = torch.where(keep, share, 0.0)
        if kl_slope is not None:
            grad = grad + grad_kl * kl_slope
        return grad, *[None] * 9


if triton is not None:

    @triton.jit
    def _terms_kernel(
        logps_ptr, old_ptr, ref_ptr, advantages_ptr, keep_ptr, importance_ptr,
        policy_ptr, policy_slope_ptr, kl_ptr, kl_slope_ptr, log_weight_ptr,
        time, advantage_row, advantage_column, importance_row, importance_column,
        low, high, delta, tau_positive, tau_other, k_positive, lambda_positive, k_negative, lambda_negative,
        max_log_ratio, lowest,
        TERM: tl.constexpr, SEQUENCE: tl.constexpr, KL: tl.constexpr, IMPORTANCE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One sequence: every token's policy term and KL estimate, and their derivatives.

        policy_slope: d policy / d logp, or d policy / d log w at sequence level where w is not under a stop-gradient.
        kl_slope: d kl / d logp.
        Formulas: the torch functions of this file.
        """
        row = tl.program_id(0).to(tl.int64)
        offsets = tl.arange(0, BLOCK)

        if SEQUENCE or TERM == "vespo":  # the first pass: what needs the whole sequence
            total = tl.zeros([BLOCK], tl.float32)
            count = tl.zeros([BLOCK], tl.float32)
            for start in range(0, time, BLOCK):
                t = start + offsets
                keep = tl.load(keep_ptr + row * time + t, mask=t < time, other=0) != 0
                logps = tl.load(logps_ptr + row * time + t, mask=keep, other=0.0).to(tl.float32)
                old = tl.load(old_ptr + row * time + t, mask=keep, other=0.0).to(tl.float32)
                log_ratio = logps - old
                if TERM == "vespo":
                    log_ratio = tl.minimum(tl.maximum(log_ratio, -20.0), 20.0)
                    if IMPORTANCE:
                        pointers = importance_ptr + row * importance_row + t * importance_column
                        log_importance = tl.log(tl.load(pointers, mask=keep, other=1.0).to(tl.float32))
                        log_ratio += tl.minimum(tl.maximum(log_importance, lowest), 20.0)
                total += tl.where(keep, log_ratio, 0.0)
                count += tl.where(keep, 1.0, 0.0)
            total_log_ratio = tl.sum(total)
            mean_log_ratio = total_log_ratio / tl.maximum(tl.sum(count), 1.0)

        for start in range(0, time, BLOCK):
            t = start + offsets
            inside = t < time
            keep = tl.load(keep_ptr + row * time + t, mask=inside, other=0) != 0
            logps = tl.load(logps_ptr + row * time + t, mask=keep, other=0.0).to(tl.float32)
            old = tl.load(old_ptr + row * time + t, mask=keep, other=0.0).to(tl.float32)
            pointers = advantages_ptr + row * advantage_row + t * advantage_column
            advantages = tl.load(pointers, mask=keep, other=0.0).to(tl.float32)
            log_ratio = logps - old
            raw = log_ratio
            if SEQUENCE:
                raw = tl.where(keep, mean_log_ratio, 0.0)
            log_weight = tl.minimum(raw, max_log_ratio)
            w = tl.exp(log_weight)
            w_slope = tl.where(raw <= max_log_ratio, w, 0.0)  # d w / d log-ratio

            if TERM == "clipped":
                first = tl.minimum(w, delta) * advantages
                second = tl.minimum(tl.maximum(w, low), high) * advantages
                policy = -tl.minimum(first, second)
                first_slope = tl.where(w <= delta, w_slope, 0.0)
                second_slope = tl.where((w >= low) & (w <= high), w_slope, 0.0)
                slope = tl.where(first < second, first_slope, second_slope)
                slope = tl.where(first == second, 0.5 * (first_slope + second_slope), slope) * -advantages
            elif TERM == "sapo":
                tau = tl.where(advantages > 0, tau_positive, tau_other)
                gate = tl.sigmoid(tau * (w - 1))
                policy = -4 / tau * gate * advantages
                slope = -4 * gate * (1 - gate) * w_slope * advantages
            else:
                if TERM == "cispo":
                    factor = tl.minimum(w, high)
                elif TERM == "vespo":
                    log_w = tl.minimum(tl.maximum(total_log_ratio, lowest), 20.0)
                    k = tl.where(advantages >= 0, k_positive, k_negative)
                    rate = tl.where(advantages >= 0, lambda_positive, lambda_negative)
                    factor = tl.exp(rate + k * log_w - rate * tl.exp(log_w))
                else:  # reinforce
                    factor = tl.full([BLOCK], 1.0, tl.float32)
                slope = -factor * advantages
                policy = slope * logps
            if IMPORTANCE and TERM != "vespo":
                pointers = importance_ptr + row * importance_row + t * importance_column
                importance = tl.load(pointers, mask=keep, other=1.0).to(tl.float32)
                policy *= importance
                slope *= importance
            tl.store(policy_ptr + row * time + t, tl.where(keep, policy, 0.0), mask=inside)
            tl.store(policy_slope_ptr + row * time + t, tl.where(keep, slope, 0.0), mask=inside)
            tl.store(log_weight_ptr + row * time + t, tl.where(keep, log_weight, 0.0), mask=inside)

            if KL is not None:
                d = tl.load(ref_ptr + row * time + t, mask=keep, other=0.0).to(tl.float32) - logps
                if KL == "k1":
                    kl = -d
                    slope = tl.full([BLOCK], 1.0, tl.float32)
                elif KL == "k2":
                    kl = d * d / 2
                    slope = -d
                else:
                    bounded = tl.minimum(d, max_log_ratio)
                    power = tl.exp(bounded)
                    kl = power - bounded - 1
                    slope = tl.where(d <= max_log_ratio, 1 - power, 0.0)
                    if KL == "k3_ratio":
                        ratio = tl.exp(tl.minimum(log_ratio, max_log_ratio))
                        slope = slope * ratio + tl.where(log_ratio <= max_log_ratio, kl * ratio, 0.0)
                        kl = kl * ratio
                tl.store(kl_ptr + row * time + t, tl.where(keep, kl, 0.0), mask=inside)
                tl.store(kl_slope_ptr + row * time + t, tl.where(keep, slope, 0.0), mask=inside)
