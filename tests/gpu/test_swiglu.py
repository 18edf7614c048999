"""silu(gate) * up on a GPU: the compiled kernel, in bf16 too, against float64."""

import pytest
import torch
from test_swiglu import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1025), (2, 300, 14_336)], ids=str)
def test_values_and_gradients(shape, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    rounded = [(4 * torch.randn(shape, generator=g, device="cuda")).to(dtype) for _ in range(3)]
    actual = run(*rounded, dtype, None)
    assert type(actual[0].grad_fn).__name__ == "ViewBackward0"  # of the kernel's rows
    expected = run(*(x.double() for x in rounded), torch.float64, "torch")
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=4 * tolerance)
