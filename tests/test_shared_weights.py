"""One copy of the weights: nothing changes for the trainer, and the joined matrix is the layers' rows."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from grpo.policy.models import load_policy
from grpo_kernels.nf4.dequantize import NestedAbsmax, nf4_dequantize
from grpo_kernels.nf4.linear import nf4_linear
from grpo_rollout.vllm.shared_weights import Dense, Quantized, base_linears, dequantized, share


def linear4bit(rows: int, cols: int, *, nested: bool = True, seed: int = 0) -> bnb.nn.Linear4bit:
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(rows, cols) * (1 + seed), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )  # each seed has scales, and so an offset, of its own
    return layer.to("cpu")


def dense_of(layer: nn.Linear) -> torch.Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data


@pytest.mark.parametrize(
    ("rows", "cols", "nested", "stays_nested"),
    [
        ((50, 7, 7), 192, False, False),
        ((50, 7, 7), 192, True, False),  # second-level blocks of 256 scales straddle the seams
        ((128, 64, 70), 256, True, True),  # they end at the seams, and the last one is not full
        ((2, 1, 1), 16384, True, True),
        ((33,), 192, True, True),  # nothing to join
    ],
)
def test_joined_rows_are_the_layers_rows_bit_for_bit(rows, cols, nested, stays_nested):
    layers = [linear4bit(r, cols, nested=nested, seed=i) for i, r in enumerate(rows)]
    before = torch.cat([dense_of(layer) for layer in layers])
    x = torch.randn(5, cols)
    outputs = [layer(x) for layer in layers]
    [joined] = share(layers)
    assert isinstance(joined, Quantized)
    assert joined.shape == (sum(rows), cols)
    assert isinstance(joined.absmax, NestedAbsmax) == stays_nested
    assert torch.equal(dequantized(joined, torch.float32), before)
    for layer, output in zip(layers, outputs):
        assert torch.equal(layer(x), output)


@pytest.mark.parametrize("backend", ["fused", "dequantize", "torch"])
def test_nf4_linear_takes_the_joined_matrix(backend):
    """Three layers whose scales have means (offsets) of 1 : 2 : 3, as one product on their nested scales."""
    layers = [linear4bit(r, 256, seed=i) for i, r in enumerate((128, 64, 70))]
    dense = torch.cat([dense_of(layer) for layer in layers]).double()
    [joined] = share(layers)
    assert joined.absmax.offset.shape == joined.absmax.absmax.shape == (5,)
    assert joined.absmax.offset[[0, 1, 2, 3, 4]].unique().numel() == 3
    x = torch.randn(5, 256).half()
    actual = nf4_linear(x, joined.packed, joined.absmax, joined.shape, backend=backend).double()
    exact = x.double() @ dense.T
    for part_actual, part_exact in zip(actual.split([128, 64, 70], 1), exact.split([128, 64, 70], 1)):
        assert (part_actual - part_exact).norm() / part_exact.norm() < 1e-3
    if backend == "dequantize":
        rows = slice(100, 250)  # across both seams
        out = nf4_dequantize(joined.packed, joined.absmax, joined.shape, torch.float32, rows=rows)
        torch.testing.assert_close(out.double(), dense[rows], rtol=1e-6, atol=1e-7)


def test_the_trainers_gradient_goes_through_shared_nested_scales():
    layers = [linear4bit(64, 256, seed=i) for i in range(3)]
    x = torch.randn(3, 256, requires_grad=True)
    before = [torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in layers]
    [joined] = share(layers)
    for i, (layer, gradient) in enumerate(zip(layers, before)):
        assert torch.equal(torch.autograd.grad(layer(x).square().sum(), x)[0], gradient)
        state = layer.weight.quant_state
        assert state.nested
        assert state.absmax.data_ptr() == joined.absmax.quantized.data_ptr() + i * 256
        assert state.state2.absmax.data_ptr() == joined.absmax.absmax.data_ptr() + i * 4


def test_the_trainer_sees_the_same_storage():
    layers = [linear4bit(rows, 64, seed=rows) for rows in (6, 2, 2)]
    [joined] = share(layers)
    offset = 0
    for layer in layers:
        assert layer.weight.data_ptr() == joined.packed.data_ptr() + offset * 32  # 64 weights are 32 bytes
        assert layer.weight.quant_state.absmax.data_ptr() == joined.absmax.data_ptr() + offset * 4
        offset += layer.out_features
    joined.packed[0] ^= 0xFF
    assert not torch.equal(dense_of(layers[0])[0], dense_of(layers[1])[0])
    assert torch.equal(dense_of(layers[0]), dequantized(joined, torch.float32)[:6])


def test_shared_again_nothing_moves():
    layers = [linear4bit(4, 64), linear4bit(4, 64, seed=1)]
    share(layers)
    pointer = layers[1].weight.data_ptr()
    [alone] = share(layers[1:])
    assert alone.packed.data_ptr() == pointer == layers[1].weight.data_ptr()


def test_gradient_through_shared_weights_is_unchanged():
    layers = [linear4bit(8, 64, seed=s) for s in range(2)]
    x = torch.randn(3, 64, requires_grad=True)
    [before] = torch.autograd.grad(layers[1](x).square().sum(), x)
    share(layers)
    [after] = torch.autograd.grad(layers[1](x).square().sum(), x)
    assert torch.equal(before, after)


def test_kinds_that_cannot_be_joined_stay_apart_in_order():
    """A dynamic checkpoint: k in 16 bits between q and v in 4."""
    q, k, v = linear4bit(8, 64), nn.Linear(64, 4, bias=False), linear4bit(4, 64, seed=2)
    before = torch.cat([dense_of(m) for m in (q, k, v)])
    parts = share([q, k, v])
    assert [type(p) for p in parts] == [Quantized, Dense, Quantized]
    assert torch.equal(torch.cat([dequantized(p, torch.float32) for p in parts]), before)


def test_dense_neighbours_are_joined_too():
    a, b = nn.Linear(6, 3, bias=False), nn.Linear(6, 2, bias=False)
    before = torch.cat([a.weight.data, b.weight.data]).clone()
    [joined] = share([a, b])
    assert isinstance(joined, Dense)
    assert torch.equal(joined.weight, before)
    joined.weight[3] = 5.0
    assert (b.weight[0] == 5).all()


def test_a_matrix_that_ends_inside_a_block_is_not_joined():
    parts = share([linear4bit(3, 32), linear4bit(3, 32, seed=1)])  # 96 weights: a block and a half
    assert len(parts) == 2


def test_nested_and_plain_scales_meet():
    layers = [linear4bit(64, 256), linear4bit(64, 256, nested=False, seed=1)]
    before = torch.cat([dense_of(layer) for layer in layers])
    [joined] = share(layers)
    assert joined.absmax.dtype == torch.float32
    assert torch.equal(dequantized(joined, torch.float32), before)
    assert torch.equal(torch.cat([dense_of(layer) for layer in layers]), before)


def test_joining_adds_a_few_bytes_of_offsets():
    """A byte of scale for 64 weights, and for 256 of those a float of scale and one of offset."""
    layers = [linear4bit(64, 1024, seed=i) for i in range(3)]
    [joined] = share(layers)
    weights = 3 * 64 * 1024
    assert joined.packed.numel() == weights / 2
    sizes = [t.numel() * t.itemsize for t in (joined.absmax.quantized, joined.absmax.absmax, joined.absmax.offset)]
    assert sizes == [weights / 64, 4 * weights / 64 / 256, 4 * weights / 64 / 256]


def test_names_are_the_base_models(model_folder):
    model = load_policy(model_folder(), lora_rank=2)
    base = model.get_base_model()
    names = base_linears(base)
    assert "model.layers.0.self_attn.q_proj" in names
    assert "lm_head" in names
    assert len(names) == 2 * 7 + 1
    assert not any("lora" in n or "base_layer" in n for n in names)


def test_a_whole_policy_computes_what_it_did(model_folder):
    model = load_policy(model_folder(), lora_rank=2)
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    linears = base_linears(model.get_base_model())
    for layer in range(2):
        for group in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            assert len(share([linears[f"model.layers.{layer}.{m}"] for m in group])) == 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
