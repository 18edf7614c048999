"""Norms, gated MLPs, attention and adapted layers in fewer passes: values and gradients are transformers' and PEFT's
(in bf16: test_lora.py)."""

import functools

import pytest
import torch
from test_lora import IDS, assert_close, in_bf16, load, relative_error, run

import grpo.policy.layers
import grpo.policy.lora
from grpo.policy.models import Policy, load_policy
from grpo.policy.patches import MLPS, NORMS, fuse_layers

LINEARS = {"llama": 7, "qwen2": 7, "mistral": 7, "phi3": 4}


@pytest.mark.parametrize("architecture", LINEARS)
def test_equals_transformers_and_peft(model_folder, architecture):
    policy = load(model_folder(architecture), fused=False, seed=2)
    for m in policy.modules():  # a norm whose weights are ones would not tell
        if type(m) in NORMS:
            m.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    expected = run(policy)
    assert fuse_layers(policy) == (2 * LINEARS[architecture], 2 * 2 + 1, 2, 2)
    assert_close(run(policy), expected)
    assert fuse_layers(policy) == (0, 0, 0, 0)  # twice is once


def test_norms_round_where_transformers_rounds(model_folder):
    """Before the weight, too: with a single rounding a quarter of the values were others."""
    policy = in_bf16(load(model_folder(), fused=False))
    norm = next(m for m in policy.modules() if type(m) in NORMS)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(20, 30, 64, generator=generator).bfloat16()
    expected = norm(x)
    fuse_layers(policy)
    assert (norm(x) == expected).float().mean() > 0.98
    norm.float()  # some checkpoints keep norms in fp32 beside activations in bf16, and the result is fp32
    in_fp32 = norm(x)
    assert in_fp32.dtype == torch.float32
    torch.testing.assert_close(in_fp32, type(norm).__mro__[1].forward(norm, x), rtol=0, atol=0)


def test_another_activation_is_left_alone(model_folder):
    policy = load(model_folder(), fused=False)
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

    mlp = load_policy(Policy(model_folder(), lora_rank=3)).get_base_model().model.layers[0].mlp
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = mlp(x)
    mlp.up_proj = InDouble(mlp.up_proj)
    mlp.down_proj.register_forward_pre_hook(lambda down, x: x[0].float())
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


def count_products(monkeypatch):
    """A list that receives, for each call of an autograd function from now on, its name and its number of products."""
    counts = []
    for owner, name in ((grpo.policy.layers._GatedMLP, "mlp"), (grpo.policy.lora._LoraLinears, "linears")):
        real = owner.forward

        def forward(ctx, x, layers, *rest, real=real, name=name):
            counts.append((name, len(layers)))
            return real(ctx, x, layers, *rest)

        monkeypatch.setattr(owner, "forward", staticmethod(forward))
    return counts


@pytest.mark.parametrize(
    ("architecture", "once"),
    [
        ("llama", [("linears", 3), ("linears", 1), ("mlp", 3)]),
        ("qwen2", [("linears", 3), ("linears", 1), ("mlp", 3)]),
        ("phi3", [("linears", 1), ("linears", 1), ("mlp", 2)]),
    ],
)
def test_products_of_one_input_are_one_function(model_folder, monkeypatch, architecture, once):
    policy = load(model_folder(architecture))
    counts = count_products(monkeypatch)
    for grad in (False, True):
        counts.clear()
        with torch.set_grad_enabled(grad):
            policy(input_ids=IDS)
        assert counts == once * 2


@pytest.mark.parametrize("targets", ["q_proj,v_proj,down_proj", "k_proj,gate_proj", "o_proj,gate_proj,up_proj"])
def test_where_not_all_of_them_are_adapted(model_folder, monkeypatch, targets):
    policy = load(model_folder(), lora_targets=targets, fused=False)
    expected = run(policy)
    fuse_layers(policy)
    counts = count_products(monkeypatch)
    assert_close(run(policy), expected)
    assert counts == [("linears", 1)] * len(targets.split(",")) * 2


def test_hooks_within_an_mlp_run(model_folder):
    policy = load(model_folder())
    seen = []
    mlp = policy.get_base_model().model.layers[1].mlp
    mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    policy(input_ids=IDS)
    assert seen == [1]


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_gradients_in_float64(model_folder, architecture):
    """By finite differences: of an MLP and an attention in their input, of which several products are made.

    Each backward pass follows a forward pass of its own, since it overwrites what that kept."""
    policy = load(model_folder(architecture)).double()
    mlp = policy.get_base_model().model.layers[0].mlp
    attention = policy.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    angles = torch.ones(1, 3, 16, dtype=torch.float64), torch.zeros(1, 3, 16, dtype=torch.float64)
    for function in (mlp, lambda x: attention(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]):
        again = functools.partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)
        assert torch.autograd.gradcheck(again, x, fast_mode=True)


def test_a_second_backward_pass_of_an_mlp_is_refused(model_folder):
    x = torch.randn(1, 3, 64, requires_grad=True)
    y = load(model_folder()).get_base_model().model.layers[0].mlp(x).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
