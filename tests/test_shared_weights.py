"""One copy of the weights: nothing changes for the trainer, and the joined matrix is the layers' rows."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from grpo.models import load_policy
from grpo_rollout.shared_weights import Dense, Quantized, base_linears, dequantized, share


def linear4bit(rows: int, cols: int, *, nested: bool = True, seed: int = 0) -> bnb.nn.Linear4bit:
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(rows, cols), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    return layer.to("cpu")


def dense_of(layer: nn.Linear) -> torch.Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data


@pytest.mark.parametrize("nested", [True, False])
def test_joined_rows_are_the_layers_rows_bit_for_bit(nested):
    """Doubly quantised too, whose second-level blocks (256 scales) straddle the seams."""
    layers = [linear4bit(rows, 192, nested=nested, seed=rows) for rows in (50, 7, 7)]
    before = torch.cat([dense_of(layer) for layer in layers])
    x = torch.randn(5, 192)
    outputs = [layer(x) for layer in layers]
    [joined] = share(layers)
    assert isinstance(joined, Quantized)
    assert joined.shape == (64, 192)
    assert torch.equal(dequantized(joined, torch.float32), before)
    for layer, output in zip(layers, outputs):
        assert torch.equal(layer(x), output)


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


def test_scales_cost_four_bytes_a_block():
    [joined] = share([linear4bit(64, 64)])
    assert joined.packed.numel() == 64 * 64 / 2
    assert joined.absmax.numel() == 64
    assert joined.absmax.dtype == torch.float32


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
