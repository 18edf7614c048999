"""silu(gate) * up and its gradients against float64: by torch, and by the kernels under the interpreter."""

import pytest
import torch

from grpo_kernels.swiglu import swiglu, swiglu_backward_, triton

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="no Triton"))]


def run(gate, up, upstream, dtype, backend):
    leaves = [x.to(dtype).detach().requires_grad_() for x in (gate, up)]
    out = swiglu(*leaves, backend=backend)
    return out, *torch.autograd.grad(out, leaves, upstream.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 1024), (4, 1500), (0, 8)], ids=str)
def test_values_and_gradients(shape, backend):
    g = torch.Generator().manual_seed(0)
    gate, up, upstream = (4 * torch.randn(shape, generator=g) for _ in range(3))
    if gate.numel():
        gate.view(-1)[0] = -200.0  # sigmoid is 0 there, and exp(200) is not finite
    for dtype in (torch.float32, torch.float16):
        rounded = [x.to(dtype) for x in (gate, up, upstream)]
        actual = run(*rounded, dtype, backend)
        expected = run(*(x.double() for x in rounded), torch.float64, "torch")
        for a, e in zip(actual, expected):
            assert a.dtype == dtype
            assert a.shape == shape
            tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_where_torch_does(backend):
    """silu is rounded before the product too: with a single rounding a quarter of the values would differ."""
    g = torch.Generator().manual_seed(0)
    gate, up, upstream = (torch.randn(40, 100, generator=g).half() for _ in range(3))
    out, _, grad_up = run(gate, up, upstream, torch.float16, backend)
    assert (out == torch.nn.functional.silu(gate) * up).float().mean() > 0.98
    assert (grad_up == torch.nn.functional.silu(gate) * upstream).float().mean() > 0.98


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_one_matrix(backend):
    """As in Phi-3: rows are strided, and the gradient comes back in one piece."""
    both = torch.randn(2, 6, 2 * 40, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1))

    def gradient(x, **options):
        x.requires_grad_()
        return torch.autograd.grad(swiglu(*x.chunk(2, -1), **options), x, upstream.to(x.dtype))[0]

    expected = gradient(both.double(), backend="torch")
    torch.testing.assert_close(gradient(both.clone(), backend=backend).double(), expected, rtol=1e-5, atol=1e-6)
    columns = both[0].T  # not contiguous along the last dimension
    out = swiglu(columns[:, :3], columns[:, 3:], backend=backend)
    torch.testing.assert_close(out, torch.nn.functional.silu(columns[:, :3]) * columns[:, 3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("joined", [False, True])
def test_backward_in_place(backend, joined):
    """For gate and up apart, and for the halves of one matrix: the gradients of `swiglu` itself."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        both, grad = (torch.randn(size, generator=g).to(dtype) for size in ((5, 2, 2 * 1100), (5, 2, 1100)))
        gate, up = both.chunk(2, -1) if joined else (half.clone() for half in both.chunk(2, -1))
        expected = run(gate.clone(), up.clone(), grad, dtype, backend)
        assert swiglu_backward_(gate, up, grad, backend=backend) is None
        for actual, e in zip((grad, gate, up), expected):
            torch.testing.assert_close(actual, e, rtol=torch.finfo(dtype).eps, atol=1e-6)
        if joined:
            assert torch.equal(both, torch.cat((gate, up), -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_in_place_is_seen_by_autograd(backend):
    kept = torch.randn(3, 8, requires_grad=True).exp()  # exp's gradient needs its result
    swiglu_backward_(kept.detach(), torch.ones(3, 8), torch.ones(3, 8), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_refusals():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"gate is torch.float32 \[2, 4\], up torch.float32 \[2, 3\].*alike"):
        swiglu(x, x[:, :3])
    with pytest.raises(ValueError, match=r"up torch.float64 .*they must be alike"):
        swiglu(x, x.double())
    with pytest.raises(ValueError, match="backend 'cuda'"):
        swiglu(x, x, backend="cuda")
    with pytest.raises(ValueError, match="must be of one shape, and grad contiguous"):
        swiglu_backward_(x, x.clone(), x[:, :2].repeat(1, 2).t().contiguous().t())
