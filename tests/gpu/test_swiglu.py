"""silu(gate) * up on a GPU: the compiled kernels against float64, in bf16 too."""

import pytest
import torch
from test_swiglu import run

from grpo_kernels.swiglu import swiglu_backward_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1025), (2, 300, 14_336)], ids=str)
def test_values_and_gradients(shape, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    rounded = [(4 * torch.randn(shape, generator=g, device="cuda")).to(dtype) for _ in range(3)]
    actual = run(*rounded, dtype, None)
    assert type(actual[0].grad_fn).__name__ == "ViewBackward0"  # a view of the kernel's rows
    expected = run(*(x.double() for x in rounded), torch.float64, "torch")
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("joined", [False, True])
def test_backward_in_place(joined):
    """Equal to the bit to the backward pass out of place: nothing is read after it was overwritten."""
    g = torch.Generator("cuda").manual_seed(0)
    both, grad = (torch.randn(300, n, generator=g, device="cuda").bfloat16() for n in (2 * 14_336, 14_336))
    gate, up = both.chunk(2, -1) if joined else (half.clone() for half in both.chunk(2, -1))
    expected = run(gate.clone(), up.clone(), grad, torch.bfloat16, None)
    swiglu_backward_(gate, up, grad)
    for actual, e in zip((grad, gate, up), expected):
        assert torch.equal(actual, e)
