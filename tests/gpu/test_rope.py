"""The rotary embedding on a GPU: the compiled kernel equals transformers' functions, rounded once, in bf16 too."""

import pytest
import torch
from test_rope import ARCHITECTURES, by_transformers, in_float64, inputs, run

from grpo_kernels.rope import rope

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(2, 7, 3, 1, 64, 64), (3, 1, 4, 2, 96, 96), (2, 301, 24, 8, 128, 96), (2, 512, 32, 8, 128, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype):
    for tables in (None, 1):
        arguments = inputs(*size, dtype, tables=tables, device="cuda")
        actual = run(*arguments, None)
        assert type(actual[0].grad_fn).__name__ == "_RopeBackward"
        for architecture in ARCHITECTURES if size[4] == size[5] else ["phi3"]:
            for a, e in zip(actual, by_transformers(architecture, *(x.double() for x in arguments[:4]))):
                assert (a == e.to(dtype)).float().mean() > (0.6 if dtype == torch.float32 else 0.99)
        tolerance = max(torch.finfo(dtype).eps, 1e-6)
        for a, e in zip(actual, in_float64(*arguments), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    """Slices of one projection, and gradients in the layout of attention's backward pass."""
    q, k, cos, sin, upstream = inputs(2, 37, 24, 8, 128, 96, dtype, device="cuda")
    expected = run(q, k, cos, sin, upstream, None)
    together = torch.cat((q, k, k), 2)
    slices = together[:, :, :24], together[:, :, 24:32]
    relaid = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in upstream]
    actual = run(*slices, cos, sin, relaid, None)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    q.requires_grad_()
    (alone,) = torch.autograd.grad(rope(q, k, cos, sin)[0], q, relaid[0])
    assert torch.equal(alone, expected[2])


def test_through_attention():
    """The gradient that a fused attention hands over is right, whatever its strides."""
    q, k, cos, sin, _ = inputs(2, 64, 8, 2, 64, 64, torch.bfloat16, device="cuda")
    results = []
    for backend in ("triton", "torch"):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        q_out, k_out = (x.transpose(1, 2) for x in rope(*leaves, cos, sin, backend=backend))
        value = k_out.detach()
        out = torch.nn.functional.scaled_dot_product_attention(q_out, k_out, value, is_causal=True, enable_gqa=True)
        out.float().square().sum().backward()
        results.append([x.grad for x in leaves])
    for a, e in zip(*results):
        assert (a - e).norm() < 0.01 * e.norm()
