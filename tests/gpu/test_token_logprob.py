"""Log-probability of a token on a GPU: the compiled kernel against float64 and against vLLM's own kernel."""

import pytest
import torch
from test_token_logprob import exact

from grpo_kernels.token_logprob import token_logprob

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (8, 128_256), (300, 151_937)], ids=str)
def test_values(shape, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    logits = (8 * torch.randn(shape, generator=g, device="cuda")).to(dtype)
    tokens = torch.randint(shape[1], shape[:1], generator=g, device="cuda")
    torch.testing.assert_close(token_logprob(logits, tokens).double(), exact(logits, tokens), rtol=1e-5, atol=2e-5)


def test_vllms_own():
    theirs = pytest.importorskip("vllm.v1.worker.gpu.sample.logprob").compute_token_logprobs
    logits = 8 * torch.randn(8, 128_256, device="cuda").bfloat16()
    tokens = torch.randint(128_256, (8,), device="cuda")
    torch.testing.assert_close(
        token_logprob(logits, tokens), theirs(logits, tokens[:, None])[:, 0], rtol=1e-5, atol=2e-5
    )
