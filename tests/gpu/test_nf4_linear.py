"""The NF4 matrix product on a GPU: compiled kernels against float64 and bitsandbytes, with poisoned outputs."""

import pytest
import torch
from bitsandbytes import matmul_4bit
from test_nf4_linear import adapter, bitsandbytes_weight, exact_product, poisoned_memory, problem, relative_error

from grpo_kernels.nf4 import linear as nf4
from grpo_kernels.nf4.linear import nf4_linear, nf4_linear_reference
from grpo_kernels.nf4.prologue import new_counters
from grpo_kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 17, 33, 100, 257])
@pytest.mark.parametrize("backend", [None, "dequantize"])
@pytest.mark.parametrize(("n", "k"), [(200, 512), (1024, 4096), (96, 8960)])
def test_no_worse_than_bitsandbytes(n, k, backend, rows, nested, dtype):
    """Values with bias and gradients, by whatever kernel serves; the bound is bitsandbytes' own error."""
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
    if backend is None:
        assert torch.equal(actual, nf4_linear(x, packed, absmax, (n, k), bias))  # deterministic


@pytest.mark.parametrize("rows", [17, 33, 100, 250])
@pytest.mark.parametrize(("n", "k"), [(200, 512), (1024, 4096), (96, 8960)])
def test_scaled_weights_are_no_worse_than_bitsandbytes(n, k, rows):
    """The kernel that scales weights before the product, with very large and very small rows of x."""
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
def test_dequantize_bit_for_bit(dtype):
    _, packed, absmax, state = problem(70, 320, 1, nested=False, device="cuda")
    assert torch.equal(nf4.nf4_dequantize(packed, absmax, (70, 320), dtype), bitsandbytes_weight(packed, state, dtype))


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


JOINED = [(6144, 4096, (4096, 5120, 6144)), (28672, 4096, (14336, 28672)), (4096, 14336, (4096,))]  # Llama 8B's
_problems: dict = {}


def large_problem(n, k, rows, dtype):
    """As `problem`, with the weight of each shape made only once, and with its float64 values."""
    if (n, k) not in _problems:
        _, packed, absmax, _ = problem(n, k, 1, device="cuda")
        _problems.clear()  # one at a time: 0.9 GB in float64
        _problems[n, k] = packed, absmax, nf4.nf4_dequantize_reference(packed, absmax, (n, k), torch.float64)
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, k, device="cuda", generator=generator).to(dtype)
    return x, *_problems[n, k]


def exact_with_adapter(x, weight, lora, bias=None):
    """The product and the adapter's in float64, each slice by itself."""
    y = x.double() @ weight.T + (0 if bias is None else bias.double())
    start = 0
    for a, end in zip(lora.a.double().chunk(len(lora.ends)), lora.ends):
        y[:, start:end] += x.double() @ a.T @ lora.b[start:end].double().T
        start = end
    return y


@pytest.mark.parametrize(
    ("dtype", "rank", "rows"),
    [
        *((torch.bfloat16, rank, rows) for rank in (16, 64) for rows in (1, 8, 17, 64, 100, 257)),
        *((torch.float16, rank, rows) for rank in (8, 48) for rows in (1, 8)),  # more rows are dequantized
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "k", "ends"), JOINED, ids=str)  # the slowest to vary: see large_problem
def test_adapter(rows, rank, dtype, n, k, ends):
    """The error of each slice is that of rounding y and the adapter's x A^T; a missing part would make it about 1."""
    x, packed, absmax, weight = large_problem(n, k, rows, dtype)
    lora = adapter(k, rank, ends, dtype, device="cuda", seed=rank)
    bias = torch.randn(n, device="cuda").to(dtype)
    exact = exact_with_adapter(x, weight, lora, bias)
    with poisoned_memory():
        actual = nf4_linear(x, packed, absmax, (n, k), bias, lora=lora, backend="fused")
    for columns in torch.arange(n).tensor_split(ends[:-1]):
        assert relative_error(actual[:, columns], exact[:, columns]) < 0.6 * torch.finfo(dtype).eps
    assert ((actual - exact).abs() < 8 * torch.finfo(dtype).eps * exact.abs().max()).all()
    again = nf4_linear(x, packed, absmax, (n, k), bias, lora=lora, backend="fused")
    assert torch.equal(actual, again)  # deterministic
    zeros = lora._replace(b=torch.zeros_like(lora.b))
    plain = nf4_linear(x, packed, absmax, (n, k), bias, backend="fused")
    assert torch.equal(nf4_linear(x, packed, absmax, (n, k), bias, lora=zeros, backend="fused"), plain)


@pytest.mark.parametrize("rows", [17, 64, 100, 250])
@pytest.mark.parametrize(("rank", "ends"), [(16, (128, 256, 600)), (48, (600,)), (64, (256, 600)), (80, (600,))])
def test_adapter_with_scaled_weights_and_odd_sizes(rows, rank, ends):
    x, packed, absmax, _ = problem(600, 1792, rows, torch.bfloat16, device="cuda", seed=rows)
    x *= torch.tensor([2.0**30, 1.0, 2.0**-30], device="cuda").repeat(rows)[:rows, None]
    lora = adapter(1792, rank, ends, torch.bfloat16, device="cuda")
    exact = exact_product(x, packed, absmax, (600, 1792), None, lora)
    spaced = torch.full((rows, 4000), float("nan"), dtype=x.dtype, device="cuda")
    spaced[:, 1:3585:2] = x
    with poisoned_memory():
        actual = nf4_linear(spaced[:, 1:3585:2], packed, absmax, (600, 1792), lora=lora, backend="fused")
    size = exact.norm(dim=-1, keepdim=True)
    assert relative_error(actual / size, exact / size) < (0.6 if rank <= 64 else 1) * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("rows", [1, 8, 64, 100, 250])
@pytest.mark.parametrize("rank", [None, 16])
def test_adapter_of_gate_and_up(rows, rank):
    """silu(gate) * up within the product equals the product of `swiglu`'s result, but for the sigmoid's last bit."""
    both, packed, absmax, _ = problem(4096, 3584, rows, torch.bfloat16, device="cuda")
    both = torch.cat([both, both.flip(-1)], -1)
    lora = None if rank is None else adapter(3584, rank, (4096,), torch.bfloat16, device="cuda")
    x = torch.nn.functional.silu(both[:, :3584]) * both[:, 3584:]
    exact = exact_product(x, packed, absmax, (4096, 3584), None, lora)
    with poisoned_memory():
        actual = nf4_linear(both, packed, absmax, (4096, 3584), lora=lora, gated="x", backend="fused")
    assert relative_error(actual, exact) < 0.6 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("rows", [1, 8, 16, 40])
@pytest.mark.parametrize(("rank", "ends"), [(None, ()), (16, (1792, 3584)), (64, (3584,))], ids=str)
def test_gated_result(rows, rank, ends):
    x, packed, absmax, _ = problem(3584, 4096, rows, torch.bfloat16, device="cuda")
    lora = None if rank is None else adapter(4096, rank, ends, torch.bfloat16, device="cuda")
    with poisoned_memory():
        actual = nf4_linear(x, packed, absmax, (3584, 4096), lora=lora, gated="y", backend="fused")
    apart = nf4_linear(x, packed, absmax, (3584, 4096), lora=lora, backend="fused")
    assert relative_error(actual, swiglu(*apart.chunk(2, -1))) < 1e-3  # the sigmoid's last bit


@pytest.mark.parametrize("rows", [8, 16, 64, 100])
@pytest.mark.parametrize("size", [None, 100, 300_000, 30_000_000])
def test_adapter_under_a_graph(rows, size):
    """Products one after another, which reuse each other's buffers; x and the adapter change between replays.

    size: bytes of a weight that is to be prefetched, at the end of its memory, and that must stay as it is."""
    prefetched = None if size is None else torch.zeros(size, dtype=torch.uint8, device="cuda")
    x, packed, absmax, _ = problem(1024, 1024, rows, torch.bfloat16, device="cuda")
    weight = nf4.nf4_dequantize_reference(packed, absmax, (1024, 1024), torch.float64)
    lora = adapter(1024, 16, (512, 768, 1024), torch.bfloat16, device="cuda")
    lora = lora._replace(counters=new_counters("cuda"))

    def run():
        inputs = [x * (i + 1) for i in range(6)]
        return [
            nf4_linear(i, packed, absmax, (1024, 1024), lora=lora, prefetch_next=prefetched, backend="fused")
            for i in inputs
        ]

    with torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
    for seed in (1, 2, 3):
        x.copy_(torch.randn(x.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
        fresh = adapter(1024, 16, lora.ends, torch.bfloat16, device="cuda", seed=seed)
        lora.a.copy_(fresh.a)
        lora.b.copy_(fresh.b)
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        for i, y in enumerate(outputs):
            exact = exact_with_adapter(x * (i + 1), weight, lora)
            assert relative_error(y, exact) < 0.6 * torch.finfo(torch.bfloat16).eps
    assert prefetched is None or not prefetched.any()
    assert not lora.counters.any()
