"""The objective against TRL's own loss, Liger's, finite differences, hand-made values and its own invariances."""

import dataclasses
import itertools
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import Advantage
from grpo.batch import MicroBatch, StepBatch, StepTotals, rows_with_gradient
from grpo.distributed import World
from grpo.losses import LOSSES
from grpo.objective import (
    AVERAGES,
    Objective,
    average,
    entropy_bonus,
    entropy_quantile,
    kl_penalty,
    log_ratio,
    merge_metrics,
    old_policy_logps,
    policy_loss,
    sampler_weights,
    step_entropy_threshold,
    surrogate,
    token_filter,
    token_metrics,
)

CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
MAX_LENGTH = 11


def ragged_batch(seed=0, batch=6, time=9, dtype=torch.float32, spread=0.4):
    """Log-probabilities of several policies, both signs of advantage, masks of every length from 1 on."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logps = -randn(batch, time).abs() * 2 - 0.05
    lengths = torch.randint(1, time + 1, (batch,), generator=g)
    lengths[0] = time
    return SimpleNamespace(
        logps=logps.to(dtype),
        old_logps=(logps + spread * randn(batch, time)).to(dtype),
        ref_logps=(logps + 0.5 * randn(batch, time)).to(dtype),
        sampler_logps=(logps + 0.6 * randn(batch, time)).to(dtype),
        entropy=randn(batch, time).abs().to(dtype),
        advantages=randn(batch).to(dtype),
        mask=torch.arange(time) < lengths[:, None],
    )


def as_micro(b, max_length=MAX_LENGTH, sampler=True) -> MicroBatch:
    """A batch as the recipes have it: the step's one micro-batch."""
    mask = b.mask.to(torch.float64 if b.logps.dtype == torch.float64 else torch.float32)
    step = StepTotals(mask.sum(), b.mask.any(-1).sum(), max_length)
    return MicroBatch(None, None, mask, b.sampler_logps if sampler else None, b.advantages, [], step)


def loss_and_gradient(b, objective, **kwargs):
    objective.check()
    logps = b.logps.clone().requires_grad_()
    loss, metrics = policy_loss(
        logps, b.old_logps, b.advantages, b.mask, objective, max_completion_length=MAX_LENGTH, **kwargs
    )
    return loss.detach(), torch.autograd.grad(loss, logps)[0], metrics


def trl_loss_and_gradient(b, *, loss, level="token", epsilon=(0.2, 0.2), delta=None, beta=0.0, weighted_kl=True,
                          importance=None, off_policy_threshold=None, quantile=1.0, entropy_coef=0.0):  # fmt: skip
    """GRPOTrainer._compute_loss of TRL, on log-probabilities instead of a model."""
    from trl import GRPOTrainer

    logps = b.logps.clone().requires_grad_()
    mask = b.mask.long()
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__.update(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, b.entropy, None),
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, **kwargs: x,
            sync_gradients=True,
        ),
        args=SimpleNamespace(
            delta=delta, use_bias_correction_kl=weighted_kl, steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
        model=SimpleNamespace(training=True),
        loss_type=loss,
        importance_sampling_level=level,
        epsilon_low=epsilon[0],
        epsilon_high=epsilon[1],
        beta=beta,
        top_entropy_quantile=quantile,
        off_policy_mask_threshold=off_policy_threshold,
        use_vllm=importance is not None,
        vllm_importance_sampling_correction=importance is not None,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": b.advantages,
        "old_per_token_logps": b.old_logps,
        "ref_per_token_logps": b.ref_logps,
        "num_items_in_batch": mask.sum(),
    }
    if importance is not None:
        inputs["importance_sampling_ratio"] = importance
        inputs["sampling_per_token_logps"] = b.sampler_logps
    value = trainer._compute_loss(None, inputs)
    return value.detach(), torch.autograd.grad(value, logps)[0]


def assert_same(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance)
    assert theirs[1].abs().max() > 1e-3


def unweighted(level):
    """At sequence level the peers weigh a token's KL estimate by the sequence's ratio, which is not the divergence's
    gradient (`test_kl_estimators_in_expectation`): there the estimate without weight is compared."""
    return "k3" if level == "sequence" else None


# every combination that TRL's loss knows and that we do not refuse
VARIANTS = [
    (loss, level, beta, delta)
    for loss, level, beta, delta in itertools.product(
        [*CLIPPED, "cispo", "sapo", "vespo"], ("token", "sequence"), (0.0, 0.04), (None, 1.6)
    )
    if (delta is None or loss in CLIPPED) and not (loss == "vespo" and level == "sequence")
]
# Liger's luspo averages differently, and it refuses sequence ratios with cispo and sapo
LIGER_VARIANTS = [v for v in VARIANTS if v[0] != "luspo" and (v[1] == "token" or v[0] in CLIPPED)]


def epsilons(loss):
    """(ours, theirs) of a clip range that cuts many of the tokens of `ragged_batch`."""
    if loss == "cispo":
        return {"epsilon_high": 1.2}, (0.2, 1.2)
    if loss in CLIPPED:
        return {"epsilon": 0.2, "epsilon_high": 0.28}, (0.2, 0.28)
    return {}, (0.2, 0.2)


@pytest.mark.parametrize(("loss", "level", "beta", "delta"), VARIANTS)
def test_equals_trl(loss, level, beta, delta):
    ours, theirs = epsilons(loss)
    kl = unweighted(level) if beta else None
    objective = Objective(loss=loss, level=None if loss == "vespo" else level, beta=beta, kl=kl, delta=delta, **ours)
    for seed in range(3):
        b = ragged_batch(seed)
        ref = {"ref_logps": b.ref_logps} if beta else {}
        assert_same(
            loss_and_gradient(b, objective, **ref),
            trl_loss_and_gradient(
                b, loss=loss, level=level, beta=beta, delta=delta, weighted_kl=not kl, epsilon=theirs
            ),
        )


@pytest.mark.parametrize(("loss", "level", "beta", "delta"), LIGER_VARIANTS)
def test_equals_liger(loss, level, beta, delta):
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    ours, theirs = epsilons(loss)
    kl = unweighted(level) if beta else None
    objective = Objective(loss=loss, level=None if loss == "vespo" else level, beta=beta, kl=kl, delta=delta, **ours)
    for seed in range(3):
        b = ragged_batch(seed)
        logps = b.logps.clone().requires_grad_()
        value, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logps, b.mask.float(), b.advantages, b.mask.float(), b.ref_logps, b.old_logps,
            epsilon_low=theirs[0], epsilon_high=theirs[1], beta=beta, loss_type=loss, max_completion_length=MAX_LENGTH,
            importance_sampling_level=level, delta=delta, use_bias_correction_kl=not kl,
        )  # fmt: skip
        ref = {"ref_logps": b.ref_logps} if beta else {}
        assert_same(loss_and_gradient(b, objective, **ref), (value.detach(), torch.autograd.grad(value, logps)[0]))


def test_gspo_is_grpo_at_sequence_level():
    b = ragged_batch(1, spread=3e-4)
    assert_same(
        loss_and_gradient(b, Objective(loss="gspo")),
        trl_loss_and_gradient(b, loss="grpo", level="sequence", epsilon=(3e-4, 4e-4)),
    )


def test_unweighted_k3_equals_trl():
    b = ragged_batch()
    assert_same(
        loss_and_gradient(b, Objective(loss="grpo", beta=0.5, kl="k3"), ref_logps=b.ref_logps),
        trl_loss_and_gradient(b, loss="grpo", beta=0.5, weighted_kl=False),
    )


@pytest.mark.parametrize("importance", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo", "sapo", "vespo"])
def test_importance_equals_trl(loss, importance):
    if loss == "vespo" and importance.startswith("sequence"):
        with pytest.raises(ValueError, match=r"--importance sequence_.* does not fit --loss vespo"):
            Objective(loss=loss, importance=importance).check()
        return
    b = ragged_batch(2)
    difference = (b.old_logps - b.sampler_logps) * b.mask
    ratio = (difference.sum(-1, keepdim=True) if importance.startswith("sequence") else difference).exp()
    clipped = ratio.clamp(0.6, 1.5)
    expected = clipped if importance.endswith("truncate") else torch.where(ratio == clipped, ratio, 0.0)
    assert 0 < (expected != ratio).float().mean() < 1
    ours, theirs = epsilons(loss)
    assert_same(
        loss_and_gradient(
            b,
            Objective(loss=loss, beta=0.04, importance=importance, importance_cap=1.5, importance_floor=0.6, **ours),
            ref_logps=b.ref_logps,
            sampler_logps=b.sampler_logps,
        ),
        trl_loss_and_gradient(b, loss=loss, beta=0.04, importance=expected, epsilon=theirs),
    )


def test_off_policy_sequence_mask_equals_trl():
    b = ragged_batch(3)
    b.advantages = -b.advantages.abs()
    b.advantages[1] = 0.7
    ratio = torch.ones_like(b.logps)
    ours = loss_and_gradient(
        b,
        Objective(loss="dapo", epsilon=0.2, beta=0.04, off_policy_threshold=0.05, importance="none"),
        ref_logps=b.ref_logps,
        sampler_logps=b.sampler_logps,
    )
    theirs = trl_loss_and_gradient(b, loss="dapo", beta=0.04, off_policy_threshold=0.05, importance=ratio)
    assert_same(ours, theirs)
    assert 0 < ours[2]["off_policy_masked"] < 1
    b.advantages = torch.zeros(6)  # not negative: nothing to leave out, however far
    assert loss_and_gradient(b, Objective(off_policy_threshold=1e-6))[2]["off_policy_masked"] == 0
    # without the sampler's log-probabilities, the old ones
    b.advantages = ragged_batch(3).advantages
    objective = Objective(loss="dapo", epsilon=0.2, off_policy_threshold=0.05)
    assert_same(loss_and_gradient(b, objective), trl_loss_and_gradient(b, loss="dapo", off_policy_threshold=0.05))


def test_entropy_quantile_equals_trl():
    b = ragged_batch(4)
    ours = loss_and_gradient(
        b,
        Objective(loss="dapo", epsilon=0.2, beta=0.04, top_entropy_quantile=0.2),
        ref_logps=b.ref_logps,
        entropy=b.entropy,
    )
    assert_same(ours, trl_loss_and_gradient(b, loss="dapo", beta=0.04, quantile=0.2))
    assert 0.15 < ours[2]["high_entropy"] < 0.3


def test_entropy_bonus_equals_trl():
    b = ragged_batch(5)
    b.entropy.requires_grad_()
    objective = Objective(loss="dapo", epsilon=0.2, entropy_bonus=0.3)
    ours, _ = policy_loss(b.logps, b.old_logps, b.advantages, b.mask, objective, entropy=b.entropy)
    (gradient,) = torch.autograd.grad(ours, b.entropy)
    torch.testing.assert_close(gradient, -0.3 * b.mask / b.mask.sum())
    theirs = trl_loss_and_gradient(b, loss="dapo", entropy_coef=0.3)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# Values made by hand


@pytest.mark.parametrize(
    ("objective", "ratio", "advantage", "loss", "slope"),
    [  # slope: d loss / d logp
        (Objective(loss="grpo"), 1.5, 2.0, -2.4, 0.0),
        (Objective(loss="grpo"), 1.1, 2.0, -2.2, -2.2),
        (Objective(loss="grpo"), 0.5, 2.0, -1.0, -1.0),
        (Objective(loss="grpo"), 0.5, -2.0, 1.6, 0.0),
        (Objective(loss="grpo"), 1.5, -2.0, 3.0, 3.0),
        (Objective(loss="grpo", epsilon_high=0.6), 1.5, 2.0, -3.0, -3.0),
        (Objective(loss="dapo"), 1.25, 1.0, -1.25, -1.25),  # clip-higher is DAPO's own
        (Objective(loss="dapo"), 1.30, 1.0, -1.28, 0.0),
        (Objective(loss="grpo", delta=4.0), 3.0, -1.0, 3.0, 3.0),
        (Objective(loss="grpo", delta=4.0), 5.0, -1.0, 4.0, 0.0),
        (Objective(loss="cispo"), 3.0, 1.0, 3.0, -3.0),  # logp = -1
        (Objective(loss="cispo"), 8.0, -1.0, -5.0, 5.0),
        (Objective(loss="reinforce"), 3.0, 2.0, 2.0, -2.0),
        (Objective(loss="sapo"), 1.0, 1.0, -2.0, -1.0),
        (Objective(loss="vespo"), 1.0, 2.0, 2.0, -2.0),
        (Objective(loss="vespo"), 2.0, 1.0, 4 * 2.718281828459045**-3, -4 * 2.718281828459045**-3),
    ],
)
def test_known_values(objective, ratio, advantage, loss, slope):
    logps = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    old = logps.detach() - torch.tensor(ratio, dtype=torch.float64).log()
    value, metrics = policy_loss(logps, old, torch.tensor([advantage]), torch.ones(1, 1), objective)
    (gradient,) = torch.autograd.grad(value, logps)
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert gradient.item() == pytest.approx(slope, rel=1e-6)
    assert metrics["ratio_max"].item() == pytest.approx(ratio, rel=1e-6)


def test_delta_is_the_dual_clip():
    """Ye et al. 2019: where A < 0, max(PPO's objective, c A)."""
    b = ragged_batch(spread=2.0, dtype=torch.float64)
    value = loss_and_gradient(b, Objective(loss="dapo", epsilon=0.2, delta=3.0))[0]
    w, a = (b.logps - b.old_logps).exp(), b.advantages[:, None]
    ppo = torch.minimum(w * a, w.clamp(0.8, 1.2) * a)
    dual = torch.where(a < 0, torch.maximum(ppo, 3 * a), ppo)
    assert ((ppo != dual) & b.mask).any()
    torch.testing.assert_close(value, -dual[b.mask].mean())


def test_averages_known_values():
    logps = torch.zeros(2, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    advantages = torch.tensor([[-8.0, 9, 9, 9], [-1, -2, -3, 9]], dtype=torch.float64)
    expected = {
        "sequence_mean": (8 + 2) / 2,
        "sequence_sum": (8 + 6) / 2,
        "token_mean": 14 / 4,
        "local_token_mean": 14 / 4,
        "constant": 14 / (2 * 7),
    }
    assert expected.keys() == AVERAGES.keys()
    for name, value in expected.items():
        loss, _ = policy_loss(logps, None, advantages, mask, Objective(loss="grpo", average=name),
                              max_completion_length=7)  # fmt: skip
        assert loss.item() == value, name


def test_documentation_lists_the_table():
    """docs/objectives.md has a row for every loss, with its level, average and clip range, and nothing else."""
    text = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text()
    table = text[text.index("## Losses") : text.index("| `--average`")]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `") and "--loss" not in line:
            name, _, level, clip, average, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            found[name.split("`")[1]] = (level, clip, average.strip("`"))
    ranges = {"grpo": "0.8 to 1.2", "bnpo": "0.8 to 1.2", "dr_grpo": "0.8 to 1.2", "dapo": "0.8 to 1.28",
              "gspo": "1 - 3e-4 to 1 + 4e-4", "luspo": "as gspo", "cispo": "up to 5"}  # fmt: skip
    levels = {"vespo": "sequence", "reinforce": ""}
    assert found == {
        name: (row.level or levels[name], ranges.get(name, "none"), row.average) for name, row in LOSSES.items()
    }
    assert set(get_args(get_type_hints(Objective)["loss"])) == set(LOSSES)


def test_paper_defaults():
    """The table is what docs/objectives.md says; an epsilon given alone is used for both sides."""
    b = ragged_batch(spread=0.3)
    same = [
        (Objective(loss="grpo"), Objective(loss="grpo", level="token", average="sequence_mean", epsilon=0.2)),
        (Objective(loss="gspo"), Objective(loss="grpo", level="sequence", epsilon=3e-4, epsilon_high=4e-4)),
        (Objective(loss="dapo"), Objective(loss="grpo", average="token_mean", epsilon=0.2, epsilon_high=0.28)),
        (Objective(loss="dr_grpo"), Objective(loss="grpo", average="constant")),
        (Objective(loss="bnpo"), Objective(loss="grpo", average="local_token_mean")),
        (Objective(loss="luspo"), Objective(loss="gspo", average="sequence_sum")),
        (Objective(loss="dapo", epsilon=0.1), Objective(loss="dapo", epsilon=0.1, epsilon_high=0.1)),
        (Objective(loss="cispo"), Objective(loss="cispo", epsilon_high=5.0)),
    ]
    for short, long in same:
        assert torch.equal(loss_and_gradient(b, short)[1], loss_and_gradient(b, long)[1]), short


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("old_shift", [0.0, 0.7])
def test_kl_estimators_in_expectation(old_shift, loss):
    """Over all sequences of two independent tokens: which divergence's gradient each estimator has."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(2, 4, generator=g, dtype=torch.float64).log_softmax(1)
    logps = theta.log_softmax(1)
    old = (theta + old_shift * torch.randn(2, 4, generator=g, dtype=torch.float64)).log_softmax(1).detach()
    reverse = (logps.exp() * (logps - ref)).sum() / 2  # KL(policy || reference), a token
    forward = (ref.exp() * (ref - logps)).sum() / 2
    gradient = {name: torch.autograd.grad(x, theta, retain_graph=True)[0] for name, x in
                {"reverse": reverse, "forward": forward}.items()}  # fmt: skip
    for kl in ("k1", "k2", "k3", "k3_ratio"):
        value = torch.zeros((), dtype=torch.float64)
        for tokens in itertools.product(range(4), repeat=2):
            sampled, before, reference = (x[range(2), tokens][None] for x in (logps, old, ref))
            one, _ = policy_loss(sampled, before, torch.zeros(1), torch.ones(1, 2),
                                 Objective(loss=loss, beta=1.0, kl=kl), ref_logps=reference)  # fmt: skip
            value = value + before.sum().exp() * one  # weighed by the probability that it is sampled
        (actual,) = torch.autograd.grad(value, theta, retain_graph=True)
        if kl == "k3_ratio":
            torch.testing.assert_close(value, reverse)
            torch.testing.assert_close(actual, gradient["reverse"])
        elif old_shift == 0:
            torch.testing.assert_close(
                actual, {"k1": torch.zeros_like(actual), "k2": gradient["reverse"], "k3": gradient["forward"]}[kl]
            )
            if kl != "k2":
                torch.testing.assert_close(value, reverse)


# Derivatives


@pytest.mark.parametrize(
    ("loss", "level"),
    [(loss, level) for loss in LOSSES for level in (("token", "sequence") if LOSSES[loss].level else (None,))],
)
def test_gradient_against_finite_differences(loss, level):
    b = ragged_batch(7, batch=3, time=4, dtype=torch.float64)
    epsilon = {"epsilon": 0.2} if LOSSES[loss].clip == "around 1" else {}
    objective = Objective(loss=loss, level=level, importance_cap=1.2, entropy_bonus=0.1, **epsilon)
    stop_gradient = loss in ("cispo", "vespo")

    def value(x):
        # a weight under a stop-gradient is a constant: its ratio must not change with x
        old = b.old_logps + (x - b.logps).detach() if stop_gradient else b.old_logps
        sampler = b.sampler_logps + old - b.old_logps
        return policy_loss(x, old, b.advantages, b.mask, objective, sampler_logps=sampler, entropy=b.entropy,
                           max_completion_length=MAX_LENGTH)[0]  # fmt: skip

    x = b.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (x,), eps=1e-6, atol=1e-8, rtol=1e-6)
    assert torch.autograd.grad(value(x), x)[0].abs().max() > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k3_ratio"])
def test_kl_gradient_against_finite_differences(kl, level):
    b = ragged_batch(8, batch=3, time=4, dtype=torch.float64)
    objective = Objective(loss="grpo", level=level, beta=0.5, kl=kl)
    x = b.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, b.old_logps, b.advantages, b.mask, objective, ref_logps=b.ref_logps)[0], (x,),
        eps=1e-6, atol=1e-8, rtol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_gradient_is_reinforce_with_the_group_baseline(loss):
    b = ragged_batch(9, dtype=torch.float64)
    b.old_logps = None
    gradient = loss_and_gradient(b, Objective(loss=loss))[1]
    weight = (
        b.mask
        / {
            "sequence_mean": b.mask.sum(-1, keepdim=True) * len(b.mask),
            "sequence_sum": len(b.mask),
            "token_mean": b.mask.sum(),
            "local_token_mean": b.mask.sum(),
            "constant": len(b.mask) * MAX_LENGTH,
        }[LOSSES[loss].average]
    )
    torch.testing.assert_close(gradient, -b.advantages[:, None] * weight)


# Invariances

ALL = [
    *(Objective(loss=loss, beta=0.04, importance="token_mask" if loss == "vespo" else "sequence_truncate",
                off_policy_threshold=0.3, entropy_bonus=0.1, top_entropy_quantile=0.6) for loss in LOSSES),
    Objective(loss="dapo", level="sequence", beta=0.1, kl="k2", importance="token_mask", importance_floor=0.5),
]  # fmt: skip
IDS = [f"{o.loss}-{o.importance}" for o in ALL]
TENSORS = ("logps", "old_logps", "ref_logps", "sampler_logps", "entropy", "advantages", "mask")


def rows(b, index):
    return SimpleNamespace(**{name: getattr(b, name)[index] for name in TENSORS})


def full(b, objective, **kwargs):
    tensors = {"ref_logps": b.ref_logps, "sampler_logps": b.sampler_logps, "entropy": b.entropy}
    return loss_and_gradient(b, objective, entropy_threshold=0.5, **tensors, **kwargs)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", ALL, ids=IDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000), owner=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_micro_batches_add_up(objective, seed, owner):
    """However the step is cut: loss, gradient and every metric."""
    if objective.loss == "bnpo":
        objective = dataclasses.replace(objective, average="token_mean")
    b = ragged_batch(seed, dtype=torch.float64)
    loss, gradient, metrics = full(b, objective)
    parts, total, summed = [], torch.zeros_like(gradient), torch.zeros((), dtype=torch.float64)
    for o in sorted(set(owner)):
        index = [i for i in range(6) if owner[i] == o]
        part = full(rows(b, index), objective, token_count=int(b.mask.sum()), sequence_count=torch.tensor(6))
        summed = summed + part[0]
        total[index] = part[1]
        parts.append(part[2])
    close(summed, loss)
    close(total, gradient)
    merged, expected = merge_metrics(parts), merge_metrics([metrics])
    assert merged == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_micro_batches_add_up_in_float32():
    b = ragged_batch()
    for name in set(AVERAGES) - {"local_token_mean"}:
        objective = Objective(loss="grpo", average=name, beta=0.04)
        loss, gradient, _ = full(b, objective)
        parts = [full(rows(b, [i]), objective, token_count=b.mask.sum(), sequence_count=6) for i in range(6)]
        close(sum(p[0] for p in parts), loss, 1e-6)
        close(torch.cat([p[1] for p in parts]), gradient, 1e-6)


def test_bnpo_is_trl_with_equal_micro_batches():
    """TRL: mean over micro-batches of each micro-batch's token mean."""
    b = ragged_batch()
    for i in range(0, 6, 2):
        part = rows(b, [i, i + 1])
        theirs = trl_loss_and_gradient(part, loss="bnpo")
        ours = loss_and_gradient(part, Objective(loss="bnpo"), token_count=b.mask.sum(), sequence_count=6)
        assert_same(ours, (theirs[0] / 3, theirs[1] / 3))


GARBAGE = [float("nan"), float("inf"), float("-inf"), 1e4, -1e4]


@pytest.mark.parametrize("objective", ALL, ids=IDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000), garbage=st.lists(st.sampled_from(GARBAGE), min_size=6, max_size=6))
def test_masked_positions_do_not_matter(objective, seed, garbage):
    b = ragged_batch(seed, dtype=torch.float64)
    expected = full(b, objective)
    dirty = rows(b, slice(None))
    dirty.advantages = b.advantages[:, None].expand_as(b.logps)
    for name, value in zip(("logps", "old_logps", "ref_logps", "sampler_logps", "entropy", "advantages"), garbage):
        setattr(dirty, name, torch.where(b.mask, getattr(dirty, name), value))
    actual = full(dirty, objective)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert (actual[1][~b.mask] == 0).all()
    assert merge_metrics([actual[2]]) == merge_metrics([expected[2]])


@pytest.mark.parametrize("objective", ALL, ids=IDS)
@settings(max_examples=5)
@given(seed=st.integers(0, 1000), order=st.permutations(range(6)), columns=st.integers(0, 3))
def test_order_width_and_empty_sequences_do_not_matter(objective, seed, order, columns):
    b = ragged_batch(seed, dtype=torch.float64)
    loss, gradient, metrics = full(b, objective)
    order = list(order)
    moved = rows(b, [*order, 0])
    moved.mask = moved.mask.clone()
    moved.mask[-1] = False  # a sequence that does not count, such as a truncated one
    for name in TENSORS:
        if name != "advantages":
            setattr(moved, name, torch.nn.functional.pad(getattr(moved, name), (0, columns)))
    actual = full(moved, objective)
    close(actual[0], loss)
    close(actual[1][:-1, :9], gradient[order])
    assert (actual[1][-1] == 0).all()
    assert merge_metrics([actual[2]]) == pytest.approx(merge_metrics([metrics]), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("objective", ALL, ids=IDS)
def test_a_fully_masked_batch_moves_nothing(objective):
    b = ragged_batch()
    b.mask = torch.zeros_like(b.mask)
    loss, gradient, metrics = full(b, objective)
    assert loss == 0
    assert (gradient == 0).all()
    assert set(merge_metrics([metrics]).values()) == {0.0}


@pytest.mark.parametrize("objective", ALL, ids=IDS)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_extreme_ratios_stay_finite(objective, shift):
    for name in ("old_logps", "ref_logps", "sampler_logps"):
        b = ragged_batch()
        setattr(b, name, getattr(b, name) + shift)
        loss, gradient, metrics = full(b, objective)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert all(m.isfinite() for m in metrics.values())


def test_the_documented_clamp():
    """A ratio is cut at e^20, without gradient beyond; below it nothing is cut."""
    for difference, value, slope in ((19.0, 19.0, 1.0), (21.0, 20.0, 0.0)):
        logps = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        loss, _ = policy_loss(logps, logps.detach() - difference, torch.tensor([-1.0]), torch.ones(1, 1), Objective())
        (gradient,) = torch.autograd.grad(loss, logps)
        assert loss.log().item() == pytest.approx(value)
        assert gradient.item() == pytest.approx(slope * loss.item())


@pytest.mark.parametrize("objective", ALL, ids=IDS)
def test_bfloat16_inputs(objective):
    """The arithmetic is float32's: the same as converting first, gradient rounded to bfloat16 at the end."""
    b = ragged_batch(dtype=torch.bfloat16)
    b32 = SimpleNamespace(**{k: v if v.dtype == torch.bool else v.float() for k, v in vars(b).items()})
    actual, expected = full(b, objective), full(b32, objective)
    assert actual[0].dtype == torch.float32
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1].bfloat16())


# Masks, weights, metrics


def test_a_sequence_without_a_mask_is_left_out():
    b = ragged_batch(dtype=torch.float64)
    kept = [1, 2, 4, 5]
    for loss in LOSSES:
        whole = rows(b, slice(None))
        whole.mask = b.mask.clone()
        whole.mask[[0, 3]] = False
        actual, expected = (loss_and_gradient(x, Objective(loss=loss)) for x in (whole, rows(b, kept)))
        close(actual[0], expected[0])
        close(actual[1][kept], expected[1])


def test_entropy_quantile_of_the_step():
    """Exact share, and the step's threshold makes micro-batches of any lengths the one batch."""
    entropies = torch.arange(100.0)
    assert (entropies >= entropy_quantile(entropies, 0.2)).sum() == 20
    assert entropy_quantile(entropies, 1.0) == 0
    assert entropy_quantile(entropies[:0], 0.2) == float("inf")

    b, objective = ragged_batch(4), Objective(loss="dapo", top_entropy_quantile=0.3)
    _, gradient, metrics = loss_and_gradient(b, objective, entropy=b.entropy)
    parts = [rows(b, [0, 3]), rows(b, [1, 2, 4, 5])]
    micros = [as_micro(p) for p in parts]
    entropies = {id(micro): part.entropy for micro, part in zip(micros, parts)}
    threshold = step_entropy_threshold(
        lambda micro: (None, entropies[id(micro)]), StepBatch(micros, 1), objective, World()
    )
    split = [
        loss_and_gradient(p, objective, entropy=p.entropy, entropy_threshold=threshold, token_count=b.mask.sum())
        for p in parts
    ]
    close(torch.cat([g for _, g, _ in split]), gradient[[0, 3, 1, 2, 4, 5]], 1e-6)
    assert merge_metrics([m for _, _, m in split])["high_entropy"] == pytest.approx(metrics["high_entropy"].item())
    assert step_entropy_threshold(None, StepBatch([], 0), objective, World()) == float("inf")
    assert step_entropy_threshold(None, StepBatch(micros, 1), Objective(), World()) is None


@pytest.mark.parametrize("token_advantages", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_with_gradient(loss, token_advantages):
    """The sequences it leaves out have none, whatever loss and ratio level; those it names have one."""
    b = ragged_batch(8)
    b.advantages[[1, 4]] = 0
    b.mask = b.mask.clone()
    b.mask[2] = False
    expected = torch.tensor([True, False, False, True, False, True])
    if token_advantages:  # at sequence level one token's advantage moves them all
        b.advantages = b.advantages[:, None] * (torch.arange(9) == 0)
    for level in ("token", "sequence") if LOSSES[loss].level else (None,):
        objective = Objective(loss=loss, level=level, epsilon=0.9 if LOSSES[loss].clip == "around 1" else None,
                              off_policy_threshold=10.0, top_entropy_quantile=0.999)  # fmt: skip
        assert torch.equal(rows_with_gradient(as_micro(b)), expected)
        logps = (b.old_logps + 0.1).requires_grad_()
        value, _ = policy_loss(logps, b.old_logps, b.advantages, b.mask, objective, ref_logps=b.ref_logps,
                               sampler_logps=b.old_logps, entropy=b.entropy + 1, max_completion_length=9)  # fmt: skip
        assert torch.equal((torch.autograd.grad(value, logps)[0] != 0).any(-1), expected)


def test_sampler_weights_known_values():
    mismatch = torch.tensor([[0.5, 0.5, 0.0], [-1.0, 0.1, 0.0]]).double()
    micro = MicroBatch(None, None, torch.ones_like(mismatch), torch.zeros_like(mismatch), None, [], None)
    cases = {
        "token_truncate": [[1.5, 1.5, 1], [0.5, 1.10517, 1]],
        "token_mask": [[0, 0, 1], [0, 1.10517, 1]],
        "sequence_truncate": [[1.5] * 3, [0.5] * 3],
        "sequence_mask": [[0] * 3, [0] * 3],
        "none": [[1] * 3] * 2,
    }
    for importance, expected in cases.items():
        objective = Objective(importance=importance, importance_cap=1.5, importance_floor=0.5)
        weights = sampler_weights(mismatch, micro, objective)
        torch.testing.assert_close(weights, torch.tensor(expected).double(), rtol=1e-5, atol=0)


def test_mismatch_is_logged_and_unknown_is_no_correction():
    b = ragged_batch(dtype=torch.float64)
    b.sampler_logps[0, 0] = float("nan")
    difference = (b.old_logps - b.sampler_logps).nan_to_num(0)[b.mask]
    for importance, capped in (("token_truncate", difference.exp() > 1.3), ("none", difference > 1e9)):
        cap = {"importance_cap": 1.3} if importance != "none" else {}
        loss, gradient, m = loss_and_gradient(b, Objective(importance=importance, **cap), sampler_logps=b.sampler_logps)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert m["mismatch_mean"].item() == pytest.approx(difference.abs().mean().item())
        assert m["mismatch_k3"].item() == pytest.approx((difference.exp() - 1 - difference).mean().item())
        assert m["mismatch_ratio_max"].item() == pytest.approx(difference.exp().max().item())
        assert m["mismatch_capped"].item() == pytest.approx(capped.double().mean().item())


def test_metrics_known_values():
    b = ragged_batch(dtype=torch.float64)
    _, _, m = loss_and_gradient(b, Objective(loss="grpo", beta=0.5), ref_logps=b.ref_logps, entropy=b.entropy)
    log_ratio = (b.logps - b.old_logps)[b.mask]
    w = log_ratio.exp()
    a = b.advantages[:, None].expand_as(b.mask)[b.mask]
    d = (b.ref_logps - b.logps)[b.mask]
    expected = {
        "approx_kl": (w - 1 - log_ratio).mean(),
        "ratio_mean": w.mean(),
        "ratio_max": w.max(),
        "clip_low": ((w < 0.8) & (a < 0)).double().mean(),
        "clip_high": ((w > 1.2) & (a > 0)).double().mean(),
        "kl": (w * (d.exp() - 1 - d)).mean(),
        "entropy": b.entropy[b.mask].mean(),
    }
    for name, value in expected.items():
        assert m[name].item() == pytest.approx(value.item()), name
        assert value > 0
    with_kl, without = m["loss"], m["policy_loss"]
    assert loss_and_gradient(b, Objective(loss="grpo"))[0].item() == pytest.approx(without.item())
    assert with_kl > without


def test_merge_metrics(monkeypatch):
    a = {"loss": torch.tensor(1.0), "ratio_max": torch.tensor(3.0)}
    b = {"loss": torch.tensor(0.5), "ratio_max": torch.tensor(2.0)}
    assert merge_metrics([a, b]) == {"loss": 1.5, "ratio_max": 3.0}
    assert merge_metrics([]) == {"loss": 0.0}

    def of_three_ranks(out, mine):  # one has nothing to do
        out[:] = [mine, [], [{"loss": 2.0, "ratio_max": 2.5}]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", of_three_ranks)
    assert merge_metrics([a, b], World(0, 3)) == {"loss": 3.5, "ratio_max": 3.0}
    assert merge_metrics([], World(0, 3)) == {"loss": 2.0, "ratio_max": 2.5}


@pytest.mark.parametrize("objective", ALL, ids=IDS)
def test_policy_loss_equals_the_composition_of_the_recipes(objective):
    """The lines of the recipes' update, on a batch of its own: loss, gradient and metrics to the bit."""
    b = ragged_batch(11)
    micro = as_micro(b)

    def composed(logps, entropy):
        old_logps, ref_logps, threshold = b.old_logps, b.ref_logps, 0.5
        c = sampler_weights(old_logps, micro, objective)
        log_w = log_ratio(logps, old_logps, micro)
        losses = surrogate(logps, log_w, c, micro, objective)
        losses = losses * token_filter(logps, old_logps, entropy, threshold, micro, objective)
        kl = kl_penalty(logps, ref_logps, log_w, micro, objective)
        loss = average(losses, micro, objective) + objective.beta * average(kl, micro, objective)
        loss = loss - entropy_bonus(entropy, micro, objective)
        return loss, token_metrics(loss, losses, kl, logps, old_logps, entropy, threshold, micro, objective)

    found = []
    for function in (
        composed,
        lambda logps, entropy: policy_loss(
            logps, b.old_logps, b.advantages, b.mask, objective, ref_logps=b.ref_logps, sampler_logps=b.sampler_logps,
            entropy=entropy, entropy_threshold=0.5, max_completion_length=MAX_LENGTH,
        ),
    ):  # fmt: skip
        logps, entropy = b.logps.clone().requires_grad_(), b.entropy.clone().requires_grad_()
        loss, metrics = function(logps, entropy)
        found.append((loss.detach(), torch.autograd.grad(loss, (logps, entropy)), metrics))
    (loss, gradients, metrics), (loss2, gradients2, metrics2) = found
    assert torch.equal(loss, loss2)
    assert all(torch.equal(x, y) for x, y in zip(gradients, gradients2))
    assert metrics.keys() == metrics2.keys()
    assert all(torch.equal(metrics[name], metrics2[name]) for name in metrics)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_whose_gradient_would_be_lost_is_refused(loss):
    """Sequences of advantage 0 get no backward pass. None of our losses minds; one that does is noticed."""
    b = ragged_batch(8)
    b.advantages[[1, 4]] = 0
    micro = as_micro(b)
    micro = micro._replace(needs_grad=rows_with_gradient(micro))
    objective = Objective(loss=loss)
    log_w = log_ratio(b.logps, b.old_logps, micro)
    losses = surrogate(b.logps, log_w, sampler_weights(b.old_logps, micro, objective), micro, objective)

    def metrics(losses):
        kl = torch.zeros_like(losses)
        return token_metrics(losses.sum(), losses, kl, b.logps, b.old_logps, b.entropy, None, micro, objective)

    assert "skipped_loss_max" not in merge_metrics([metrics(losses), metrics(losses)])
    with pytest.raises(ValueError, match="every_gradient=True"):
        merge_metrics([metrics(losses), metrics(losses + 0.01 * micro.mask)])


def test_old_policy_logps():
    """One optimizer step per batch needs no pass; several take one before the first, without gradient."""
    micros = [as_micro(ragged_batch(seed)) for seed in range(2)]
    values = [torch.zeros(2, 3, requires_grad=True) + seed for seed in range(2)]
    batch = StepBatch(micros, 1)

    def forward(micro):
        return values[[micro is m for m in micros].index(True)] * 2, None

    assert old_policy_logps(forward, batch, 1) == [None, None]
    old = old_policy_logps(forward, batch, 2)
    assert [x.unique().item() for x in old] == [0, 2]
    assert not any(x.requires_grad for x in old)


# Refusals


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"loss": "reinforce", "epsilon_high": 0.3}, "--epsilon-high", "--loss reinforce"),
        ({"loss": "sapo", "epsilon": 0.3}, "--epsilon", "--loss sapo"),
        ({"loss": "cispo", "epsilon": 0.3}, "--epsilon", "--loss cispo"),
        ({"loss": "cispo", "delta": 3.0}, "--delta", "--loss cispo"),
        ({"loss": "vespo", "level": "sequence"}, "--level", "--loss vespo"),
        ({"loss": "reinforce", "level": "token"}, "--level", "--loss reinforce"),
        ({"sapo_temperatures": (1.0, 2.0)}, "--sapo-temperatures", "--loss grpo"),
        ({"vespo_shape": (1.0, 1.0, 1.0, 1.0)}, "--vespo-shape", "--loss grpo"),
        ({"kl": "k1"}, "--kl k1", "--beta 0"),
        ({"importance": "none", "importance_cap": 3.0}, "--importance-cap", "--importance none"),
        ({"importance": "none", "importance_floor": 0.5}, "--importance-floor", "--importance none"),
        ({"importance_floor": 2.0}, "--importance-floor", "--importance-cap"),
        ({"loss": "dapo", "delta": 1.28}, "--delta", "--epsilon-high"),
        ({"loss": "dapo", "epsilon": 0.5, "delta": 1.4}, "--delta", "--epsilon-high"),
        ({"loss": "ppo"}, "--loss", "grpo"),
        ({"average": "median"}, "--average", "token_mean"),
        ({"level": "word"}, "--level", "sequence"),
        ({"kl": "k4", "beta": 0.1}, "--kl", "k3"),
        ({"importance": "tis"}, "--importance", "token_truncate"),
        ({"top_entropy_quantile": 0.0}, "--top-entropy-quantile", "1 keeps every token"),
        ({"top_entropy_quantile": 1.5}, "--top-entropy-quantile", "1 keeps every token"),
        ({"epsilon": 0.0}, "--epsilon is 0.0", "positive"),
        ({"beta": -0.1}, "--beta", "negative"),
        ({"beta": float("nan")}, "--beta", "negative"),
        ({"entropy_bonus": -0.1}, "--entropy-bonus", "negative"),
        ({"loss": "sapo", "sapo_temperatures": (0.0, 1.0)}, "--sapo-temperatures", "positive"),
        ({"loss": "vespo", "vespo_shape": (0.0, 1.0, 1.0, 1.0)}, "--vespo-shape", "positive"),
    ],
)
def test_refusals_name_both_flags(fields, first, second):
    with pytest.raises(ValueError, match="--") as error:
        Objective(**fields).check()
    assert first in str(error.value)
    assert second in str(error.value)


def test_missing_tensors_are_named():
    b = ragged_batch()
    args = (b.logps, b.old_logps, b.advantages, b.mask)
    for objective, match in (
        (Objective(beta=0.1), "ref_logps is None"),
        (Objective(entropy_bonus=0.1), "entropy is None"),
        (Objective(top_entropy_quantile=0.2), "entropy is None"),
        (Objective(loss="dr_grpo"), "max_completion_length is None"),
    ):
        with pytest.raises(ValueError, match=match):
            policy_loss(*args, objective)
    with pytest.raises(ValueError, match=r"logps is \[9\]"):
        policy_loss(b.logps[0], *args[1:], Objective())
    with pytest.raises(ValueError, match=r"advantages is \[5\]"):
        policy_loss(b.logps, b.old_logps, b.advantages[:5], b.mask, Objective())
    with pytest.raises(ValueError, match=r"mask is \[6, 8\]"):
        policy_loss(b.logps, b.old_logps, b.advantages, b.mask[:, :8], Objective())
    with pytest.raises(ValueError, match=r"sampler_logps is \[6, 1\]"):
        policy_loss(*args, Objective(), sampler_logps=b.sampler_logps[:, :1])


@dataclasses.dataclass
class Args:
    """The flags of both groups, flat, as in a recipe."""

    objective: Objective = Objective(loss="cispo")
    advantage: Advantage = Advantage()


def flags(words):
    return tyro.cli(Args, args=words, config=(tyro.conf.OmitArgPrefixes,))


def test_flags():
    args = flags(
        "--level sequence --epsilon-high 4 --kl k2 --beta 0.1 --importance sequence_mask --scale none "
        "--vespo-shape 1 2 3 4 --mask-truncated".split()
    )
    assert args.objective == Objective(
        loss="cispo", level="sequence", epsilon_high=4.0, kl="k2", beta=0.1, importance="sequence_mask",
        vespo_shape=(1.0, 2.0, 3.0, 4.0),
    )  # fmt: skip
    assert args.advantage == Advantage(scale="none", mask_truncated=True)
    for loss in LOSSES:
        flags(["--loss", loss]).objective.check()


def test_flags_set_fields_of_the_objective():
    """policy_loss(..., loss="dapo", beta=0.04) is policy_loss(..., Objective(loss="dapo", beta=0.04))."""
    b = ragged_batch(seed=3)
    by_flags, _ = policy_loss(b.logps, b.old_logps, b.advantages, b.mask, ref_logps=b.ref_logps, loss="dapo", beta=0.04)
    objective = Objective(loss="dapo", beta=0.04)
    by_object, _ = policy_loss(b.logps, b.old_logps, b.advantages, b.mask, objective, ref_logps=b.ref_logps)
    default, _ = policy_loss(b.logps, b.old_logps, b.advantages, b.mask)
    assert torch.equal(by_flags, by_object)
    assert not torch.equal(by_flags, default)
    assert torch.equal(default, policy_loss(b.logps, b.old_logps, b.advantages, b.mask, Objective(loss="grpo"))[0])
    with pytest.raises(TypeError, match="epsilonn"):
        policy_loss(b.logps, b.old_logps, b.advantages, b.mask, epsilonn=0.2)


def test_bounds_of_a_ratio_that_is_always_one_are_refused():
    for flags in ({"level": "sequence"}, {"epsilon": 0.1}, {"epsilon_high": 0.3}, {"delta": 3.0}):
        Objective(**flags).check(num_iterations=2)
        Objective(**flags).check()
        with pytest.raises(ValueError, match=r"--(level|epsilon|epsilon-high|delta) has no effect with one opt"):
            Objective(**flags).check(num_iterations=1)
    Objective(loss="gspo", beta=0.1).check(num_iterations=1)
