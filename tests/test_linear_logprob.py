"""The fused log-probability against float64, by the row steps in torch and by the Triton kernels.

Where there is no GPU, the kernels are interpreted: conftest.py sets TRITON_INTERPRET before Triton is imported."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo_kernels.linear_logprob as module
from grpo_kernels.linear_logprob import linear_logprob, linear_logprob_reference

needs_triton = pytest.mark.skipif(module.triton is None, reason="no Triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
# Largest relative error of a row: results are rounded once to their dtype (2^-9 for bf16), and so are the operands.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(tokens, hidden, vocab, dtype, device="cpu", seed=0):
    """hidden, weight, bias, targets, and upstream gradients of logps and of entropy; logits deviate by about 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * 2 / hidden**0.5
    bias = torch.randn(vocab, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    upstream = torch.randn(2, tokens, generator=generator)
    return *(t.to(dtype).to(device) for t in (x, weight, bias)), targets.to(device), *upstream.to(device)


def row_error(actual, expected):
    """Largest relative error of a row, against float64."""
    assert actual.shape == expected.shape
    actual, expected = (t.detach().double().reshape(len(t), -1) for t in (actual, expected))
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-3 * expected.norm(dim=1).max())
    return error.max().item() if error.isfinite().all() else math.inf


def run(function, x, weight, bias, targets, upstream, **options):
    """(logps, entropy, gradient of x, of weight, of bias) for the upstream gradients of (logps, entropy)."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    logps, entropy = function(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    loss = sum((out * g.to(out.dtype)).sum() for out, g in zip((logps, entropy), upstream) if g is not None)
    loss.backward()
    return logps, entropy, *(None if t is None else t.grad for t in leaves)


def compare(backend, dtype, shape, device="cpu", *, entropy_grad=False, use_bias=True, low_memory=False, **options):
    """Values and all gradients against float64."""
    x, weight, bias, targets, *upstream = inputs(*shape, dtype, device)
    if not entropy_grad:
        upstream[1] = None
    if not use_bias:
        bias = None
    double = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = run(linear_logprob_reference, *double, targets, upstream, **options)
    fused = {"entropy_grad": entropy_grad, "low_memory": low_memory, "backend": backend}
    actual = run(linear_logprob, x, weight, bias, targets, upstream, **options, **fused)
    names = ("logps", "entropy", "hidden gradient", "weight gradient", "bias gradient")
    for name, a, e in zip(names, actual, expected):
        if e is not None:
            exact = name in ("logps", "entropy")
            tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32 if exact else dtype]
            if name == "bias gradient":  # one number per row of the head, which may consist of one dz, rounded
                a, e, tolerance = a[None], e[None], 2 * tolerance
            assert row_error(a, e) < tolerance, name
            assert a.dtype == (dtype if not exact else module._accumulator_dtype(x)), name


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 rows by 64 columns, so that small inputs have several of both, ragged at the end."""
    monkeypatch.setattr(module, "_tile", lambda tokens, use: (3, 64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(small_tiles, backend, dtype):
    for shape in ((7, 24, 301), (1, 40, 65), (4, 33, 50)) if dtype == torch.float32 else ((7, 24, 150),):
        compare(backend, dtype, shape, temperature=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtypes", "options"),
    [
        ((torch.float16, torch.float32), {"softcap": 4.0, "temperature": 1.3}),
        ((torch.float16, torch.float32), {"low_memory": True, "temperature": 0.6}),
        ((torch.float16,), {"entropy_grad": True}),
        (
            (torch.float16, torch.bfloat16),
            {"entropy_grad": True, "softcap": 4.0, "temperature": 1.3, "use_bias": False},
        ),
    ],
    ids=str,
)
def test_options_match_float64(small_tiles, backend, dtypes, options):
    """float16 is the dtype whose gradients are scaled into its range."""
    for dtype in dtypes:
        compare(backend, dtype, (4, 24, 150), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tile_matches_float64(backend):
    compare(backend, torch.float32, (5, 16, 300))


@pytest.mark.parametrize("low_memory", [False, True])
def test_float64_is_exact(small_tiles, low_memory):
    compare("torch", torch.float64, (7, 24, 301), softcap=3.0, temperature=0.7, low_memory=low_memory)


def test_gradcheck(small_tiles):
    x, weight, bias, targets, *_ = inputs(4, 5, 70, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x, weight, bias):
        return linear_logprob(
            x, weight, targets, bias=bias, temperature=0.8, softcap=3.0, entropy_grad=True, backend="torch"
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_distribution(backend):
    """All logits 0: logp = -ln V, entropy = ln V, and d logp / d hidden = (W_t - mean W) / temperature."""
    _, weight, _, targets, *_ = inputs(3, 8, 100, torch.float32)
    x = torch.zeros(3, 8, requires_grad=True)
    logps, entropy = linear_logprob(x, weight, targets, temperature=0.5, backend=backend)
    torch.testing.assert_close(logps, torch.full((3,), -math.log(100)))
    torch.testing.assert_close(entropy, torch.full((3,), math.log(100)))
    logps.sum().backward()
    torch.testing.assert_close(x.grad, (weight[targets] - weight.mean(0)) / 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confident_tokens_keep_their_precision(small_tiles, backend, low_memory, dtype):
    """p from 1 - 1e-5 to 1 - 1e-7: logp and its gradient, both near 0, to a small relative error."""
    x, weight, _, targets, *upstream = inputs(6, 64, 200, dtype)
    directions = weight[targets].float()
    reach = torch.linspace(19, 23, 6)[:, None]
    x = (x.float() * 0.1 + reach * directions / directions.square().sum(1, keepdim=True)).to(dtype)
    upstream = [upstream[0], None]
    expected = run(linear_logprob_reference, x.double(), weight.double(), None, targets, upstream)
    actual = run(linear_logprob, x, weight, None, targets, upstream, backend=backend, low_memory=low_memory)
    assert (expected[0] > -1e-4).all()
    assert (expected[0] < -1e-8).all()
    assert row_error(actual[0], expected[0]) < 2e-5
    assert row_error(actual[2], expected[2]) < max(1e-4, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slope", [0.05, 3.0])  # nats per column: 3.0 lifts the maximum by 192, exp(-192) is 0 in fp32
@pytest.mark.parametrize("sign", [1, -1])
def test_maximum_that_moves_from_tile_to_tile(small_tiles, backend, slope, sign):
    x, weight, bias, targets, *upstream = inputs(4, 16, 300, torch.float32)
    bias = bias + sign * slope * torch.arange(300)
    upstream = [upstream[0], None]
    expected = run(linear_logprob_reference, x.double(), weight.double(), bias.double(), targets, upstream)
    actual = run(linear_logprob, x, weight, bias, targets, upstream, backend=backend)
    for a, e in zip((actual[0], actual[2]), (expected[0], expected[2])):
        assert row_error(a, e) < 1e-4 * max(1, slope)  # fp32 logits near 900 are 3e-5 apart


@needs_triton
@pytest.mark.parametrize(("slope", "softcap"), [(0.0, None), (0.05, 30.0), (3.0, None)])  # 64 columns: 0, 5, 277 bits
def test_rows_without_gradient_match_float64(small_tiles, softcap, slope):
    """They have a row kernel of their own, for which the maximum may lag; half of the rows are confident, and then the
    first tile is forbidden too. Their values are those of rows with a gradient."""
    x, weight, bias, targets, *_ = inputs(6, 64, 200, torch.float32)
    targets[0] = 0
    directions = weight[targets[::2]]
    x[::2] = 0.1 * x[::2] + 20 * directions / directions.square().sum(1, keepdim=True)
    bias = bias * 0.1 + slope * torch.arange(200)
    for forbidden in (0, 100):
        bias[:forbidden] = -torch.inf
        options = {"temperature": 0.9, "softcap": softcap}
        rows = targets >= forbidden
        expected = linear_logprob_reference(x.double(), weight.double(), targets, bias=bias.double(), **options)
        actual = linear_logprob(x, weight, targets, bias=bias, backend="triton", **options)
        with_gradient = linear_logprob(
            x.clone().requires_grad_(), weight, targets, bias=bias, backend="triton", **options
        )
        assert row_error(actual[0][rows], expected[0][rows]) < 1e-4 * max(1, abs(slope))
        if not forbidden:  # 0 * -inf in the reference
            assert row_error(actual[1], expected[1]) < 1e-4 * max(1, abs(slope))
        for a, u in zip(actual, with_gradient):
            torch.testing.assert_close(a[rows], u[rows], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("first", [0, 70])
def test_forbidden_tokens(small_tiles, backend, low_memory, first):
    """A bias of -inf takes a token out: the same as a smaller head, even if it is a whole tile, and the first one."""
    x, weight, _, targets, *upstream = inputs(4, 16, 170, torch.float32)
    targets = targets % 100
    bias = torch.full((170,), -torch.inf)
    bias[first : first + 100] = 0
    upstream[1] = None if not low_memory else upstream[1]
    options = {"backend": backend, "low_memory": low_memory, "entropy_grad": low_memory}
    expected = run(linear_logprob, x, weight[first : first + 100], None, targets, upstream, **options)
    leaf = x.clone().requires_grad_()
    logps, entropy = linear_logprob(leaf, weight, targets + first, bias=bias, **options)
    torch.testing.assert_close(logps, expected[0])
    torch.testing.assert_close(entropy, expected[1])
    (logps * upstream[0] + (entropy * upstream[1] if low_memory else 0)).sum().backward()
    torch.testing.assert_close(leaf.grad, expected[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_grad_rows(small_tiles, backend, low_memory):
    """Rows that are left out have the same values and no gradient; that of the others is as with zeros upstream."""
    x, weight, bias, targets, *upstream = inputs(8, 16, 100, torch.float32)
    rows = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    options = {"backend": backend, "low_memory": low_memory, "temperature": 0.9}
    expected = run(linear_logprob, x, weight, bias, targets, [upstream[0] * rows, None], **options)
    actual = run(linear_logprob, x, weight, bias, targets, [upstream[0], None], grad_rows=rows, **options)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)
    assert actual[2][~rows].abs().max() == 0
    nothing = run(linear_logprob, x, weight, bias, targets, [upstream[0], None], grad_rows=rows & False, **options)
    torch.testing.assert_close(nothing[0], expected[0])
    assert nothing[2] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_is_detached_unless_asked(small_tiles, backend):
    x, weight, _, targets, *_ = inputs(3, 8, 40, torch.float32)
    x.requires_grad_()
    assert not linear_logprob(x, weight, targets, backend=backend)[1].requires_grad
    assert linear_logprob(x, weight, targets, backend=backend, entropy_grad=True)[1].requires_grad
    with torch.no_grad():
        logps, entropy = linear_logprob(x, weight, targets, backend=backend)
    expected = linear_logprob_reference(x, weight, targets)
    torch.testing.assert_close(logps, expected[0])
    torch.testing.assert_close(entropy, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_second_backward_adds_the_same(small_tiles, backend, low_memory):
    x, weight, _, targets, *_ = inputs(3, 8, 40, torch.float32)
    x.requires_grad_()
    logps, _ = linear_logprob(x, weight, targets, backend=backend, low_memory=low_memory)
    logps.sum().backward(retain_graph=True)
    once = x.grad.clone()
    logps.sum().backward()
    torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_the_logits_are_never_whole(monkeypatch, backend, low_memory):
    """No operation of the forward and the backward pass returns more bytes than the head or a tile has."""
    tokens, hidden, vocab, tile = 9, 4, 300, (3, 64)
    monkeypatch.setattr(module, "_tile", lambda tokens, use: tile)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max([self.size] + [t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
            return out

    x, weight, _, targets, *upstream = inputs(tokens, hidden, vocab, torch.float32)
    x.requires_grad_()
    with Largest() as largest:
        logps, _ = linear_logprob(x, weight, targets, backend=backend, low_memory=low_memory)
        (logps * upstream[0]).sum().backward()
    assert largest.size <= 4 * max(hidden * vocab, tile[0] * tile[1])


def test_no_tokens():
    x, weight, _, targets, *_ = inputs(0, 8, 40, torch.float32)
    x.requires_grad_()
    logps, entropy = linear_logprob(x, weight, targets)
    assert logps.shape == entropy.shape == (0,)
    logps.sum().backward()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([{"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.nan}], "temperature is"),
        ([{"softcap": 0.0}], "softcap is"),
        ([{"hidden": torch.zeros(3, 9)}, {"hidden": torch.zeros(1, 3, 8)}], r"hidden is .*\[tokens, hidden\]"),
        ([{"weight": torch.zeros(40, 8, dtype=torch.bfloat16)}], "weight torch.bfloat16 .*of one dtype"),
        ([{"targets": torch.zeros(n, dtype=d)} for n, d in ((4, torch.int64), (3, torch.int32))], "targets is .*int64"),
        ([{"targets": torch.tensor([0, 1, bad])} for bad in (40, -100)], r"targets holds ids outside \[0, 40\)"),
        ([{"bias": torch.zeros(39)}], "bias is"),
        ([{"grad_rows": torch.zeros(3)}], "grad_rows is"),
        ([{"backend": "cuda"}], "backend 'cuda'"),
    ],
)
def test_bad_input_is_named(changes, named):
    arguments = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(40, 8), "targets": torch.arange(3)}
    for change in changes:
        with pytest.raises(ValueError, match=named):
            linear_logprob(**arguments | change)
