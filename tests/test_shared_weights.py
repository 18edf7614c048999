"""One copy of the weights: nothing changes for the trainer, and the merged matrix holds the layers' rows."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from grpo.errors import UserError
from grpo.policy.models import Policy, load_policy
from grpo_kernels.nf4.dequantize import NestedAbsmax, nf4_dequantize
from grpo_kernels.nf4.linear import nf4_linear
from grpo_rollout.vllm.shared_weights import Dense, MergedLinears, Quantized, base_linears, dequantize, share


def linear4bit(rows: int, cols: int, *, nested: bool = True, seed: int = 0) -> bnb.nn.Linear4bit:
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(rows, cols) * (1 + seed), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )  # every seed has other scales, and so another offset
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
        ((33,), 192, True, True),  # nothing to merge
    ],
)
def test_merged_rows_are_the_layers_rows_to_the_bit(rows, cols, nested, stays_nested):
    layers = [linear4bit(r, cols, nested=nested, seed=i) for i, r in enumerate(rows)]
    before = torch.cat([dense_of(layer) for layer in layers])
    x = torch.randn(5, cols)
    outputs = [layer(x) for layer in layers]
    [merged] = share(layers)
    assert isinstance(merged, Quantized)
    assert merged.shape == (sum(rows), cols)
    assert isinstance(merged.absmax, NestedAbsmax) == stays_nested
    assert torch.equal(dequantize(merged, torch.float32), before)
    for layer, output in zip(layers, outputs):
        assert torch.equal(layer(x), output)


@pytest.mark.parametrize("backend", ["fused", "dequantize", "torch"])
def test_nf4_linear_takes_the_merged_matrix(backend):
    """Three layers whose scales have means (offsets) in the ratio 1 : 2 : 3, as one product with nested scales."""
    layers = [linear4bit(r, 256, seed=i) for i, r in enumerate((128, 64, 70))]
    dense = torch.cat([dense_of(layer) for layer in layers]).double()
    [merged] = share(layers)
    assert merged.absmax.offset.shape == merged.absmax.absmax.shape == (5,)
    assert merged.absmax.offset[[0, 1, 2, 3, 4]].unique().numel() == 3
    x = torch.randn(5, 256).half()
    actual = nf4_linear(x, merged.packed, merged.absmax, merged.shape, backend=backend).double()
    exact = x.double() @ dense.T
    for part_actual, part_exact in zip(actual.split([128, 64, 70], 1), exact.split([128, 64, 70], 1)):
        assert (part_actual - part_exact).norm() / part_exact.norm() < 1e-3
    if backend == "dequantize":
        rows = slice(100, 250)  # across both seams
        out = nf4_dequantize(merged.packed, merged.absmax, merged.shape, torch.float32, rows=rows)
        torch.testing.assert_close(out.double(), dense[rows], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (8, 64)])  # nested scales, and scales that are expanded
def test_the_trainers_gradient_goes_through_the_shared_weights(rows, cols):
    layers = [linear4bit(rows, cols, seed=i) for i in range(3)]
    x = torch.randn(3, cols, requires_grad=True)
    before = [torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in layers]
    [merged] = share(layers)
    nested = isinstance(merged.absmax, NestedAbsmax)
    assert nested == (cols == 256)
    for i, (layer, gradient) in enumerate(zip(layers, before)):
        assert torch.equal(torch.autograd.grad(layer(x).square().sum(), x)[0], gradient)
        state = layer.weight.quant_state
        assert state.nested == nested
        if nested:
            assert state.absmax.data_ptr() == merged.absmax.quantized.data_ptr() + i * 256
            assert state.state2.absmax.data_ptr() == merged.absmax.absmax.data_ptr() + i * 4


def test_the_trainer_sees_the_same_storage():
    layers = [linear4bit(rows, 64, seed=rows) for rows in (6, 2, 2)]
    [merged] = share(layers)
    offset = 0
    for layer in layers:
        assert layer.weight.data_ptr() == merged.packed.data_ptr() + offset * 32  # 64 weights are 32 bytes
        assert layer.weight.quant_state.absmax.data_ptr() == merged.absmax.data_ptr() + offset * 4
        offset += layer.out_features
    merged.packed[0] ^= 0xFF
    assert not torch.equal(dense_of(layers[0])[0], dense_of(layers[1])[0])
    assert torch.equal(dense_of(layers[0]), dequantize(merged, torch.float32)[:6])


def test_shared_again_nothing_moves():
    layers = [linear4bit(4, 64), linear4bit(4, 64, seed=1)]
    share(layers)
    pointer = layers[1].weight.data_ptr()
    [alone] = share(layers[1:])
    assert alone.packed.data_ptr() == pointer == layers[1].weight.data_ptr()


def test_kinds_that_cannot_be_merged_stay_apart_in_order():
    """A dynamic checkpoint: k in 16 bits between q and v in 4."""
    q, k, v = linear4bit(8, 64), nn.Linear(64, 4, bias=False), linear4bit(4, 64, seed=2)
    before = torch.cat([dense_of(m) for m in (q, k, v)])
    parts = share([q, k, v])
    assert [type(p) for p in parts] == [Quantized, Dense, Quantized]
    assert torch.equal(torch.cat([dequantize(p, torch.float32) for p in parts]), before)


def test_dense_neighbours_are_merged_too():
    a, b = nn.Linear(6, 3, bias=False), nn.Linear(6, 2, bias=False)
    before = torch.cat([a.weight.data, b.weight.data]).clone()
    [merged] = share([a, b])
    assert isinstance(merged, Dense)
    assert torch.equal(merged.weight, before)
    merged.weight[3] = 5.0
    assert (b.weight[0] == 5).all()


def test_a_matrix_that_ends_inside_a_block_is_not_merged():
    parts = share([linear4bit(3, 32), linear4bit(3, 32, seed=1)])  # 96 weights: a block and a half
    assert len(parts) == 2


def test_nested_and_plain_scales_meet():
    layers = [linear4bit(64, 256), linear4bit(64, 256, nested=False, seed=1)]
    before = torch.cat([dense_of(layer) for layer in layers])
    [merged] = share(layers)
    assert merged.absmax.dtype == torch.float32
    assert torch.equal(dequantize(merged, torch.float32), before)
    assert torch.equal(torch.cat([dense_of(layer) for layer in layers]), before)


def test_merging_adds_a_few_bytes_of_offsets():
    """One byte of scale per 64 weights, and per 256 of those a float of scale and one of offset."""
    layers = [linear4bit(64, 1024, seed=i) for i in range(3)]
    [merged] = share(layers)
    weights = 3 * 64 * 1024
    assert merged.packed.numel() == weights / 2
    sizes = [t.numel() * t.itemsize for t in (merged.absmax.quantized, merged.absmax.absmax, merged.absmax.offset)]
    assert sizes == [weights / 64, 4 * weights / 64 / 256, 4 * weights / 64 / 256]


def test_names_are_the_base_models(model_folder):
    model = load_policy(Policy(model_folder(), lora_rank=2))
    base = model.get_base_model()
    names = base_linears(base)
    assert "model.layers.0.self_attn.q_proj" in names
    assert "lm_head" in names
    assert len(names) == 2 * 7 + 1
    assert not any("lora" in n or "base_layer" in n for n in names)


def test_a_whole_policy_computes_what_it_did(model_folder):
    model = load_policy(Policy(model_folder("qwen2"), lora_rank=2))  # biases on q, k and v
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    linears = base_linears(model.get_base_model())
    merged = MergedLinears(linears)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert [w.shape for w in merged.quantized()] == [(128, 64), (64, 64), (256, 64), (64, 128)] * 2
    assert [w.shape for w in merged.quantized("up_proj")] == [(256, 64)] * 2

    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    [weight], bias = merged.take(names)
    assert weight.packed.data_ptr() == linears[names[0]].weight.data_ptr()
    assert torch.equal(bias, torch.cat([linears[name].bias for name in names]))
    [alone], no_bias = merged.take(["model.layers.1.mlp.down_proj"])
    assert alone.shape == (64, 128)
    assert no_bias is None
    assert merged.taken == {*names, "model.layers.1.mlp.down_proj"}
    with pytest.raises(UserError, match=r"a layer model\.layers\.0\.mlp\.router .*--engine torch"):
        merged.take(["model.layers.0.mlp.router"])
