"""Whether the fused product is used: the comparison finds every kind of failure, and the engine falls back aloud."""

import functools
import logging

import pytest
import torch
from test_shared_weights import linear4bit

from grpo_rollout.vllm import fused_nf4 as nf4
from grpo_rollout.vllm.engine import VLLMEngine
from grpo_rollout.vllm.shared_weights import share

ROWS = (1, 16, 32)


@pytest.fixture(scope="module")
def weights():
    """Two shapes, one of them twice; the first keeps its nested scales, joined."""
    shapes = ((128, 256), (64, 256)), ((48, 512),), ((48, 512),)
    return [share([linear4bit(*s, seed=i) for i, s in enumerate(group)])[0] for group in shapes]


def test_the_kernels_agree_with_bitsandbytes(weights):
    """`nf4_linear` under the interpreter, by the same comparison that decides on a GPU."""

    def kernel(weight, x):
        return nf4.nf4_linear(x, weight.packed, weight.absmax, weight.shape, backend="fused")

    assert nf4.disagreement(kernel, nf4.plain, weights, (1, 17), torch.float16) is None


def test_the_kernels_agree_with_an_adapter_too(weights, monkeypatch):
    """Added within `nf4_linear`, under the interpreter, or by two products; and one that is lost is noticed."""
    monkeypatch.setattr(nf4, "nf4_linear", functools.partial(nf4.nf4_linear, backend="fused"))
    for gated in ("x", "y"):
        both = nf4.with_adapter(8, gated=gated)
        assert nf4.disagreement(*both, weights, (1, 17), torch.float16, gated=gated) is None
    tried, reference = nf4.with_adapter(8)
    assert nf4.disagreement(tried, reference, weights, (1, 17), torch.float16) is None
    assert "values differ" in nf4.disagreement(nf4.fused, reference, weights, (1, 17), torch.float16)


def test_gate_times_up_in_bf16_passes(monkeypatch):
    """Each value rounded where the kernel rounds it, of a product large enough that next to a large gate some of what
    is multiplied by it nearly cancels (on an H100 such a product was refused); a wrong value is still found."""
    [weight] = share([linear4bit(2048, 512, seed=0)])
    wrong = 0.0

    def kernel(x, packed, absmax, shape, *, lora, gated):
        y = x.float() @ nf4.dequantized(weight, torch.float32).T
        y += torch.cat([x.float() @ a.float().T @ b.float().T for _, a, b in lora.slices()], 1)
        y = nf4.swiglu_reference(*y.to(x.dtype).chunk(2, -1))
        y[-1, -1] += wrong * y.float().square().mean().sqrt()
        return y

    monkeypatch.setattr(nf4, "nf4_linear", kernel)
    monkeypatch.setattr(nf4, "TOLERANCE", nf4.TOLERANCE / 2)  # 0.034 with rounded sums as reference, 0.015 without
    both = nf4.with_adapter(16, gated="y")
    assert nf4.disagreement(*both, [weight], (2048,), torch.bfloat16, gated="y") is None
    wrong = 0.5
    assert "values differ" in nf4.disagreement(*both, [weight], (2048,), torch.bfloat16, gated="y")


def test_one_weight_of_each_shape_is_tried_at_each_count_of_rows(weights):
    tried = []

    def product(weight, x):
        tried.append((weight.shape, *x.shape))
        return nf4.plain(weight, x)

    before = torch.get_rng_state()
    assert nf4.disagreement(product, nf4.plain, weights, ROWS, torch.float32) is None
    assert tried == [((n, k), r, k) for n, k in ((192, 256), (48, 512)) for r in ROWS]
    assert torch.equal(torch.get_rng_state(), before)


def wrong_value(y):
    y[-1, -1] = -y[-1, -1]


def unwritten(y):
    y[-1, -1] = torch.nan


def wrong_scale(y):
    y[:, 128:192] *= 1.1  # the second of two joined layers


def launch_fails(y):
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("failure", "named"),
    [
        (wrong_value, "values differ"),
        (unwritten, "values differ by nan"),
        (wrong_scale, "values differ"),
        (launch_fails, "RuntimeError: out of resource"),
    ],
)
def test_a_failure_at_one_count_of_rows_is_found_and_named(weights, failure, named):
    def product(weight, x):
        y = nf4.plain(weight, x)
        if len(x) == 32:
            failure(y)
        return y

    reason = nf4.disagreement(product, nf4.plain, weights, ROWS, torch.float32)
    assert reason.startswith("32 rows by a weight [192, 256] with doubly quantized scales: ")
    assert named in reason
    assert nf4.disagreement(product, nf4.plain, weights, (1, 16), torch.float32) is None


def test_rounding_to_16_bits_passes(weights):
    """Twice: the product of rounded weights against the exact one, in bf16."""

    def exact(weight, x):
        return nf4.plain(weight, x.float()).to(x.dtype)

    assert nf4.disagreement(exact, nf4.plain, weights, (256,), torch.bfloat16) is None


def test_where_it_does_not_apply(weights):
    assert nf4.why_not([]) is None
    assert "Hopper" in nf4.why_not(weights)


@pytest.mark.parametrize(
    ("change", "named"),
    [({}, None), ({"quant_type": "fp4"}, "fp4"), ({"blocksize": 128}, "blocks of 128"), ({"cols": 96}, "multiple")],
)
def test_formats_on_hopper(weights, change, named, monkeypatch):
    class OnHopper:
        device = torch.device("cuda")

    monkeypatch.setattr(nf4, "is_hopper", lambda device: True)
    reason = nf4.why_not([weights[0]._replace(packed=OnHopper(), **change)])
    assert reason is None if named is None else named in reason


def test_rows_to_try():
    assert nf4.check_rows(8, 2048) == [1, 8, 16, 32, 64, 128, 256, 257]
    assert nf4.check_rows(64, 2048) == [1, 16, 32, 64, 128, 256, 257]
    assert nf4.check_rows(64, 100) == [1, 16, 32, 64, 100]
    assert nf4.check_rows(300, 2048) == [1, 16, 32, 64, 128, 256, 257, 300]


class Sizes:
    max_num_seqs, max_num_batched_tokens = 8, 64


def engine_on(device: str):
    """Only what the decision reads of an engine."""
    engine = object.__new__(VLLMEngine)
    engine.device, engine.dtype, engine.sizes = torch.device(device), torch.bfloat16, Sizes()
    return engine


class Joined:
    def __init__(self, weights):
        self.quantized = lambda: weights


@pytest.mark.parametrize(
    ("device", "inapplicable", "failed", "warned"),
    [
        ("cuda", None, None, False),
        ("cuda", "it is an L4", None, True),
        ("cuda", None, "32 rows: no", True),
        ("cpu", "no GPU", None, False),
    ],
)
def test_the_engine_falls_back_with_one_warning(device, inapplicable, failed, warned, weights, monkeypatch, caplog):
    monkeypatch.setattr(nf4, "why_not", lambda weights: inapplicable)
    monkeypatch.setattr(nf4, "disagreement", lambda *_: failed)
    reason = inapplicable or failed
    with caplog.at_level(logging.WARNING):
        assert engine_on(device)._may_fuse(Joined(weights), required=False) == (reason is None)
    assert [r.getMessage().endswith(reason) for r in caplog.records] == ([True] if warned else [])
    if reason:
        with pytest.raises(ValueError, match=f"fused_nf4=True.*{reason}"):
            engine_on(device)._may_fuse(Joined(weights), required=True)
