"""Norms, gated MLPs and adapted layers in fewer passes: values and gradients are transformers' and PEFT's (in bf16:
test_lora.py)."""

import functools
import gc
import importlib
import inspect
import weakref

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit
from test_lora import IDS, in_bf16, moved, relative_error, run

import grpo.policy.layers
import grpo.policy.lora
from grpo.policy.layers import MLPS, NORMS, fuse_layers
from grpo.policy.lora import handed_out
from grpo.policy.models import load_policy

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
    assert fuse_layers(policy) == (2 * LAYERS[architecture], 2 * 2 + 1, 2, 2)
    actual = run(policy)
    for a, e in zip(actual, expected):
        assert relative_error(a, e) < 1e-5
    assert list(policy.state_dict()) == names
    assert fuse_layers(policy) == (0, 0, 0, 0)  # twice is once


def test_load_policy_fuses(model_folder):
    assert fuse_layers(load_policy(model_folder(), lora_rank=3)) == (0, 0, 0, 0)
    assert fuse_layers(load_policy(model_folder(), lora_rank=3, fused=False)) == (14, 5, 2, 2)


def test_no_other_model_sees_it(model_folder):
    """The rotary embedding is another function in the taken-over attention alone."""
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    theirs = module.apply_rotary_pos_emb
    fuse_layers(load_policy(model_folder(), lora_rank=3))
    assert module.apply_rotary_pos_emb is theirs
    assert inspect.unwrap(module.LlamaAttention.forward).__globals__["apply_rotary_pos_emb"] is theirs

    class Other(torch.nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"Other.forward calls no apply_rotary_pos_emb .* pass fused=False"):
        grpo.policy.layers._with_rope(Other)


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


@pytest.mark.parametrize("part", ["norms", "rope", "mlps"])
def test_each_part_is_in_use(model_folder, monkeypatch, part):
    """What is taken over is what runs: with a wrong formula the logits differ."""
    policy = moved(load_policy(model_folder(), lora_rank=3, fused=False))
    expected = run(policy)[0]
    fuse_layers(policy)
    if part == "norms":
        monkeypatch.setattr(grpo.policy.layers.F, "rms_norm", lambda x, *_: x)
    elif part == "rope":
        monkeypatch.setattr(grpo.policy.layers, "rope", lambda q, k, *_: (q, k))
    else:
        monkeypatch.setattr(grpo.policy.layers, "swiglu", lambda gate, up: gate * up)
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

    class InDouble(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).double()

    policy = load_policy(model_folder(), lora_rank=3, fused=False)
    mlp = next(m for m in policy.modules() if type(m) in MLPS)
    x = torch.randn(2, 3, 64)
    fuse_layers(policy)
    expected = mlp(x)
    mlp.up_proj = InDouble(mlp.up_proj)
    mlp.down_proj.register_forward_pre_hook(lambda down, x: x[0].float())
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


def counted(monkeypatch):
    """How many products each autograd function made in the forward passes to come."""
    counts = []
    for owner, name in ((grpo.policy.layers._GatedMLP, "mlp"), (grpo.policy.lora._LoraLinears, "linears")):
        real = owner.forward

        def forward(ctx, x, layers, *rest, real=real, name=name):
            counts.append((name, len(layers)))
            return real(ctx, x, layers, *rest)

        monkeypatch.setattr(owner, "forward", staticmethod(forward))
    return counts


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("architecture", "once"),
    [
        ("llama", [("linears", 3), ("linears", 1), ("mlp", 3)]),
        ("qwen2", [("linears", 3), ("linears", 1), ("mlp", 3)]),
        ("phi3", [("linears", 1), ("linears", 1), ("mlp", 2)]),
    ],
)
def test_products_of_one_input_are_one_function(model_folder, monkeypatch, architecture, once, grad):
    policy = load_policy(model_folder(architecture), lora_rank=3)
    counts = counted(monkeypatch)
    with torch.set_grad_enabled(grad):
        policy(input_ids=IDS)
    assert counts == once * 2


@pytest.mark.parametrize("targets", ["q_proj,v_proj,down_proj", "k_proj,gate_proj", "o_proj,gate_proj,up_proj"])
def test_where_not_all_of_them_are_adapted(model_folder, monkeypatch, targets):
    policy = moved(load_policy(model_folder(), lora_rank=3, lora_targets=targets, fused=False))
    expected = run(policy)
    fuse_layers(policy)
    counts = counted(monkeypatch)
    for a, e in zip(run(policy), expected):
        assert relative_error(a, e) < 1e-5
    assert counts == [("linears", 1)] * len(targets.split(",")) * 2


def test_what_was_handed_out_serves_one_input_once(model_folder):
    """And an error on the way leaves nothing behind."""
    policy = moved(load_policy(model_folder(), lora_rank=3))
    layers = [
        m for n, m in policy.named_modules() if n.endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"))
    ]
    x = torch.randn(2, 3, 64)
    expected = [layer(x) for layer in layers]
    wrong = [torch.zeros_like(y) for y in expected]
    with handed_out(layers, x, wrong):
        assert layers[0](x) is wrong[0]
        assert torch.equal(layers[0](x), expected[0])
        assert torch.equal(layers[1](x.clone()), expected[1])
    with pytest.raises(ZeroDivisionError), handed_out(layers, x, wrong):
        raise ZeroDivisionError
    assert [torch.equal(layer(x), y) for layer, y in zip(layers, expected)] == [True, True]


def test_hooks_within_an_mlp_run(model_folder):
    policy = load_policy(model_folder(), lora_rank=3)
    seen = []
    mlp = policy.get_base_model().model.layers[1].mlp
    mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    policy(input_ids=IDS)
    assert seen == [1]


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_gradients_in_float64(model_folder, architecture):
    """By finite differences, of an MLP and an attention in their input, of which several products are made.

    Each backward pass with a forward pass of its own: what was kept for it, it writes over."""
    policy = moved(load_policy(model_folder(architecture), lora_rank=3, lora_alpha=12)).double()
    mlp = policy.get_base_model().model.layers[0].mlp
    attention = policy.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    turn = torch.ones(1, 3, 16, dtype=torch.float64), torch.zeros(1, 3, 16, dtype=torch.float64)
    for function in (mlp, lambda x: attention(hidden_states=x, position_embeddings=turn, attention_mask=None)[0]):
        again = functools.partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)
        assert torch.autograd.gradcheck(again, x, fast_mode=True)


def test_a_second_backward_pass_of_an_mlp_is_refused(model_folder):
    policy = moved(load_policy(model_folder(), lora_rank=3))
    x = torch.randn(1, 3, 64, requires_grad=True)
    y = policy.get_base_model().model.layers[0].mlp(x).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
