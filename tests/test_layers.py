"""Norms, gated MLPs and adapted layers in fewer passes: values and gradients are transformers' and PEFT's (in bf16:
test_lora.py)."""

import functools
import gc
import weakref

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit
from test_lora import IDS, in_bf16, moved, relative_error, run

import grpo.layers
from grpo.layers import MLPS, NORMS, fuse_layers
from grpo.models import load_policy

LAYERS = {"llama": 7, "qwen2": 7, "mistral": 7, "phi3": 4}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", LAYERS)
def test_equals_transformers_and_peft(model_folder, architecture, checkpointing):
    settings = {"lora_rank": 3, "lora_alpha": 12, "gradient_checkpointing": checkpointing}
    policy = moved(load_policy(model_folder(architecture), fused=False, **settings))
    for m in policy.modules():  # a norm whose weights are ones would not tell
        if type(m) in NORMS:
            m.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    expected = run(policy)
    names = list(policy.state_dict())
    assert fuse_layers(policy) == (2 * LAYERS[architecture], 2 * 2 + 1, 2)
    actual = run(policy)
    for a, e in zip(actual, expected):
        assert relative_error(a, e) < 1e-5
    assert list(policy.state_dict()) == names
    assert fuse_layers(policy) == (0, 0, 0)  # twice is once


def test_load_policy_fuses(model_folder):
    assert fuse_layers(load_policy(model_folder(), lora_rank=3)) == (0, 0, 0)
    assert fuse_layers(load_policy(model_folder(), lora_rank=3, fused=False)) == (14, 5, 2)


def test_a_model_that_is_dropped_is_gone(model_folder):
    """Without the collector's help: on a GPU its weights would wait for it."""
    policy = load_policy(model_folder(), lora_rank=3)
    run(policy)
    alive = [weakref.ref(m) for m in policy.modules() if type(m).__mro__[1] in (*NORMS, *MLPS, Linear4bit)]
    assert len(alive) == 21
    gc.collect()
    gc.disable()
    try:
        del policy
        assert sum(ref() is not None for ref in alive) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("part", ["norms", "mlps"])
def test_each_part_is_in_use(model_folder, monkeypatch, part):
    """What is taken over is what runs: with a wrong formula the logits differ."""
    policy = moved(load_policy(model_folder(), lora_rank=3, fused=False))
    expected = run(policy)[0]
    fuse_layers(policy)
    if part == "norms":
        monkeypatch.setattr(grpo.layers.F, "rms_norm", lambda x, *_: x)
    else:
        monkeypatch.setattr(grpo.layers, "swiglu", lambda gate, up: gate * up)
    assert relative_error(run(policy)[0], expected) > 0.1


def test_norms_round_where_transformers_rounds(model_folder):
    """Before the weight, too: with a single rounding a quarter of the values were others."""
    policy = in_bf16(load_policy(model_folder(), lora_rank=3, fused=False))
    norm = next(m for m in policy.modules() if type(m) in NORMS)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(20, 30, 64, generator=generator).bfloat16()
    expected = norm(x)
    fuse_layers(policy)
    assert (norm(x) == expected).float().mean() > 0.98


def test_norms_in_fp32_stay_transformers(model_folder):
    """Some checkpoints keep them so beside activations in bf16, and what comes out then is fp32."""
    policy = in_bf16(load_policy(model_folder(), lora_rank=3, fused=False))
    norm = next(m for m in policy.modules() if type(m) in NORMS)
    norm.float()
    x = torch.randn(2, 3, 64).bfloat16()
    expected = norm(x)
    fuse_layers(policy)
    assert norm(x).dtype == torch.float32
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=0)


def test_another_activation_is_left_alone(model_folder):
    policy = load_policy(model_folder(), lora_rank=3, fused=False)
    mlp = next(m for m in policy.modules() if type(m) in MLPS)
    mlp.act_fn = torch.nn.GELU()
    expected = policy(input_ids=IDS).logits
    assert fuse_layers(policy).mlps == 1
    assert relative_error(policy(input_ids=IDS).logits, expected) < 1e-5


def test_gate_and_up_of_two_types(model_folder):
    """A checkpoint that leaves one of them in 16 bits, under autocast: torch takes the wider type."""
    policy = load_policy(model_folder(), lora_rank=3, fused=False)
    mlp = next(m for m in policy.modules() if type(m) in MLPS)
    x = torch.randn(2, 3, 64)
    fuse_layers(policy)
    expected = mlp(x)
    up = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: up(x).double()
    mlp.down_proj.forward = functools.partial(lambda down, x: down(x.float()), mlp.down_proj.forward)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
