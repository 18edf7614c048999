"""The NF4 matrix product on the CPU: bitsandbytes as oracle, kernels under the interpreter, and PTX executed."""

import itertools
import re

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from grpo_kernels.nf4 import linear as nf4
from grpo_kernels.nf4 import scaled
from grpo_kernels.nf4.dequantize import NestedAbsmax, absmax_of, expand_absmax
from grpo_kernels.nf4.few_rows import block_ptx
from grpo_kernels.nf4.linear import choose_backend, nf4_linear, nf4_linear_reference
from grpo_kernels.nf4.lookup import NF4, TABLE_SCALE, lookup_constants, lookup_lines
from grpo_kernels.nf4.prologue import COUNTERS, SHRINK_BLOCK, Lora, _shrink_splits, lora_fits, new_counters
from grpo_kernels.nf4.scaled import scaled_lookup_ptx
from grpo_kernels.nf4.tiles import STEP, Tiles, choose_tiles
from grpo_kernels.swiglu import swiglu

# The interpreter's conversion to bfloat16 truncates, so most kernels are checked in float16 here, in bfloat16 on a GPU.


def problem(n, k, rows, dtype=torch.float16, *, nested=True, device="cpu", seed=0):
    """(x, packed, absmax, state) of a Gaussian weight quantized by bitsandbytes."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(n, k, device=device, generator=generator) * 0.05
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    x = torch.randn(rows, k, device=device, generator=generator).to(dtype)
    return x, packed, absmax_of(state), state


def adapter(k, rank, ends, dtype=torch.float16, *, device="cpu", seed=0):
    """A Lora whose product is about as large as that of `problem`, and differs in size from slice to slice."""
    generator = torch.Generator(device).manual_seed(seed)
    a = torch.randn(len(ends) * rank, k, device=device, generator=generator) * (0.05 * rank**-0.25)
    b = torch.randn(ends[-1], rank, device=device, generator=generator) * rank**-0.25
    for i, end in enumerate(ends[:-1]):
        b[end:] *= 1.5 + i
    return Lora(a.to(dtype), b.to(dtype), ends)


def exact_product(x, packed, absmax, shape, bias=None, lora=None):
    """`nf4_linear_reference` in float64."""
    bias = None if bias is None else bias.double()
    lora = None if lora is None else lora._replace(a=lora.a.double(), b=lora.b.double())
    return nf4_linear_reference(x.double(), packed, absmax, shape, bias, lora)


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def bitsandbytes_weight(packed, state, dtype):
    state.dtype = dtype
    return dequantize_4bit(packed, state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_decodes_as_bitsandbytes(nested, dtype):
    _, packed, absmax, state = problem(70, 192, 1, nested=nested)
    actual = nf4.nf4_dequantize_reference(packed, absmax, (70, 192), dtype)
    expected = bitsandbytes_weight(packed, state, dtype)
    if nested:  # one float32 rounding of the scale apart
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert (actual == expected).float().mean() > 0.9
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantize_kernel_is_the_reference(nested, dtype):
    _, packed, absmax, _ = problem(37, 320, 1, nested=nested)
    expected = nf4.nf4_dequantize_reference(packed, absmax, (37, 320), dtype)
    for rows, columns in ((slice(None), slice(None)), (slice(5, 30), slice(None)), (slice(None), slice(64, 256))):
        out = torch.full(expected[rows, columns].shape, float("nan"), dtype=dtype)
        assert nf4.nf4_dequantize(packed, absmax, (37, 320), dtype, rows=rows, columns=columns, out=out) is out
        torch.testing.assert_close(out, expected[rows, columns], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
        assert (out == expected[rows, columns]).float().mean() >= (0.95 if nested else 1)


@pytest.mark.parametrize(
    ("n", "k", "rows", "tiles"),
    [
        (96, 512, 1, Tiles(64, 16, 1, 4, 2)),  # N is no multiple of the tile
        (65, 512, 17, Tiles(64, 16, 2, 4, 2)),  # two tiles of rows
        (40, 1280, 33, Tiles(64, 64, 3, 4, 2)),  # splits of unequal length
    ],
    ids=str,
)
def test_scaled_weights(n, k, rows, tiles):
    """Three roundings to float16 (table, scale, product) are a fifth of the bfloat16 one that bitsandbytes makes."""
    x, packed, absmax, _ = problem(n, k, rows)
    bias = torch.randn(n).half()
    exact = nf4_linear_reference(x.double(), packed, absmax, (n, k), bias.double())
    with poisoned_memory():
        actual = nf4._fused(x, packed, absmax, (n, k), bias, tiles)
    assert relative_error(actual, exact) < 4.2e-4  # of which float16 outputs 2.1e-4
    assert (actual.double() - exact).abs().max() < 5e-3  # every output, the last rows and columns too


def test_which_kernel_serves(monkeypatch):
    """What no fused kernel takes is dequantized, and has the right values with an adapter and with an activation."""
    seen = []
    for name in ("nf4_few_rows", "nf4_scaled", "_by_chunks"):
        kernel = getattr(nf4, name)
        monkeypatch.setattr(nf4, name, lambda *a, name=name, kernel=kernel: seen.append(name) or kernel(*a))
    monkeypatch.setattr(nf4, "choose_backend", lambda *_: "fused")  # as on a Hopper
    _, packed, absmax, _ = problem(64, 256, 1)
    moved = torch.cat([packed.new_zeros(8, 1), packed])[8:]  # no longer at a multiple of 16 bytes
    both = torch.randn(17, 512, generator=torch.Generator().manual_seed(1))
    lora = adapter(256, 8, (64,))
    for rows, dtype, codes, scales, served in (
        (17, torch.bfloat16, packed, absmax, "nf4_scaled"),
        (17, torch.float16, packed, absmax, "_by_chunks"),
        (17, torch.bfloat16, packed, expand_absmax(absmax), "_by_chunks"),
        (17, torch.bfloat16, moved, absmax, "_by_chunks"),
        (17, torch.float32, packed, absmax, "_by_chunks"),
        (16, torch.float16, packed, absmax, "nf4_few_rows"),
        (16, torch.float16, moved, expand_absmax(absmax), "nf4_few_rows"),
        (1, torch.float32, packed, absmax, "_by_chunks"),
    ):
        x = both[:rows].to(dtype)
        cast = lora._replace(a=lora.a.to(dtype), b=lora.b.to(dtype))
        gate, up = x.double().chunk(2, -1)
        exact = exact_product(torch.nn.functional.silu(gate) * up, packed, absmax, (64, 256), None, cast)
        actual = nf4_linear(x, codes, scales, (64, 256), lora=cast, gated="x")
        assert seen == [served]
        assert relative_error(actual, exact) < (1.5e-2 if dtype == torch.bfloat16 else 1e-3)  # truncated, see above
        seen.clear()
        if served == "_by_chunks":
            with pytest.raises(ValueError, match=f"backend 'fused' needs .*; x is {dtype} of {rows} rows, K = 256"):
                nf4_linear(x[:, :256], codes, scales, (64, 256), backend="fused")


def test_backend_on_a_gpu(monkeypatch):
    """Fused kernels are chosen on Hopper alone, for the dtypes and numbers of rows and columns that they take."""

    class OnGPU:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, dtype):
            self.dtype = dtype

    cases = {  # (dtype, rows, K): whether fused
        (torch.bfloat16, 16, 256): True, (torch.bfloat16, 256, 256): True, (torch.bfloat16, 257, 256): False,
        (torch.bfloat16, 1, 320): False, (torch.float16, 16, 256): True, (torch.float16, 17, 256): False,
        (torch.float32, 1, 256): False,
    }  # fmt: skip
    for hopper in (True, False):
        monkeypatch.setattr(nf4, "is_hopper", lambda _, hopper=hopper: hopper)
        for (dtype, rows, k), fused in cases.items():
            expected = "fused" if fused and hopper else "dequantize"
            assert choose_backend(OnGPU(dtype), rows, k) == expected, (dtype, rows, k)
    assert choose_backend(torch.zeros(1, dtype=torch.bfloat16), 1, 256) == "torch"


def test_scaled_weights_of_any_magnitude():
    """Rows of x and of W far beyond float16's range, and zero ones."""
    x, packed, absmax, _ = problem(160, 512, 5, torch.bfloat16)  # 32 rows of W share a second-level scale
    x *= torch.tensor([2.0**60, 1.0, 0.0, 2.0**-60, 2.0**-20])[:, None]
    factor = torch.tensor([2.0**-30, 1.0, 2.0**30, 0.0, 2.0**-12])
    absmax = absmax._replace(absmax=absmax.absmax * factor, offset=absmax.offset * factor)
    exact = nf4_linear_reference(x.double(), packed, absmax, (160, 512)).view(5, 5, 32)
    with poisoned_memory():
        actual = nf4._fused(x, packed, absmax, (160, 512), None, Tiles(64, 16, 1, 4, 2))
    error = (actual.view(5, 5, 32) - exact).norm(dim=-1)
    assert (error <= 8e-3 * exact.norm(dim=-1)).all()  # the interpreter truncates bfloat16 outputs


ADAPTED = [  # n, k, rows, rank, ends of slices, tiles, dtype
    (40, 512, 1, 8, (40,), Tiles(16, 8, 1, 2, 1), torch.float16),
    (72, 768, 8, 48, (16, 32, 72), Tiles(16, 8, 1, 4, 1), torch.float16),  # a warp without work
    (50, 1280, 9, 64, (32, 50), Tiles(16, 16, 1, 4, 1), torch.float16),  # turns that differ, N no multiple of the tile
    (40, 2304, 16, 16, (40,), Tiles(16, 16, 1, 8, 1), torch.bfloat16),
    (136, 512, 17, 16, (64, 128, 136), Tiles(64, 32, 2, 4, 2), torch.float16),  # N no multiple of the tile
    (
        80,
        256,
        5,
        48,
        (64, 80),
        Tiles(64, 16, 1, 4, 2),
        torch.float16,
    ),  # as many rows per tile as a product with A takes
    (66, 768, 33, 64, (66,), Tiles(64, 64, 3, 4, 2), torch.float16),
    (128, 512, 100, 40, (128,), Tiles(128, 128, 1, 8, 4), torch.float16),
]


@pytest.mark.parametrize(("n", "k", "rows", "rank", "ends", "tiles", "dtype"), ADAPTED, ids=str)
def test_fused_kernel_with_an_adapter(n, k, rows, rank, ends, tiles, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "_multiprocessors", lambda _: 132)  # enough to compute x A^T in parts
    x, packed, absmax, _ = problem(n, k, rows, dtype)
    bias, lora = torch.randn(n).to(dtype), adapter(k, rank, ends, dtype)
    exact = exact_product(x, packed, absmax, (n, k), bias, lora)
    with poisoned_memory():
        actual = nf4._fused(x, packed, absmax, (n, k), bias, tiles, lora)
    bound = 8e-3 if dtype == torch.bfloat16 else 4e-4  # the interpreter truncates bfloat16
    for columns in torch.arange(n).tensor_split(ends[:-1]):
        assert relative_error(actual[:, columns], exact[:, columns]) < bound
    assert ((actual.double() - exact).abs() < 8 * bound * exact.std()).all()
    wrong = [None, lora._replace(b=2 * lora.b), lora._replace(a=lora.a.roll(1, 0))]
    if len(ends) > 1:
        wrong.append(lora._replace(a=lora.a.roll(rank, 0)))
    for other in wrong:  # the check would see a missing adapter, a wrong scaling, a wrong rank or slice
        assert relative_error(actual, exact_product(x, packed, absmax, (n, k), bias, other)) > 20 * bound


def test_scaled_weights_with_an_adapter():
    """Rows of x of any magnitude: the adapter sees x as it is, and y is scaled before it is added."""
    (n, k), rows = (65, 512), 33
    x, packed, absmax, _ = problem(n, k, rows, torch.bfloat16)
    x *= 2.0 ** torch.arange(-16, 16, 32 / rows)[:, None]
    lora, bias = adapter(k, 48, (64, 65), torch.bfloat16), torch.randn(n).bfloat16()
    exact = exact_product(x, packed, absmax, (n, k), bias, lora)
    with poisoned_memory():
        actual = nf4._fused(x, packed, absmax, (n, k), bias, Tiles(64, 64, 2, 4, 2), lora)
    # The interpreter truncates where bfloat16 rounds, here twice: before the adapter is added, and after.
    assert ((actual.double() - exact).norm(dim=-1) < 1e-2 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize(("multiprocessors", "splits", "given"), [(132, 3, True), (132, 3, False), (4, 1, False)])
def test_product_with_a(multiprocessors, splits, given, monkeypatch):
    """All that the second kernel may read of x A^T is written: zeros where rows or ranks pad."""
    x, packed, absmax, _ = problem(192, 768, 21)
    lora = adapter(768, 24, (64, 128, 192))
    if given:
        lora = lora._replace(counters=new_counters("cpu"))
    seen = {}

    class Second:
        def __getitem__(self, grid):
            return lambda *_, **arguments: seen.update(arguments)

    monkeypatch.setattr(nf4, "_multiprocessors", lambda _: multiprocessors)
    monkeypatch.setattr(scaled, "_scaled_kernel", Second())
    assert _shrink_splits(6, 768, multiprocessors) == (6 // splits, splits)
    with poisoned_memory():
        for _ in range(1 + given):  # the counters are left as they were
            nf4._fused(x, packed, absmax, (192, 768), None, Tiles(64, 64, 1, 4, 2), lora)
    expected = torch.zeros(64, 3, 32, dtype=torch.float64)
    expected[:21, :, :24] = (x.double() @ lora.a.double().T).view(21, 3, 24)
    assert seen["shrunk_ptr"].dtype == x.dtype
    torch.testing.assert_close(seen["shrunk_ptr"].view(64, 3, 32).double(), expected, rtol=1e-3, atol=1e-5)
    assert not given or not lora.counters.any()


@pytest.mark.parametrize(
    ("backend", "rank", "ends", "fits"),
    [
        ("fused", 16, (16, 32, 72), True),
        ("fused", 80, (72,), False),
        ("fused", 8, (60, 72), False),
        ("fused", 8, (16, 32, 48, 72), False),
        ("scaled", 8, (48, 72), False),
        ("dequantize", 16, (16, 32, 72), True),
        ("torch", 16, (16, 32, 72), True),
    ],
    ids=str,
)
def test_any_adapter(backend, rank, ends, fits):
    """What a fused kernel cannot add is added after it. x has strides and leading axes, and is left as it is."""
    dtype, times = (torch.bfloat16, 9) if backend == "scaled" else (torch.float16, 3)
    rows, backend = 2 * times, "fused" if backend == "scaled" else backend
    x, packed, absmax, _ = problem(72, 256, rows, dtype)
    lora = adapter(256, rank, ends, dtype)
    assert lora_fits(lora, 64 if rows > 16 else 16) == fits
    exact = exact_product(x, packed, absmax, (72, 256), None, lora)
    spaced = torch.full((2, times, 600), float("nan"), dtype=x.dtype)
    spaced[..., 3:515:2] = x.view(2, times, 256)
    with poisoned_memory():
        actual = nf4_linear(spaced[..., 3:515:2], packed, absmax, (72, 256), lora=lora, backend=backend)
    assert actual.shape == (2, times, 72)
    # Added after it, y is rounded twice; the interpreter truncates bfloat16.
    assert relative_error(actual.view(rows, 72), exact) < (1.5e-2 if rows > 16 else 6e-4)
    assert nf4_linear(x[:0], packed, absmax, (72, 256), lora=lora, backend=backend).shape == (0, 72)


@pytest.mark.parametrize(
    ("backend", "rows", "rank"),
    [
        ("fused", 6, 16),
        ("fused", 18, None),
        ("fused", 18, 16),
        ("fused", 18, 80),
        ("dequantize", 18, 16),
        ("torch", 6, 16),
    ],
)
def test_gate_and_up_side_by_side(backend, rows, rank):
    """silu(gate) * up is computed within the product, and the adapter's product is of it too. x may have strides."""
    dtype = torch.bfloat16 if backend == "fused" and rows > 16 else torch.float16
    n, ends = (136, (128, 136)) if rows > 16 else (40, (32, 40))
    _, packed, absmax, _ = problem(n, 256, 1)
    both = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    lora = None if rank is None else adapter(256, rank, ends, dtype)
    gate, up = both.double().chunk(2, -1)
    exact = exact_product(torch.nn.functional.silu(gate) * up, packed, absmax, (n, 256), None, lora)
    spaced = torch.full((2, rows // 2, 1100), float("nan"), dtype=dtype)
    spaced[..., 3:1027:2] = both.view(2, rows // 2, 512)
    with poisoned_memory():
        actual = nf4_linear(spaced[..., 3:1027:2], packed, absmax, (n, 256), lora=lora, gated="x", backend=backend)
    assert actual.shape == (2, rows // 2, n)
    assert relative_error(actual.view(rows, n), exact) < (1.5e-2 if dtype == torch.bfloat16 else 1e-3)
    if backend == "fused" and rank != 80:  # to the bit what the two would be apart
        apart = swiglu(*both.chunk(2, -1), backend="triton" if rows > 16 else "torch")
        plain = nf4_linear(apart, packed, absmax, (n, 256), lora=lora, backend=backend)
        assert torch.equal(actual.view(rows, n), plain)


@pytest.mark.parametrize(("backend", "n", "rows", "rank", "ends"), [
    ("fused", 40, 6, None, ()), ("fused", 40, 6, 16, (20, 40)), ("fused", 40, 16, 8, (40,)),
    ("fused", 64, 9, 48, (32, 64)), ("fused", 64, 6, 16, (16, 64)), ("fused", 64, 6, 80, (32, 64)),
    ("dequantize", 64, 20, 16, (32, 64)), ("torch", 64, 6, 16, (32, 64)),
], ids=str)  # fmt: skip
def test_gated_result(backend, n, rows, rank, ends):
    """silu(gate) * up of the columns that come out: with slices of the adapter for each half, one for both, and others,
    for which the kernel cannot compute it."""
    x, packed, absmax, _ = problem(n, 256, rows)
    lora, bias = None if rank is None else adapter(256, rank, ends), torch.randn(n).half()
    gate, up = exact_product(x, packed, absmax, (n, 256), bias, lora).chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    with poisoned_memory():
        actual = nf4_linear(x, packed, absmax, (n, 256), bias, lora=lora, gated="y", backend=backend)
    assert actual.shape == (rows, n // 2)
    assert relative_error(actual, exact) < 2e-3
    apart = nf4_linear(x, packed, absmax, (n, 256), bias, lora=lora, backend=backend)  # the sigmoid's last bit
    assert relative_error(actual, swiglu(*apart.chunk(2, -1))) < 1e-4
    assert nf4_linear(x[:0], packed, absmax, (n, 256), bias, lora=lora, gated="y", backend=backend).shape == (0, n // 2)


def test_gated_result_within_the_product(monkeypatch):
    """For few rows no other kernel computes it, unless the adapter's slices are not gate and up; above 16 rows another
    one always does."""
    x, packed, absmax, _ = problem(64, 256, 17, torch.bfloat16)
    made = []
    monkeypatch.setattr(nf4, "swiglu", lambda gate, up: made.append(gate.shape) or swiglu(gate, up))
    for lora in (None, adapter(256, 16, (32, 64)), adapter(256, 16, (64,))):
        nf4_linear(x[:6].half(), packed, absmax, (64, 256), lora=lora, gated="y", backend="fused")
    assert not made
    lora = adapter(256, 16, (16, 64))
    nf4_linear(x[:6].half(), packed, absmax, (64, 256), lora=lora, gated="y", backend="fused")
    actual = nf4_linear(x, packed, absmax, (64, 256), gated="y", backend="fused")
    assert made == [(6, 32), (17, 32)]
    gate, up = exact_product(x, packed, absmax, (64, 256)).chunk(2, -1)
    assert relative_error(actual, torch.nn.functional.silu(gate) * up) < 1.5e-2


@pytest.mark.parametrize("gated", ["x", "y"])
def test_gate_and_up_have_a_gradient(gated):
    _, packed, absmax, _ = problem(96, 256, 6)
    both = torch.randn(6, 512 if gated == "x" else 256, generator=torch.Generator().manual_seed(1)).half()
    gradients = []
    for x, backend in ((both, "fused"), (both.double(), None)):
        x = x.clone().requires_grad_()
        if backend:
            y = nf4_linear(x, packed, absmax, (96, 256), gated=gated, backend=backend)
        elif gated == "x":
            gate, up = x.chunk(2, -1)
            y = exact_product(torch.nn.functional.silu(gate) * up, packed, absmax, (96, 256))
        else:
            gate, up = exact_product(x, packed, absmax, (96, 256)).chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
        y.double().sum().backward()
        gradients.append(x.grad)
    assert relative_error(*gradients) < 2e-3


def test_gate_and_up_of_a_wrong_width():
    x, packed, absmax, _ = problem(96, 256, 6)
    with pytest.raises(ValueError, match=r"x is torch.float16 \[6, 256\], must be .* \[..., 512\] for .* gated='x'"):
        nf4_linear(x, packed, absmax, (96, 256), gated="x")
    with pytest.raises(ValueError, match=r"gated is True, N = 96: gated must be 'x', 'y' \(with an even N\) or None"):
        nf4_linear(x, packed, absmax, (96, 256), gated=True)
    x, packed, absmax, _ = problem(95, 256, 6)
    with pytest.raises(ValueError, match="gated is 'y', N = 95"):
        nf4_linear(x, packed, absmax, (95, 256), gated="y")


@pytest.mark.parametrize(("rows", "dtype", "ends"), [(20, torch.bfloat16, (64, 72)), (6, torch.float16, (16, 24))])
def test_adapter_of_zeros_changes_no_bit(rows, dtype, ends):
    n, k = ends[-1], 256
    x, packed, absmax, _ = problem(n, k, rows, dtype)
    lora = adapter(k, 16, ends, dtype)
    zeros = lora._replace(b=torch.zeros_like(lora.b))
    plain, first, second, with_zeros = (
        nf4_linear(x, packed, absmax, (n, k), lora=one, backend="fused") for one in (None, lora, lora, zeros)
    )
    assert torch.equal(with_zeros, plain)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_parts_of_the_product_with_a():
    sizes = (256, 1536, 4096, 8960, 14336, 28672)
    for tiles, k in itertools.product((1, 2, 3, 8, 16, 24, 48, 64, 65), sizes):
        per_program, splits = _shrink_splits(tiles, k, 132)
        blocks = k // SHRINK_BLOCK
        assert per_program * splits >= blocks > per_program * (splits - 1)  # all columns, and no program without work
        assert splits <= min(32, max(1, 264 // tiles))
        assert splits == 1 or tiles <= COUNTERS


class poisoned_memory:
    """A block in which torch.empty returns NaN, or the largest integer."""

    def __enter__(self):
        self.before = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = self.before


def test_poison_works():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.parametrize("backend", ["fused", "dequantize", "torch"])
def test_any_strides_and_leading_axes(backend):
    n = 24
    x, packed, absmax, _ = problem(n, 256, 12)
    expected = nf4_linear_reference(x.double(), packed, absmax, (n, 256))
    spaced = torch.full((12, 600), float("nan"), dtype=x.dtype)
    spaced[:, 3:515:2] = x
    transposed = x.T.contiguous().T
    for view in (spaced[:, 3:515:2], transposed, x.view(3, 4, 256)):
        actual = nf4_linear(view, packed, absmax, (n, 256), backend=backend)
        assert actual.shape == (*view.shape[:-1], n)
        assert relative_error(actual.reshape(12, n), expected) < 1e-3
    assert nf4_linear(x[:0], packed, absmax, (n, 256), backend=backend).shape == (0, n)
    assert nf4_linear(x[0], packed, absmax, (n, 256), backend=backend).shape == (n,)


@pytest.mark.parametrize("backend", ["fused", "dequantize", "torch"])
def test_gradient(backend, monkeypatch):
    monkeypatch.setattr(nf4, "CHUNK_BYTES", 1)  # the smallest chunks: 256 rows, 256 columns
    n, k = (260, 320) if backend == "dequantize" else (24, 512)  # 320: a last chunk of 64 columns
    x, packed, absmax, _ = problem(n, k, 9)
    bias = torch.randn(n).half()
    upstream = torch.randn(9, n).half()

    def gradients(function, dtype, **options):
        leaf, leaf_bias = (t.to(dtype).clone().requires_grad_() for t in (x, bias))
        y = function(leaf, packed, absmax, (n, k), leaf_bias, **options)
        y.backward(upstream.to(dtype))
        return y, leaf.grad, leaf_bias.grad

    actual = gradients(nf4_linear, torch.float16, backend=backend)
    for a, e in zip(actual, gradients(nf4_linear_reference, torch.float64)):
        assert relative_error(a, e) < 1e-3


def constants(dtype):
    """What a lane has in registers, as uint32."""
    lanes = lookup_constants(dtype, torch.device("cpu"))
    assert lanes.shape == (5, 32)
    assert (lanes == lanes[:, :1]).all()
    return lanes[:, 0].numpy().view(np.uint32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ptx_of_the_lookup(dtype):
    """Executes the PTX for every 16-bit half of a word, and compares to the bit with the table."""
    word = (np.arange(2**16) | np.random.default_rng(0).permutation(2**16) << 16).astype(np.uint32)
    outputs = [f"${i}" for i in range(2 * dtype.itemsize)]
    loaded = {f"c{i}": c for i, c in enumerate(constants(dtype))} if dtype.itemsize == 2 else {}
    registers = run_ptx("\n".join(lookup_lines(dtype, "$8", outputs, list(loaded) or None)), {"$8": word} | loaded)
    outputs = [registers[name] for name in outputs]
    table = (torch.tensor(NF4, dtype=torch.float64) * TABLE_SCALE[dtype]).to(dtype)
    values = torch.from_numpy(np.stack(outputs, -1).view(np.int32)).view(dtype)  # [2 ** 16, 8], k = 0..7
    assert values.shape == (2**16, 8)
    for i in range(4):
        byte = word >> (8 * i) & 255
        for odd, codes in enumerate((byte >> 4, byte & 15)):  # the even k is in the high bits
            assert torch.equal(values[:, 2 * i + odd], table[torch.from_numpy(codes.astype(np.int64))])


def test_ptx_of_the_scaled_lookup():
    """The table's float16 values times the scale, rounded once; the float16 product itself is numpy's."""
    random = np.random.default_rng(0)
    word = random.integers(0, 2**32, 4096, dtype=np.uint32)
    scale = (random.random(4096) * 2.0 ** random.integers(-12, 15, 4096)).astype(np.float16)
    operands = {"$4": word, "$5": np.repeat(scale, 2).view(np.uint32)}
    operands |= {f"${6 + i}": constant for i, constant in enumerate(constants(torch.float16))}
    registers = run_ptx(scaled_lookup_ptx(), operands)
    values = np.stack([registers[f"${i}"] for i in range(4)], -1).view(np.float16)  # [4096, 8], k = 0..7
    table = (np.array(NF4) * TABLE_SCALE[torch.float16]).astype(np.float16)
    for i in range(4):
        byte = word >> (8 * i) & 255
        for odd, codes in enumerate((byte >> 4, byte & 15)):
            assert (values[:, 2 * i + odd] == table[codes] * scale).all()


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ptx_of_a_block(dtype, columns):
    """A warp's 16 rows of W times 8 or 16 of x: lookups executed, and each mma as PTX defines its fragments."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (16, 64), dtype=np.uint64)
    x = torch.from_numpy(random.standard_normal((8 * columns, 64))).to(dtype)
    packed = (codes[:, ::2] << np.uint64(4) | codes[:, 1::2]).astype(np.uint8)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    first = 4 * columns
    operands = {f"${first + i}": packed.view(np.uint64)[g + 8 * i, t] for i in (0, 1)}
    words = x.view(torch.uint16).numpy().view(np.uint64)  # four values each
    for column, i in itertools.product(range(columns), range(4)):
        operands[f"${first + 2 + 4 * column + i}"] = words[g + 8 * column, 4 * t + i]
    operands |= {f"${first + 2 + 4 * columns + i}": constant for i, constant in enumerate(constants(dtype))}
    sums = run_ptx(block_ptx(dtype, columns), operands)
    table = (torch.tensor(NF4, dtype=torch.float64) * TABLE_SCALE[dtype]).to(dtype).double().numpy()
    exact = table[codes.astype(np.int64)] @ x.double().numpy().T  # [16, 8 * columns]
    for column, i in itertools.product(range(columns), range(4)):
        expected = exact[g + 8 * (i // 2), 8 * column + 2 * t + i % 2]
        np.testing.assert_allclose(sums[f"${4 * column + i}"], expected, rtol=1e-12, atol=1e-12)


def run_ptx(source: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The few instructions that our PTX uses, on arrays (32 lanes, for mma) of uint32; float64 sums. The registers
    after it."""
    registers = dict(registers)

    def value(name):
        return registers[name].astype(np.uint64) if name in registers else np.uint64(int(name, 0))

    for line in re.findall(r"[\w.]+ [^;]+(?=;)", source):
        op, rest = line.split(" ", 1)
        names = re.findall(r"[$\w]+", rest)
        if op == ".reg":
            continue
        if op == "prmt.b32":
            both = value(names[1]) | value(names[2]) << np.uint64(32)
            result = np.uint64(0)
            for i in range(4):
                selector = value(names[3]) >> np.uint64(4 * i) & np.uint64(15)
                assert (selector < 8).all()  # the mode that replicates signs is not used
                result |= (both >> (selector * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * i)
        elif op == "shr.u32":
            result = value(names[1]) >> value(names[2])
        elif op == "and.b32":
            result = value(names[1]) & value(names[2])
        elif op == "lop3.b32":
            assert names[4] == "0xea"
            result = value(names[1]) & value(names[2]) | value(names[3])
        elif op == "mul.rn.f16x2":
            pairs = [value(name).astype(np.uint32).view(np.float16) for name in names[1:]]
            result = (pairs[0] * pairs[1]).view(np.uint32)
        elif op == "mov.b64":  # {low, high}, wide
            registers[names[0]] = value(names[2]).astype(np.uint32)
            result, names = value(names[2]) >> np.uint64(32), names[1:]
        elif op == "mov.b32":
            result = value(names[1])
        elif op == "mov.f32":
            registers[names[0]] = np.zeros(32) if names[1] == "0f00000000" else registers[names[1]]
            continue
        elif op.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
            dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[op.split(".")[-3]]
            registers |= mma(names[:4], registers, names[4:8], names[8:10], names[10:], dtype)
            continue
        else:
            raise AssertionError(op)
        registers[names[0]] = np.asarray(result).astype(np.uint32)
    return registers


def mma(d, registers, a, b, c, dtype):
    """The fragments of m16n8k16 as the PTX ISA defines them: lane 4 g + t has columns 2 t, 2 t + 1 and 8 more."""
    g, t = np.arange(32) // 4, np.arange(32) % 4
    pairs = [torch.from_numpy(registers[r].view(np.int32)).view(dtype).view(32, 2).double().numpy() for r in (*a, *b)]
    left, right = np.zeros((16, 16)), np.zeros((8, 16))
    for i in range(4):
        for e in (0, 1):
            left[g + 8 * (i % 2), 2 * t + e + 8 * (i // 2)] = pairs[i][:, e]
            if i < 2:
                right[g, 2 * t + e + 8 * i] = pairs[4 + i][:, e]
    product = left @ right.T
    return {d[i]: registers[c[i]] + product[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_table_rounds_better_than_dequantizing(dtype):
    """The table's error, weighted as the codes of Gaussian weights, is half of that of rounding products."""
    _, packed, absmax, state = problem(256, 1024, 1, nested=False)
    exact = nf4.nf4_dequantize_reference(packed, absmax, (256, 1024), torch.float64)
    scale = TABLE_SCALE[dtype]
    table = (torch.tensor(NF4, dtype=torch.float64) * scale).to(dtype).double() / scale
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), -1).view(-1, 64).int()
    ours = (table[codes] * absmax.double()[:, None]).view(256, 1024)
    theirs = bitsandbytes_weight(packed, state, dtype)
    assert relative_error(ours, exact) < 0.55 * relative_error(theirs, exact)


def test_scales():
    _, _, absmax, state = problem(70, 192, 1)
    assert isinstance(absmax, NestedAbsmax)
    assert absmax.quantized.data_ptr() == state.absmax.data_ptr()
    from bitsandbytes.functional import dequantize_blockwise

    expected = dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(expand_absmax(absmax), expected, rtol=1e-6, atol=0)
    state.quant_type = "fp4"
    with pytest.raises(ValueError, match="nf4"):
        absmax_of(state)


def test_tiles_cover_the_sum():
    for rows in (1, 16, 17, 64, 65, 256, 300):
        for n, k in ((256, 1536), (1024, 4096), (4096, 14336), (28672, 8192), (96, 256)):
            tiles = choose_tiles(rows, n, k, 132)
            assert (tiles.n == 16) == (rows <= 16)
            steps = k // (k if rows <= 16 else STEP)
            per_program = -(-steps // tiles.splits)
            assert per_program * (tiles.splits - 1) < steps  # no program without work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([lambda a: a | {"x": a["x"][:, :-64]}, lambda a: a | {"x": a["x"].double()}], "x is torch.float"),
        (
            [lambda a: a | {"packed": a["packed"][:-1]}, lambda a: a | {"packed": a["packed"].view(torch.int8)}],
            "packed is .*must be contiguous uint8 of 5120 elements; view another bnb_4bit_quant_storage",
        ),
        (
            [
                lambda a: a | {"absmax": a["absmax"].quantized},
                lambda a: a | {"absmax": torch.ones(3)},
                lambda a: a | {"absmax": a["absmax"]._replace(offset=torch.zeros(2))},
                lambda a: a | {"absmax": a["absmax"]._replace(absmax=torch.zeros(3))},
            ],
            r"absmax must be 160 .*NestedAbsmax of 160 .*, 1 second-level scales and one offset or 1 \(see absmax_of\)",
        ),
        ([lambda a: a | {"shape": (40, 100)}], "multiple of 64"),
        ([lambda a: a | {"bias": torch.ones(41)}], "bias is"),
        (
            [
                lambda a: a | {"prefetch_next": a["packed"].view(torch.int8)},
                lambda a: a | {"prefetch_next": a["packed"][::2]},
            ],
            "prefetch_next is .*must be contiguous uint8",
        ),
        ([lambda a: a | {"x": a["x"].float(), "backend": "fused", "lora": None}], "16-bit x"),
        ([lambda a: a | {"backend": "cuda"}], "backend 'cuda'"),
        ([lambda a: with_lora(a, ends=(16, 41))], r"lora.ends is \(16, 41\).*N = 40"),
        ([lambda a, e=e: with_lora(a, ends=e) for e in ((0, 40), (40, 40), ())], "lora.ends"),
        (
            [lambda a: with_lora(a, ends=(40,)), lambda a: with_lora(a, a=a["lora"].a.T)],
            r"lora.a is torch.float16 \[(8|256), (256|8)\].*= \[(4|8), 256\]",
        ),
        (
            [
                lambda a: with_lora(a, b=a["lora"].b[1:]),
                lambda a: with_lora(a, b=a["lora"].b.T.contiguous().T),
                lambda a: with_lora(a, b=a["lora"].b.float()),
            ],
            r"lora.b is .*must be contiguous torch.float16 \[N, rank\] = \[40, 4\]",
        ),
        ([lambda a: with_lora(a, a=a["lora"].a[:0], b=a["lora"].b[:, :0])], "lora.a is"),
        (
            [lambda a: with_lora(a, counters=torch.zeros(9))],
            r"lora.counters is torch.float32 \[9\], must be int32 .*\[64\]",
        ),
        (
            [
                lambda a: a | {"x": a["x"].clone().requires_grad_()},
                lambda a: a | {"bias": torch.ones(40, requires_grad=True)},
                lambda a: with_lora(a, b=a["lora"].b.clone().requires_grad_()),
            ],
            r"no gradient with lora: call it under torch.no_grad\(\)",
        ),
    ],
)
def test_refusals(changes, message):
    x, packed, absmax, _ = problem(40, 256, 3)
    lora = adapter(256, 4, (16, 40))
    arguments = {"x": x, "packed": packed, "absmax": absmax, "shape": (40, 256), "lora": lora}
    for change in changes:
        with pytest.raises(ValueError, match=message):
            nf4_linear(**change(arguments))


def with_lora(arguments, **changes):
    return arguments | {"lora": arguments["lora"]._replace(**changes)}


def test_no_gradient_is_asked_for_under_no_grad():
    x, packed, absmax, _ = problem(40, 256, 3)
    lora = adapter(256, 4, (40,))
    with torch.no_grad():
        assert not nf4_linear(x.requires_grad_(), packed, absmax, (40, 256), lora=lora).requires_grad
