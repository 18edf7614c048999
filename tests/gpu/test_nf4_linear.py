"""The NF4 matrix product on a GPU: compiled kernels against float64 and bitsandbytes, outputs poisoned."""

import pytest
import torch
from bitsandbytes import matmul_4bit
from test_nf4_linear import bitsandbytes_weight, poisoned_memory, problem, relative_error

from grpo_kernels import nf4_linear as nf4
from grpo_kernels.nf4_linear import nf4_linear, nf4_linear_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 17, 33, 100, 257])
@pytest.mark.parametrize("backend", ["fused", "dequantise"])
@pytest.mark.parametrize(("n", "k"), [(200, 512), (1024, 4096), (96, 8960)])
def test_no_worse_than_bitsandbytes(n, k, backend, rows, nested, dtype):
    """Values with bias and gradients; bitsandbytes' own error is the bound."""
    x, packed, absmax, state = problem(n, k, rows, dtype, nested=nested, device="cuda", seed=rows)
    state.dtype = dtype
    bias = torch.randn(n, device="cuda", dtype=dtype)
    upstream = torch.randn(rows, n, device="cuda", dtype=dtype)
    exact_leaf = x.double().requires_grad_()
    exact = nf4_linear_reference(exact_leaf, packed, absmax, (n, k), bias.double())
    exact.backward(upstream.double())
    leaf = x.clone().requires_grad_()
    with poisoned_memory():
        actual = nf4_linear(leaf, packed, absmax, (n, k), bias, backend=backend)
        actual.backward(upstream)
    theirs = torch.nn.functional.linear(x, bitsandbytes_weight(packed, state, dtype), bias)
    assert relative_error(actual, exact) < 1.05 * relative_error(theirs, exact)
    rounding = torch.finfo(dtype).eps
    assert relative_error(leaf.grad, exact_leaf.grad) < rounding
    assert ((actual - exact).abs() < 8 * rounding * exact.abs().max()).all()
    if backend == "fused":
        assert torch.equal(actual, nf4_linear(x, packed, absmax, (n, k), bias, backend=backend))  # deterministic


@pytest.mark.parametrize("rows", [1, 17, 33, 100, 250])
@pytest.mark.parametrize(("n", "k"), [(200, 512), (1024, 4096), (96, 8960)])
def test_scaled_weights_are_no_worse_than_bitsandbytes(n, k, rows, monkeypatch):
    """The tiles that scale weights before the product, whether or not they are the default; large and small rows."""
    monkeypatch.setattr(nf4, "SCALED_FROM", 1)
    x, packed, absmax, state = problem(n, k, rows, torch.bfloat16, device="cuda", seed=rows)
    x[0] *= 2.0**40
    x[rows // 2] *= 2.0**-40
    state.dtype = torch.bfloat16
    bias = torch.zeros(n, device="cuda", dtype=torch.bfloat16)
    exact = nf4_linear_reference(x.double(), packed, absmax, (n, k))
    with poisoned_memory():
        actual = nf4_linear(x, packed, absmax, (n, k), bias, backend="fused")
    theirs = torch.nn.functional.linear(x, bitsandbytes_weight(packed, state, torch.bfloat16))
    size = exact.norm(dim=-1, keepdim=True)
    assert relative_error(actual / size, exact / size) < relative_error(theirs / size, exact / size)
    assert torch.equal(actual, nf4_linear(x, packed, absmax, (n, k), bias, backend="fused"))  # deterministic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantise_bit_for_bit(dtype):
    _, packed, absmax, state = problem(70, 320, 1, nested=False, device="cuda")
    assert torch.equal(nf4.nf4_dequantise(packed, absmax, (70, 320), dtype), bitsandbytes_weight(packed, state, dtype))


def test_under_a_graph_and_beside_bitsandbytes():
    x, packed, absmax, state = problem(512, 1024, 8, torch.bfloat16, device="cuda")
    state.dtype = torch.bfloat16
    nf4_linear(x, packed, absmax, (512, 1024))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = nf4_linear(x, packed, absmax, (512, 1024))
    for seed in (1, 2, 3):
        x.copy_(torch.randn(8, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, matmul_4bit(x, packed, state).double()) < 6e-3
