"""The fused per-token losses on a GPU: the comparison of the interpreter's tests, at real lengths."""

import pytest
import torch
from test_policy_terms import CASES, compare

from grpo_kernels.policy_terms import policy_terms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("shape", [(5, 37), (16, 3000)], ids=str)
@pytest.mark.parametrize(("loss", "level", "options"), CASES, ids=str)
def test_kernel_equals_reference(loss, level, options, shape):
    compare(shape, torch.float32, "cuda", loss, level, spread=0.3 if shape[1] < 100 else 0.02, **options)


def test_cuda_takes_the_kernel():
    x = torch.zeros(2, 3, device="cuda", requires_grad=True)
    terms = policy_terms(x, x.detach(), torch.ones(2, device="cuda"), torch.ones_like(x))
    assert type(terms.policy.grad_fn).__name__ == "_FusedTermsBackward"
