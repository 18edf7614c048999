"""The fused log-probability on a GPU: the compiled kernels against float64, at small and at real sizes."""

import pytest
import torch
from test_linear_logprob import compare, row_error, run

from grpo_kernels.linear_logprob import linear_logprob, linear_logprob_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("shape", [(7, 24, 301), (2500, 136, 9001)], ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    [
        ("triton", torch.float32, {"temperature": 0.7}),
        ("triton", torch.float16, {"temperature": 0.7}),
        ("triton", torch.bfloat16, {"temperature": 0.7}),
        ("triton", torch.bfloat16, {"softcap": 4.0, "temperature": 1.3}),
        ("triton", torch.bfloat16, {"low_memory": True, "temperature": 0.6, "use_bias": False}),
        ("triton", torch.float16, {"entropy_grad": True, "softcap": 4.0, "temperature": 1.3}),
        ("torch", torch.bfloat16, {"softcap": 4.0, "temperature": 1.3}),
        ("torch", torch.float32, {"entropy_grad": True}),
    ],
    ids=str,
)
def test_matches_float64(backend, dtype, options, shape):
    compare(backend, dtype, shape, "cuda", **options)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(301, 1536, 151_936), (2051, 3584, 32_768)])
def test_no_worse_than_plain_fp32_logits(low_memory, tokens, hidden, vocab):
    """Real sizes, bf16, half of the tokens confident: the errors of logps and gradient against float64 stay within
    5% of the plain formula's on the upcast inputs, and the gradient's is the last rounding to bf16 alone."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator)
    weight = (torch.randn(vocab, hidden, device="cuda", generator=generator) * 2 / hidden**0.5).bfloat16()
    targets = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    directions = weight[targets[::2]].float()
    x[::2] = 0.1 * x[::2] + 25 * directions / directions.square().sum(1, keepdim=True)
    x = x.bfloat16()
    upstream = [torch.randn(tokens, device="cuda", generator=generator), None]

    def gradients(function, x, weight, **options):
        leaf = x.detach().clone().requires_grad_()
        logps, _ = function(leaf, weight, targets, **options)
        (logps * upstream[0].to(logps.dtype)).sum().backward()
        return logps, leaf.grad

    expected = gradients(linear_logprob_reference, x.double(), weight.double())
    plain = gradients(linear_logprob_reference, x, weight)
    actual = gradients(linear_logprob, x, weight, low_memory=low_memory)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        for a, p, e in zip(actual, plain, expected):
            error, plain_error = (((t.double() - e)[rows].norm() / e[rows].norm()).item() for t in (a, p))
            assert error < 1.05 * plain_error + 1e-7
    assert (expected[0][::2] > -1e-4).all()
    assert row_error(actual[0][::2], expected[0][::2]) < 1e-4
    assert (actual[0] < 0).all()


def test_autocast_changes_nothing():
    x, weight = torch.randn(70, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    targets = torch.randint(500, (70,), device="cuda")
    upstream = [torch.randn(70, device="cuda"), None]
    expected = run(linear_logprob, x, weight, None, targets, upstream)
    with torch.autocast("cuda", torch.bfloat16):
        actual = run(linear_logprob, x, weight, None, targets, upstream)
    for a, e in zip(actual, expected):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_grad_rows():
    x, weight = torch.randn(3000, 64, device="cuda"), torch.randn(9000, 64, device="cuda")
    targets = torch.randint(9000, (3000,), device="cuda")
    rows = torch.rand(3000, device="cuda") < 0.4
    upstream = torch.randn(3000, device="cuda")
    expected = run(linear_logprob, x, weight, None, targets, [upstream * rows, None])
    actual = run(linear_logprob, x, weight, None, targets, [upstream, None], grad_rows=rows)
    for a, e in zip(actual, expected):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert actual[2][~rows].abs().max() == 0
