"""The rotary embedding of queries and keys against transformers' functions and against float64: by torch, and by the
kernel under the interpreter. `inputs`, `by_transformers` and `run` serve the GPU tests too."""

import importlib

import pytest
import torch

import grpo_kernels.rope
from grpo_kernels.rope import rope, rope_reference, triton

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="no Triton"))]
ARCHITECTURES = ["llama", "mistral", "phi3", "qwen2"]
SIZES = [  # batch, time, heads, heads of k, dim, rotary
    (2, 7, 3, 1, 64, 64),
    (1, 5, 4, 2, 96, 96),
    (3, 1, 2, 2, 128, 96),
    (2, 40, 3, 1, 128, 128),  # several programs
    (1, 3, 1, 1, 10, 6),
    (0, 3, 2, 1, 64, 64),
    (2, 0, 2, 1, 64, 64),
]


def inputs(batch, time, heads, k_heads, dim, rotary, dtype, *, tables=None, device="cpu"):
    """q, k, cos, sin, and a gradient for each result. tables: number of sequences in cos and sin; None: batch."""
    g = torch.Generator().manual_seed(0)
    q, k, grad_q, grad_k = (
        torch.randn(batch, time, n, dim, generator=g).to(device, dtype) for n in (heads, k_heads, heads, k_heads)
    )
    start = torch.randint(0, 1000, (batch if tables is None else tables, 1, 1), generator=g)
    frequencies = 10_000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    angles = ((start + torch.arange(time)[:, None]) * frequencies).repeat(1, 1, 2)
    cos, sin = ((1.19 * table).to(device, dtype) for table in (angles.cos(), angles.sin()))  # with attention scaling
    return q, k, cos, sin, (grad_q, grad_k)


def by_transformers(architecture, q, k, cos, sin):
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    results = module.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return [x.transpose(1, 2) for x in results]


def run(q, k, cos, sin, upstream, backend):
    """The rotated q and k, and the gradients of q and k."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    out = rope(*leaves, cos, sin, backend=backend)
    return *out, *torch.autograd.grad(out, leaves, upstream)


def in_float64(q, k, cos, sin, upstream):
    return run(*(x.double() for x in (q, k, cos, sin)), [x.double() for x in upstream], "torch")


def assert_close(actual, expected, dtype):
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-6)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_transformers(architecture, backend):
    """Equal in float32; in 16 bits equal to transformers' float32 values, rounded once."""
    for size in SIZES if architecture == "phi3" else SIZES[:1]:  # Phi-3's function alone rotates a part of each head
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if backend == "triton" and dtype == torch.bfloat16:
                continue  # the interpreter truncates; tests/gpu has bfloat16
            q, k, cos, sin, upstream = inputs(*size, dtype)
            expected = by_transformers(architecture, *(x.float() for x in (q, k, cos, sin)))
            for grad in (True, False):
                out = run(q, k, cos, sin, upstream, backend)[:2] if grad else rope(q, k, cos, sin, backend=backend)
                for a, e in zip(out, expected):
                    assert a.dtype == dtype
                    assert a.requires_grad == grad
                    assert a.is_contiguous()
                    if dtype == torch.float32:
                        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
                    else:
                        assert (a != e.to(dtype)).sum() <= a.numel() // 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, backend):
    for dtype in (torch.float32, torch.float16):
        arguments = inputs(*size, dtype)
        assert_close(run(*arguments, backend), in_float64(*arguments), dtype)


def test_float64_checks_out_by_differences():
    q, k, cos, sin, _ = inputs(2, 3, 2, 1, 10, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_once(backend):
    arguments = inputs(2, 40, 3, 1, 64, 64, torch.float16)
    for a, e in zip(run(*arguments, backend), in_float64(*arguments)):
        assert (a == e.half()).float().mean() > 0.99
    [twice, _] = by_transformers("llama", *arguments[:4])
    assert (twice == in_float64(*arguments)[0].half()).float().mean() < 0.9  # so the test tells the two apart


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_one_projection(backend):
    """As in Phi-3; the gradient comes back in one piece."""
    heads, k_heads, dim = 3, 1, 64
    _, _, cos, sin, upstream = inputs(2, 7, heads, k_heads, dim, 48, torch.float32)
    qkv = torch.randn(2, 7, (heads + 2 * k_heads) * dim, generator=torch.Generator().manual_seed(1))

    def both(x, *tables, backend):
        x.requires_grad_()
        q, k, _ = x.split([heads * dim, k_heads * dim, k_heads * dim], -1)
        out = rope(q.unflatten(-1, (-1, dim)), k.unflatten(-1, (-1, dim)), *tables, backend=backend)
        return *out, *torch.autograd.grad(out, x, [g.to(x.dtype) for g in upstream])

    expected = both(qkv.double(), cos.double(), sin.double(), backend="torch")
    actual = both(qkv.clone(), cos, sin, backend=backend)
    assert all(x.is_contiguous() for x in actual)
    assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """q, k and the gradients that attention hands over may have any strides, even where the last is not 1."""
    q, k, cos, sin, upstream = inputs(2, 7, 3, 2, 64, 64, torch.float32)
    expected = run(q, k, cos, sin, upstream, backend)
    layouts = {
        "heads before time": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "time before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "padded rows": lambda x: torch.nn.functional.pad(x, (0, 3, 0, 1))[:, :, :-1, :-3],
        "dim first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }
    for name, relaid in layouts.items():
        grads = [relaid(x) for x in upstream]
        assert grads[0].stride() != upstream[0].stride(), name
        for inputs_too in (False, True):
            x = [relaid(x) for x in (q, k)] if inputs_too else (q, k)
            tables = [relaid(t[:, :, None])[:, :, 0] for t in (cos, sin)] if inputs_too else (cos, sin)
            out = run(*x, *tables, grads, backend)
            assert all(a.is_contiguous() for a in out[:2]), name
            assert all(torch.equal(a, e) for a, e in zip(out, expected, strict=True)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_sum(backend):
    """It is one number, expanded, so that all its strides are 0."""
    q, k, cos, sin, _ = inputs(2, 3, 2, 1, 64, 64, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k)]
    ones = [torch.ones_like(x) for x in leaves]
    expected = torch.autograd.grad(rope(*leaves, cos, sin, backend=backend), leaves, ones)
    actual = torch.autograd.grad(sum(x.sum() for x in rope(*leaves, cos, sin, backend=backend)), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_table_for_all_sequences(backend):
    q, k, cos, sin, upstream = inputs(3, 5, 2, 1, 64, 48, torch.float32, tables=1)
    expected = run(q, k, cos.repeat(3, 1, 1), sin.repeat(3, 1, 1), upstream, backend)
    for tables in ((cos, sin), (cos.expand(3, -1, -1), sin.expand(3, -1, -1)), (cos, sin.mT.contiguous().mT)):
        actual = run(q, k, *tables, upstream, backend)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_asks_for(backend, monkeypatch):
    """Where q or k is frozen, or its result is not used, nothing is computed for it."""
    q, k, cos, sin, upstream = inputs(2, 7, 3, 2, 64, 48, torch.float32)
    expected = run(q, k, cos, sin, upstream, backend)[2:]
    turned = []

    def watched(xs, *tables, **options):
        turned.append(len(xs))
        return rotate(xs, *tables, **options)

    rotate = grpo_kernels.rope._rotate
    monkeypatch.setattr(grpo_kernels.rope, "_rotate", watched)
    for i in (0, 1):
        for other_frozen in (False, True):
            leaves = [q.clone(), k.clone()]
            leaves[i].requires_grad_()
            leaves[1 - i].requires_grad_(not other_frozen)
            rope(*leaves, cos, sin, backend=backend)[i].backward(upstream[i])
            assert torch.equal(leaves[i].grad, expected[i])
            assert leaves[1 - i].grad is None
    leaves = [q.clone().requires_grad_(), k.clone()]
    sum(x.sum() for x in rope(*leaves, cos, sin, backend=backend)).backward()  # a gradient that k has no use for
    assert turned == ([2, 1] * 5 if backend == "triton" else [])


@pytest.mark.skipif(triton is None, reason="no Triton")
def test_tables_are_not_saved_tensors():
    """Hooks on saved tensors, which offload or recompute, would otherwise take cos and sin once per layer."""
    q, k, cos, sin, _ = inputs(1, 3, 2, 1, 64, 64, torch.float32)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda x: x):
        out = rope(q.requires_grad_(), k, cos, sin, backend="triton")
    assert type(out[0].grad_fn).__name__ == "_RopeBackward"
    assert seen == []
    with torch.no_grad():
        assert not rope(q, k, cos, sin, backend="triton")[0].requires_grad


def test_dispatch():
    q, k, cos, sin, _ = inputs(1, 3, 2, 1, 64, 64, torch.float32)
    for a, e in zip(rope(q, k, cos, sin), rope_reference(q, k, cos, sin)):
        assert torch.equal(a, e)
    with pytest.raises(ValueError, match=r"backend 'cuda': choose 'triton' .*16 or 32 bits"):
        rope(q, k, cos, sin, backend="cuda")
    with pytest.raises(ValueError, match=r"backend 'triton': choose 'triton' .*16 or 32 bits"):
        rope(*(x.double() for x in (q, k, cos, sin)), backend="triton")


def test_refusals():
    q, k, cos, sin, _ = inputs(2, 3, 2, 1, 64, 64, torch.float32)
    with pytest.raises(ValueError, match=r"q is \[2, 3, 128\], k \[2, 3, 1, 64\]: both must be \[batch, time, heads"):
        rope(q.flatten(2), k, cos, sin)
    with pytest.raises(ValueError, match=r"k \[2, 3, 1, 32\]"):
        rope(q, k[..., :32], cos, sin)
    with pytest.raises(ValueError, match=r"k \[1, 3, 1, 64\]"):
        rope(q, k[:1], cos, sin)
    with pytest.raises(ValueError, match=r"cos is \[2, 2, 64\], sin \[2, 2, 64\]: both must be \[2 or 1, 3, rotary\]"):
        rope(q, k, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match=r"sin \[1, 3, 64\]"):
        rope(q, k, cos, sin[:1])
    with pytest.raises(ValueError, match=r"cos is \[2, 3, 63\], .* with an even rotary from 2 to q's dim, 64"):
        rope(q, k, cos[..., 1:], sin[..., 1:])
    with pytest.raises(ValueError, match=r"cos is \[2, 3, 64\], .* dim, 32"):
        rope(q[..., :32], k[..., :32], cos, sin)
    with pytest.raises(
        ValueError, match=r"k is torch.float16, cos .*: they must be torch.float32, as q is .*\.to\(q\)"
    ):
        rope(q, k.half(), cos, sin)
    with pytest.raises(ValueError, match=r"sin torch.float64: they must be torch.float32"):
        rope(q, k, cos, sin.double())
