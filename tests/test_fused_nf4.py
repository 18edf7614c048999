"""The trial of the fused products finds every kind of failure, and the engine falls back with one warning."""

import functools
import logging

import pytest
import torch
from test_shared_weights import linear4bit

from grpo.errors import UserError
from grpo_kernels.nf4.prologue import FUSED_RANK
from grpo_rollout.vllm import fused_nf4 as nf4
from grpo_rollout.vllm.shared_weights import share

ROWS = (1, 16, 32)


@pytest.fixture(scope="module")
def weights():
    """Two shapes, one of them twice; the first keeps its nested scales when it is merged."""
    shapes = ((64, 256), (64, 256)), ((48, 512),), ((48, 512),)
    return [share([linear4bit(*s, seed=i) for i, s in enumerate(group)])[0] for group in shapes]


def test_the_kernels_agree_with_bitsandbytes(weights):
    """`nf4_linear` under the interpreter, by the same comparison that decides on a GPU."""

    def kernel(weight, x):
        return nf4.nf4_linear(x, weight.packed, weight.absmax, weight.shape, backend="fused")

    assert nf4.disagreement(kernel, nf4.plain_product, weights, (1, 17), torch.bfloat16) is None


def test_the_kernels_agree_with_an_adapter_too(weights, monkeypatch):
    """Added within `nf4_linear`, under the interpreter, with and without an activation; a lost adapter is noticed."""
    monkeypatch.setattr(nf4, "nf4_linear", functools.partial(nf4.nf4_linear, backend="fused"))
    for gated, rows in ((None, (1, 17)), ("x", (1, 17)), ("y", (1,))):  # "y" as the engine asks for it, of few rows
        fused, plain = nf4.products_with_adapter(8, gated=gated)
        assert nf4.disagreement(fused, plain, weights[:1], rows, torch.bfloat16, gated=gated) is None
    _, plain = nf4.products_with_adapter(8)
    assert "values differ" in nf4.disagreement(nf4.fused_product, plain, weights, (1,), torch.float16)


def test_gate_times_up_in_bf16_passes(monkeypatch):
    """Every value is rounded where the kernel rounds it, in a product so large that some factors of large gates almost
    cancel. With rounded sums as its reference, the trial refused such a product on an H100. A wrong value is found."""
    [weight] = share([linear4bit(2048, 512, seed=0)])
    wrong = 0.0

    def kernel(x, packed, absmax, shape, *, lora, gated):
        y = x.float() @ nf4.dequantize(weight, torch.float32).T
        y += torch.cat([x.float() @ a.float().T @ b.float().T for _, a, b in lora.slices()], 1)
        y = nf4.swiglu_reference(*y.to(x.dtype).chunk(2, -1))
        y[-1, -1] += wrong * y.float().square().mean().sqrt()
        return y

    monkeypatch.setattr(nf4, "nf4_linear", kernel)
    monkeypatch.setattr(nf4, "TOLERANCE", nf4.TOLERANCE / 2)  # 0.034 with rounded sums as reference, 0.015 without
    fused, plain = nf4.products_with_adapter(16, gated="y")
    assert nf4.disagreement(fused, plain, [weight], (2048,), torch.bfloat16, gated="y") is None
    wrong = 0.5
    assert "values differ" in nf4.disagreement(fused, plain, [weight], (2048,), torch.bfloat16, gated="y")


def test_one_weight_of_each_shape_is_tried_with_each_number_of_rows(weights):
    tried = []

    def product(weight, x):
        tried.append((weight.shape, *x.shape))
        return nf4.plain_product(weight, x)

    before = torch.get_rng_state()
    assert nf4.disagreement(product, nf4.plain_product, weights, ROWS, torch.float32) is None
    assert tried == [((n, k), r, k) for n, k in ((128, 256), (48, 512)) for r in ROWS]
    assert torch.equal(torch.get_rng_state(), before)


def wrong_value(y):
    y[-1, -1] = -y[-1, -1]


def unwritten(y):
    y[-1, -1] = torch.nan


def wrong_scale(y):
    y[:, 64:128] *= 1.1  # the second of two merged layers


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
def test_a_failure_with_one_number_of_rows_is_found_and_named(weights, failure, named):
    def product(weight, x):
        y = nf4.plain_product(weight, x)
        if len(x) == 32:
            failure(y)
        return y

    reason = nf4.disagreement(product, nf4.plain_product, weights, ROWS, torch.float32)
    assert reason.startswith("32 rows by a weight [128, 256] with doubly quantized scales: ")
    assert named in reason
    assert nf4.disagreement(product, nf4.plain_product, weights, (1, 16), torch.float32) is None


def test_rounding_to_16_bits_passes(weights):
    """Twice: the product of rounded weights against the exact one, in bf16."""

    def exact(weight, x):
        return nf4.plain_product(weight, x.float()).to(x.dtype)

    assert nf4.disagreement(exact, nf4.plain_product, weights, (256,), torch.bfloat16) is None


class OnGPU:
    """All that the decision reads of a tensor on a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("change", "named"),
    [({}, None), ({"quant_type": "fp4"}, "fp4"), ({"blocksize": 128}, "blocks of 128"), ({"cols": 96}, "multiple")],
)
def test_formats_on_hopper(weights, change, named, monkeypatch):
    assert nf4.why_not([]) is None
    assert "Hopper" in nf4.why_not(weights)
    monkeypatch.setattr(nf4, "is_hopper", lambda device: True)
    reason = nf4.why_not([weights[0]._replace(packed=OnGPU(), **change)])
    assert reason is None if named is None else named in reason


def test_rows_to_try():
    assert nf4.rows_to_try(8, 2048) == [1, 8, 16, 32, 64, 128, 256, 257]
    assert nf4.rows_to_try(64, 2048) == [1, 16, 32, 64, 128, 256, 257]
    assert nf4.rows_to_try(64, 100) == [1, 16, 32, 64, 100]
    assert nf4.rows_to_try(300, 2048) == [1, 16, 32, 64, 128, 256, 257, 300]


class Sizes:
    max_num_seqs, max_num_batched_tokens = 8, 64


class Merged:
    """All that the decision reads of the merged layers: 4-bit weights on a GPU or a CPU, and the names they go by."""

    def __init__(self, weights, device: str) -> None:
        self.weights = [w._replace(packed=OnGPU()) for w in weights] if device == "cuda" else weights
        self.asked = []

    def quantized(self, leaf: str = ""):
        self.asked.append(leaf)
        return self.weights


@pytest.mark.parametrize(
    ("device", "inapplicable", "failed", "warned"),
    [
        ("cuda", None, None, False),
        ("cuda", "it is an L4", None, True),
        ("cuda", None, "32 rows: no", True),
        ("cpu", "no GPU", None, False),
    ],
)
def test_products_fall_back_with_one_warning(device, inapplicable, failed, warned, weights, monkeypatch, caplog):
    monkeypatch.setattr(nf4, "why_not", lambda weights: inapplicable)
    monkeypatch.setattr(nf4, "disagreement", lambda *_: failed)
    reason = inapplicable or failed
    decide = functools.partial(nf4.use_fused_products, Merged(weights, device), Sizes(), torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert decide(required=False) == (reason is None)
    assert [r.getMessage().endswith(reason) for r in caplog.records] == ([True] if warned else [])
    if reason:
        with pytest.raises(UserError, match=f"--fused-nf4 True.*{reason}"):
            decide(required=True)


@pytest.mark.parametrize("failing", [None, "x", "y"])
def test_the_adapter_falls_back_with_one_warning(failing, weights, monkeypatch, caplog):
    """The trials: without activation, with one before down_proj, and, for few rows, with one after gate and up."""
    tried = {}

    def disagreement(fused, plain, weights, rows, dtype, *, gated):
        tried[gated] = rows
        return "17 rows: no" if gated and gated == failing else None

    monkeypatch.setattr(nf4, "disagreement", disagreement)
    merged = Merged(weights, "cuda")
    decide = functools.partial(nf4.use_fused_adapter, merged, 16, Sizes(), torch.bfloat16, fused_nf4=True)
    with caplog.at_level(logging.WARNING):
        assert decide(required=False) == (failing is None)
    assert [r.getMessage().endswith("17 rows: no") for r in caplog.records] == [True] * (failing is not None)
    assert merged.asked == ["", "down_proj", "up_proj"]
    rows = {None: [1, 8, 16, 32, 64, 128, 256], "x": [1, 8, 16, 32, 64, 128, 256], "y": [1, 8, 16]}
    assert tried == {gated: rows[gated] for gated in tried}
    assert (len(tried) == 3) == (failing != "x")  # the first failure decides
    if failing:
        with pytest.raises(ValueError, match=r"fused_lora=True.*17 rows: no"):
            decide(required=True)


@pytest.mark.parametrize(("fused_nf4", "rank"), [(False, 16), (True, FUSED_RANK + 1)])
def test_an_adapter_that_cannot_be_fused(fused_nf4, rank, caplog):
    decide = functools.partial(nf4.use_fused_adapter, Merged([], "cpu"), rank, Sizes(), torch.bfloat16)
    assert not decide(fused_nf4=fused_nf4, required=False)
    assert not caplog.records
    with pytest.raises(ValueError, match=rf"fused_lora=True needs .*{FUSED_RANK}"):
        decide(fused_nf4=fused_nf4, required=True)
