"""The adapter in stacked buffers, against PEFT's own forward pass."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from grpo_rollout.vllm.lora_slots import Adapter, Slot, adapters, copy_adapter, layers_of, mismatched, pair_slots

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def peft_model(folder, **settings):
    base = AutoModelForCausalLM.from_pretrained(folder)
    defaults = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**(defaults | settings)))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return model


def unwritten_slots(base, rank: int, dtype=torch.float32) -> dict[str, Slot]:
    """A slot for every linear layer, filled with sevens."""
    linears = {n.removesuffix(".base_layer"): m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    return {
        name: Slot(torch.full((rank, m.in_features), 7.0).to(dtype), torch.full((m.out_features, rank), 7.0).to(dtype))
        for name, m in linears.items()
        if "lora" not in name
    }


def test_layers_of_merged_and_plain_modules():
    assert layers_of("model.layers.3.self_attn.qkv_proj", MERGED) == [
        f"model.layers.3.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj")
    ]
    assert layers_of("model.layers.3.mlp.down_proj", MERGED) == ["model.layers.3.mlp.down_proj"]
    assert layers_of("qkv_proj", MERGED) == ["q_proj", "k_proj", "v_proj"]
    # Phi-3's own layers are merged already, so the one slot is the whole layer's.
    assert layers_of("l.qkv_proj", {"qkv_proj": ["qkv_proj"]}) == ["l.qkv_proj"]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 4}, {"target_modules": ["k_proj"]}])
def test_slots_give_pefts_own_update(model_folder, settings):
    """x A^T B^T from the slots is what PEFT adds to the base layer: scaled once, however the scaling is defined."""
    model = peft_model(model_folder(), **settings)
    base = model.get_base_model()
    pairs = pair_slots(unwritten_slots(base, 8), adapters(base))
    copy_adapter(pairs)
    assert pairs
    for pair in pairs:
        layer = base.get_submodule(pair.name)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(
            x @ pair.slot.a.T @ pair.slot.b.T, layer(x) - layer.base_layer(x), rtol=1e-4, atol=1e-3
        )


def test_names_and_tensors_are_the_parameters(model_folder):
    base = peft_model(model_folder()).get_base_model()
    found = adapters(base)
    assert len(found) == 2 * 7
    source = found["model.layers.1.self_attn.v_proj"]
    layer = base.model.layers[1].self_attn.v_proj
    assert source.a is layer.lora_A["default"].weight
    assert source.b is layer.lora_B["default"].weight
    assert source.scaling == 3.0


def test_only_the_ranks_own_rows_are_written(model_folder):
    base = peft_model(model_folder()).get_base_model()
    slots = unwritten_slots(base, 8)
    copy_adapter(pair_slots(slots, adapters(base)))
    for slot in (slots[name] for name in adapters(base)):
        assert (slot.a[4:] == 7).all()
        assert (slot.b[:, 4:] == 7).all()
        assert not (slot.a[:4] == 7).any()


def test_rounding_happens_once_in_the_slots_precision():
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    slot = Slot(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(6, 2, dtype=torch.bfloat16))
    copy_adapter(pair_slots({"l": slot}, {"l": Adapter(a, b, 0.3)}))
    assert torch.equal(slot.a, a.bfloat16())
    assert torch.equal(slot.b, (b * 0.3).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_layers_that_differ_are_named(model_folder, dtype):
    base = peft_model(model_folder()).get_base_model()
    pairs = pair_slots(unwritten_slots(base, 8, dtype), adapters(base))
    assert mismatched(pairs) == [p.name for p in pairs]
    copy_adapter(pairs)
    assert mismatched(pairs) == []
    pairs[3].adapter.b.data += 0.5
    pairs[5].slot.a[0, 0] += 1
    assert mismatched(pairs) == [pairs[3].name, pairs[5].name]
    copy_adapter(pairs)
    assert mismatched(pairs) == []


def test_refusals(model_folder):
    base = peft_model(model_folder()).get_base_model()
    sources = adapters(base)
    slots = unwritten_slots(base, 8)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"no adapter slot for 1 layers, the first of them {name}.*--lora-targets"):
        pair_slots({k: v for k, v in slots.items() if k != name}, sources)
    with pytest.raises(ValueError, match="rank 4 in a slot of rank 2"):
        pair_slots(unwritten_slots(base, 2), sources)
    with pytest.raises(ValueError, match=f"{name}.*another model"):
        pair_slots({**slots, name: slots["model.layers.0.mlp.down_proj"]}, sources)
    with pytest.raises(ValueError, match="no LoRA adapter named"):
        adapters(AutoModelForCausalLM.from_pretrained(model_folder()))
    with pytest.raises(ValueError, match=r"DoRA.*--engine torch"):
        adapters(peft_model(model_folder(), use_dora=True))
    with pytest.raises(ValueError, match=r"bias.*--engine torch"):
        adapters(peft_model(model_folder(), lora_bias=True))


def test_a_second_adapter_is_not_mistaken_for_the_policys(model_folder):
    """A run that continues an adapter keeps its frozen copy, the reference, beside the policy."""
    model = peft_model(model_folder())
    model.add_adapter("reference", peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    base = model.get_base_model()
    assert {a.a.shape[0] for a in adapters(base).values()} == {4}
    assert {a.a.shape[0] for a in adapters(base, "reference").values()} == {2}
