"""The fused log-probability on a GPU: the compiled kernels against float64, at small and at real sizes."""

import pytest
import torch
from test_linear_logprob import compare, inputs, row_error, run

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
    """Real sizes in bf16, where half of the tokens are confident: the errors of logps and gradient against float64 are
    at most 10% above those of whole fp32 logits from the same bf16 product, with their gradient rounded to bf16, as by
    autograd."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator)
    weight = (torch.randn(vocab, hidden, device="cuda", generator=generator) * 2 / hidden**0.5).bfloat16()
    targets = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    directions = weight[targets[::2]].float()
    x[::2] = 0.1 * x[::2] + 25 * directions / directions.square().sum(1, keepdim=True)
    x = x.bfloat16()
    upstream = [torch.randn(tokens, device="cuda", generator=generator), None]

    expected = run(linear_logprob_reference, x.double(), weight.double(), None, targets, upstream)
    logits = torch.mm(x, weight.T, out_dtype=torch.float32).requires_grad_()
    plain_logps = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (plain_logps * upstream[0]).sum().backward()
    plain = plain_logps, logits.grad.bfloat16() @ weight
    leaf = x.clone().requires_grad_()
    logps, _ = linear_logprob(leaf, weight, targets, low_memory=low_memory)
    (logps * upstream[0]).sum().backward()
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        for a, p, e in zip((logps, leaf.grad), plain, (expected[0], expected[2])):
            error, plain_error = (((t.double() - e)[rows].norm() / e[rows].norm()).item() for t in (a, p))
            assert error < 1.1 * plain_error
    assert (expected[0][::2] > -1e-4).all()
    assert row_error(logps[::2], expected[0][::2]) < 1e-3  # whole fp32 logits: 1e-2 and more, some logps are just 0
    assert (logps < 0).all()


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(7, 24, 301), (2500, 512, 50_001)])
def test_rows_without_gradient_have_the_same_values(tokens, hidden, vocab):
    """They have a row kernel of their own. Half of them are confident, so that one tile raises their maximum far."""
    x, weight, bias, targets, *_ = inputs(tokens, hidden, vocab, torch.bfloat16, "cuda")
    directions = weight[targets[::2]].float()
    x[::2] = (0.1 * x[::2] + 25 * directions / directions.square().sum(1, keepdim=True)).bfloat16()
    with_gradient, without = (
        linear_logprob(leaf, weight, targets, bias=bias) for leaf in (x.clone().requires_grad_(), x)
    )
    expected = linear_logprob_reference(x.double(), weight.double(), targets, bias=bias.double())
    for u, v, e in zip(with_gradient, without, expected):
        assert row_error(v, e) < max(1e-4, 1.1 * row_error(u, e))


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
