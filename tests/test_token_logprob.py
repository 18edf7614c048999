"""Log-probability of a token against float64: by torch, and by the kernel under the interpreter."""

import math

import pytest
import torch

from grpo_kernels.token_logprob import BLOCK, token_logprob, triton

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="no Triton"))]


def exact(logits, tokens):
    return logits.double().log_softmax(1).gather(1, tokens.long()[:, None])[:, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 1000), (2, BLOCK), (2, 2 * BLOCK + 5), (0, 9)], ids=str)
def test_values(shape, backend):
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        logits = (8 * torch.randn(shape, generator=g)).to(dtype)
        tokens = torch.randint(shape[1], shape[:1], generator=g)
        if len(tokens):
            tokens[0] = shape[1] - 1
        made = token_logprob(logits, tokens, backend=backend)
        assert made.dtype == torch.float32
        assert made.shape == shape[:1]
        torch.testing.assert_close(made.double(), exact(logits, tokens), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rising_and_forbidden(backend):
    """A sum that begins with nothing but -inf, a maximum that comes last, and a token that has all the probability."""
    logits = torch.full((3, 2 * BLOCK + 1), -math.inf)
    logits[0, -2:] = torch.tensor([1.0, 2.0])
    logits[1] = torch.linspace(-300, 300, logits.shape[1])
    logits[2] = 0.0
    logits[2, 5] = 200.0
    tokens = torch.tensor([logits.shape[1] - 2, logits.shape[1] - 1, 5], dtype=torch.int32)
    made = token_logprob(logits, tokens, backend=backend)
    torch.testing.assert_close(made.double(), exact(logits, tokens), rtol=1e-5, atol=2e-5)
    assert float(made[0]) == pytest.approx(-1 - math.log1p(math.exp(-1)))
    assert float(made[2]) == 0.0
    assert float(token_logprob(logits, torch.tensor([0, 0, 0]), backend=backend)[0]) == -math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Rows may be padded, and tokens a column of a matrix, as in vLLM."""
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))[:, :33]
    tokens = torch.tensor([[3, 0], [32, 1], [0, 2], [7, 3]])[:, 0]
    made = token_logprob(logits, tokens, backend=backend)
    torch.testing.assert_close(made.double(), exact(logits, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("logits", "tokens", "backend", "named"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), None, r"tokens \[3\]"),
        (torch.zeros(3, 2).T, torch.zeros(2, dtype=torch.long), None, "contiguous last dimension"),
        (torch.zeros(2, 3), torch.zeros(2), None, "tokens torch.float32"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), None, "logits are torch.int64"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), "cuda", "backend 'cuda'"),
    ],
)
def test_refusals(logits, tokens, backend, named):
    with pytest.raises(ValueError, match=named):
        token_logprob(logits, tokens, backend=backend)
