"""The fused per-token losses on a GPU: the comparison of the interpreter's tests, at real lengths."""

import pytest
import torch
from test_policy_terms import CASES, compare, make_inputs

from grpo.losses import LOSSES, policy_terms
from grpo.objective import Objective, merge_metrics, policy_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("shape", [(5, 37), (16, 3000)], ids=str)
@pytest.mark.parametrize(("loss", "level", "options"), CASES, ids=str)
def test_kernel_equals_reference(loss, level, options, shape):
    compare(shape, torch.float32, "cuda", loss, level, spread=0.3 if shape[1] < 100 else 0.02, **options)


def test_cuda_takes_the_kernel():
    x = torch.zeros(2, 3, device="cuda", requires_grad=True)
    terms = policy_terms(x, x.detach(), torch.ones(2, device="cuda"), torch.ones_like(x))
    assert type(terms.policy.grad_fn).__name__ == "_FusedTermsBackward"


@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_is_the_same_on_both_devices(loss):
    """Loss, gradient and metrics with everything switched on: the kernel on the GPU, torch on the CPU."""
    logps, old, ref, mask, advantages, _ = make_inputs(7, 300, torch.float32, "cpu", 0.02)
    objective = Objective(loss=loss, beta=0.04, importance="token_mask", importance_cap=1.03, off_policy_threshold=1e-3,
                          entropy_bonus=0.1, top_entropy_quantile=0.6)  # fmt: skip
    results = []
    for device in ("cuda", "cpu"):
        x, o, r, m, a = (tensor.to(device) for tensor in (logps, old, ref, mask, advantages[:, 0]))
        x.requires_grad_()
        value, metrics = policy_loss(x, o, a, m, objective, ref_logps=r, sampler_logps=r, entropy=o.abs(),
                                     max_completion_length=300)  # fmt: skip
        results.append((value.detach().cpu(), torch.autograd.grad(value, x)[0].cpu(), merge_metrics([metrics])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-4, abs=1e-6)
