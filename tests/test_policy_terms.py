"""The fused kernel against the torch functions: terms, KL estimates and gradients, at token and sequence level.

`compare` serves the GPU tests too. The torch functions themselves are tested in test_objective.py."""

import subprocess
import sys

import pytest
import torch

from grpo.losses import LOSSES, Loss, clip_range, policy_terms, triton

needs_triton = pytest.mark.skipif(triton is None, reason="no Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (loss, level, options)
    for loss, row in LOSSES.items()
    for level in (("token", "sequence") if row.level else (None,))
    for options in ({}, {"kl": "k3_ratio", "importance": True})
] + [
    ("grpo", "token", {"delta": 1.6, "epsilon": 0.1, "importance": True}),
    ("grpo", "sequence", {"delta": 1.6, "epsilon": 0.1, "kl": "k3", "token_advantages": True}),
    ("cispo", "sequence", {"epsilon_high": 1.1, "kl": "k2", "token_advantages": True}),
    ("sapo", "token", {"sapo_temperatures": (0.5, 2.0), "kl": "k1"}),
    ("vespo", None, {"vespo_shape": (1.0, 2.0, 0.5, 1.5), "importance": True, "token_advantages": True}),
]


def make_inputs(batch, time, dtype, device, spread, seed=0):
    g = torch.Generator().manual_seed(seed)
    logps = -2 * torch.rand(batch, time, generator=g)
    others = [logps + spread * torch.randn(batch, time, generator=g) for _ in range(2)]
    lengths = torch.randint(0, time + 1, (batch,), generator=g)
    lengths[0] = time
    mask = torch.arange(time) < lengths[:, None]
    advantages = torch.randn(batch, time, generator=g)
    advantages[1:2] = 0
    importance = torch.rand(batch, time, generator=g) * 2
    importance[0, 0] = 0
    garbage = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e4])[torch.arange(time) % 4]
    logps, old, ref = (torch.where(mask, x, garbage).to(dtype) for x in (logps, *others))
    return [x.to(device) for x in (logps, old, ref, mask, advantages, importance)]


def compare(
    shape, dtype, device, loss, level, *, kl=None, importance=False, token_advantages=False, spread=0.3, **options
):
    """Assert that the kernel's terms and gradient are the float64 reference's (of inputs rounded to dtype)."""
    logps, old, ref, mask, advantages, weights = make_inputs(*shape, dtype, device, spread)
    advantages = advantages if token_advantages else advantages[:, 0]
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(shape, generator=g).to(device) for _ in range(2)]

    def outputs(precision, backend):
        x = logps.to(precision).detach().requires_grad_()
        terms = policy_terms(
            x, old, advantages, mask, loss=loss, level=level, ref_logps=ref if kl else None, kl=kl or "k3",
            importance=weights if importance else None, backend=backend, **options,
        )  # fmt: skip
        total = (terms.policy * upstream[0]).sum()
        if kl:
            total = total + (terms.kl * upstream[1]).sum()
        return [terms.policy, terms.kl, terms.log_weight, torch.autograd.grad(total, x)[0]]

    actual, expected = outputs(dtype, "triton"), outputs(torch.float64, "torch")
    for name, a, e in zip(("policy", "kl", "log_weight", "gradient"), actual, expected):
        if e is None:
            assert a is None
            continue
        assert a.dtype == (dtype if name == "gradient" else torch.float32)
        assert (a[~mask] == 0).all(), name
        rtol = torch.finfo(dtype).eps if name == "gradient" else 2e-5
        scale = e.abs().max().clamp(min=1).item()
        torch.testing.assert_close(
            a.double(), e, rtol=max(rtol, 2e-5), atol=1e-6 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert expected[3].abs().max() > 1e-3  # vespo's weights of long sequences are small


@needs_triton
@pytest.mark.parametrize(("loss", "level", "options"), CASES, ids=str)
def test_kernel_equals_reference(loss, level, options):
    compare((5, 37), torch.float32, DEVICE, loss, level, **options)


@needs_triton
def test_kernel_over_several_blocks():
    """1,024 tokens are a block: sums over blocks, and the last one partly filled."""
    for loss in ("gspo", "vespo", "dapo"):
        compare((2, 2500), torch.float32, DEVICE, loss, None, kl="k3_ratio", spread=0.02)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 64)], ids=str)
def test_kernel_of_small_shapes(shape):
    compare(shape, torch.float32, DEVICE, "gspo", None, kl="k3_ratio", spread=1e-4)


@needs_triton
def test_kernel_of_bfloat16():
    for loss, level in (("grpo", "token"), ("grpo", "sequence"), ("cispo", "token")):
        compare((4, 50), torch.bfloat16, DEVICE, loss, level, kl="k3_ratio", importance=True)


@needs_triton
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", LOSSES)
def test_kernel_of_extreme_ratios(loss, level):
    """The clamps are the reference's, gradients included: e^20 is in range, beyond it the gradient is 0."""
    level = level if LOSSES[loss].level else None
    for shift in (1e4, -1e4, 25.0, -25.0):
        logps = torch.tensor([[-1.0, -2.0, -0.5]] * 2, device=DEVICE)
        results = []
        for backend in ("triton", "torch"):
            x = logps.clone().requires_grad_()
            terms = policy_terms(x, logps - shift, torch.tensor([1.0, -1.0], device=DEVICE), torch.ones_like(logps),
                                 loss=loss, level=level, ref_logps=logps + shift, backend=backend)  # fmt: skip
            results.append((*terms, torch.autograd.grad((terms.policy + terms.kl).sum(), x)[0]))
        for a, e in zip(*results):
            assert a.isfinite().all()
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@needs_triton
def test_nothing_counts():
    logps = torch.full((2, 3), float("nan"), device=DEVICE, requires_grad=True)
    terms = policy_terms(logps, logps.detach(), torch.ones(2, device=DEVICE), torch.zeros_like(logps), loss="gspo",
                         ref_logps=logps.detach(), backend="triton")  # fmt: skip
    assert (torch.stack([*terms, *torch.autograd.grad((terms.policy + terms.kl).sum(), logps)]) == 0).all()


def test_a_loss_of_ones_own_runs_in_torch(monkeypatch):
    def halved(t, p):
        return -t.advantages * t.log_weight.exp() / 2

    monkeypatch.setitem(LOSSES, "halved", Loss(halved, "token", "token_mean", None))
    logps = torch.tensor([[-1.0, -2.0]], device=DEVICE)
    terms = policy_terms(logps, logps, torch.tensor([3.0], device=DEVICE), torch.ones_like(logps), loss="halved")
    assert terms.policy.tolist() == [[-1.5, -1.5]]
    with pytest.raises(ValueError, match="losses of one's own"):
        policy_terms(logps, logps, torch.ones(1), torch.ones_like(logps), loss="halved", backend="triton")


def test_clip_range():
    assert clip_range("grpo") == (0.8, 1.2)
    assert clip_range("grpo", 0.1) == (0.9, 1.1)
    assert clip_range("dapo") == (0.8, 1.28)
    assert clip_range("dapo", None, 0.5) == (0.8, 1.5)
    assert clip_range("cispo") == (0, 5)
    assert clip_range("cispo", 0.1) == (0, 5)
    assert clip_range("cispo", None, 3.0) == (0, 3)
    assert clip_range("reinforce", 0.1, 0.1) == (0, float("inf"))


def test_unknown_names():
    x = torch.zeros(1, 1)
    for name in ("loss", "level", "kl", "backend"):
        with pytest.raises(ValueError, match=f"{name}.*'nonsense'"):
            policy_terms(x, x, torch.zeros(1), x, **{name: "nonsense"})
    with pytest.raises(ValueError, match="float64"):
        policy_terms(x.double(), x, torch.zeros(1), x, backend="triton")


def test_works_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import torch; from grpo.losses import policy_terms
x = torch.zeros(1, 2)
print(policy_terms(x, x, torch.ones(1), torch.ones(1, 2)).policy.tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[[-1.0, -1.0]]\n", result.stderr
