"""The adapted NF4 layer in one step against PEFT's own forward: values, gradients, and everything it leaves to PEFT.

The functions of this file serve tests/gpu/test_lora.py too."""

import importlib.metadata

import pytest
import torch
from conftest import write_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit

import grpo.policy.lora
from grpo.policy.layers import fuse_layers
from grpo.policy.lora import fuse_adapters
from grpo.policy.models import load_policy, reference_policy, trainable_parameters
from grpo_rollout.engine import Sampling
from grpo_rollout.torch.engine import TorchEngine

IDS = torch.tensor([[1, 9, 10, 11, 30, 12], [1, 20, 21, 22, 23, 2]])


def moved(policy, seed: int = 1):
    """An adapter that matters: B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable_parameters(policy):
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return policy


def run(policy, ids=IDS):
    """Logits, and the gradient of a function of them in every trainable parameter."""
    logits = policy(input_ids=ids.to(next(policy.parameters()).device)).logits
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape).to(logits.device)
    (logits.float().log_softmax(-1) * weights).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in trainable_parameters(policy)])
    policy.zero_grad()
    return logits.detach(), gradients


def relative_error(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_equals_peft(model_folder, architecture, checkpointing):
    folder = model_folder(architecture)
    policy = moved(load_policy(folder, lora_rank=3, lora_alpha=12, gradient_checkpointing=checkpointing, fused=False))
    expected = run(policy)
    assert fuse_adapters(policy) == sum(isinstance(m, Linear4bit) for m in policy.modules())
    actual = run(policy)
    for a, e in zip(actual, expected):
        assert relative_error(a, e) < 1e-5
    with torch.no_grad():  # and the adapter matters
        for p in trainable_parameters(policy):
            p.zero_()
    assert relative_error(run(policy)[0], expected[0]) > 0.1


def in_bf16(policy):
    """As on a GPU: all but the adapter."""
    for m in policy.modules():
        if isinstance(m, Linear4bit):
            m.get_base_layer().compute_dtype = m.get_base_layer().weight.quant_state.dtype = torch.bfloat16
    for p in policy.parameters():
        if p.is_floating_point() and not p.requires_grad:
            p.data = p.data.bfloat16()
    return policy


@pytest.mark.parametrize("fuse", [fuse_adapters, fuse_layers])
def test_bf16_is_no_worse(tmp_path, fuse):
    """Errors against fp32, of logits and gradients, summed over six models."""
    theirs, ours = torch.zeros(2), torch.zeros(2)
    for seed in range(6):
        folder = write_model(tmp_path / str(seed), seed=seed, hidden_size=128, intermediate_size=256, head_dim=32,
                             initializer_range=0.06)  # fmt: skip
        policy = moved(load_policy(str(folder), lora_rank=8, lora_alpha=12, fused=False), seed)
        exact = run(policy)
        in_bf16(policy)
        for total in (theirs, ours):
            with torch.autocast("cpu", torch.bfloat16):
                total += torch.tensor([relative_error(a, e) for a, e in zip(run(policy), exact)])
            if total is theirs:
                fuse(policy)
    assert (ours < 1.1 * theirs).all()
    assert (ours > 1e-2).all()  # it was bf16


def test_the_reference_is_the_base_model_or_the_frozen_adapter(model_folder, tmp_path):
    policy = moved(load_policy(model_folder(), lora_rank=4, fused=False))
    with reference_policy(policy):
        base = policy(input_ids=IDS).logits
    policy.save_pretrained(tmp_path)
    trained = policy(input_ids=IDS).logits
    fuse_adapters(policy)
    with reference_policy(policy):
        torch.testing.assert_close(policy(input_ids=IDS).logits, base, rtol=0, atol=0)
    continued = load_policy(model_folder(), lora_rank=4, adapter=tmp_path, fused=False)
    fuse_adapters(continued)
    moved(continued, seed=2)
    with reference_policy(continued):
        torch.testing.assert_close(continued(input_ids=IDS).logits, trained)
    assert (continued(input_ids=IDS).logits - trained).abs().max() > 0.1


def test_what_it_does_not_do_is_left_to_peft(model_folder, monkeypatch):
    policy = moved(load_policy(model_folder(), lora_rank=4, fused=False))
    layer = next(m for m in policy.modules() if isinstance(m, Linear4bit))
    taken = []
    plain = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, *a: (self is layer and taken.append(1)) or plain(self, *a))
    fuse_adapters(policy)
    expected = policy(input_ids=IDS).logits
    assert not taken
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    policy(input_ids=IDS)
    assert taken == [1]
    layer.lora_dropout["default"] = torch.nn.Identity()
    policy.add_adapter("second", policy.peft_config["default"])
    policy.base_model.set_adapter(["default", "second"])  # the second's B is zero
    torch.testing.assert_close(policy(input_ids=IDS).logits, expected)
    assert taken == [1, 1]


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_halves_of_an_adapter_get_no_gradient(model_folder, frozen):
    policy = moved(load_policy(model_folder(), lora_rank=3))
    gradients = {}
    for freeze in (False, True):
        for n, p in policy.named_parameters():
            p.requires_grad_("lora_" in n and not (freeze and frozen in n))
        policy(input_ids=IDS).logits.square().sum().backward()
        gradients[freeze] = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        for p in policy.parameters():
            p.grad = None
    assert all(frozen not in n for n in gradients[True])
    assert len(gradients[True]) == len(gradients[False]) / 2
    assert all(torch.equal(g, gradients[False][n]) for n, g in gradients[True].items())


def test_a_biased_adapter_is_left_to_peft(model_folder):
    config = LoraConfig(r=2, target_modules=["up_proj"], lora_bias=True, task_type="CAUSAL_LM")
    policy = moved(get_peft_model(load_policy(model_folder(), lora_rank=1, fused=False).unload(), config))
    expected = policy(input_ids=IDS).logits
    assert fuse_adapters(policy) == 2
    torch.testing.assert_close(policy(input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_few_rows_without_gradient(model_folder, monkeypatch):
    """What a decoding step on a GPU takes, by its torch reference here."""

    def read_once(x, layers, **_):
        return [grpo.policy.lora._read_once(x.flatten(0, 1), layer).unflatten(0, x.shape[:2]) for layer in layers]

    monkeypatch.setattr(grpo.policy.lora, "lora_products", read_once)
    for architecture in ("llama", "qwen2"):
        policy = moved(load_policy(model_folder(architecture), lora_rank=4, lora_alpha=12, fused=False))
        with torch.no_grad():
            expected = policy(input_ids=IDS).logits
            fuse_adapters(policy)
            assert relative_error(policy(input_ids=IDS).logits, expected) < 1e-5


@pytest.mark.parametrize("fuse", [fuse_adapters, fuse_layers])
def test_neighbours_of_other_ranks_and_frozen_parts(model_folder, fuse):
    """The As of q, k, v and of gate, up are multiplied as one, whatever their ranks, and what of them is frozen."""
    policy = moved(load_policy(model_folder(), lora_rank=4, lora_alpha=12, fused=False))
    generator = torch.Generator().manual_seed(2)
    for name, module in policy.named_modules():
        if name.endswith(("k_proj", "up_proj")):
            rank = 3 if name.endswith("k_proj") else 7
            for part, shape in (
                (module.lora_A, (rank, module.in_features)),
                (module.lora_B, (module.out_features, rank)),
            ):
                part["default"].weight = torch.nn.Parameter(0.2 * torch.randn(shape, generator=generator))
        if name.endswith("v_proj"):
            module.lora_A["default"].weight.requires_grad_(False)
        if name.endswith("gate_proj"):
            module.lora_B["default"].weight.requires_grad_(False)
    expected = run(policy)
    fuse(policy)
    for a, e in zip(run(policy), expected):
        assert relative_error(a, e) < 1e-5


def test_decoding_is_what_inference_mode_says(model_folder, monkeypatch):
    """Where the kernel applies it decodes, and nothing else: a check of the sampler by no_grad must not go its way."""
    ways = []
    for name in ("_read_once", "products"):
        real = getattr(grpo.policy.lora, name)
        monkeypatch.setattr(
            grpo.policy.lora, name, lambda *a, name=name, real=real, **k: ways.append(name) or real(*a, **k)
        )
    policy = moved(load_policy(model_folder(), lora_rank=4))
    with torch.no_grad():
        expected = policy(input_ids=IDS).logits
        assert set(ways) == {"products"}
    for backend, way in (("fused", {"_read_once"}), ("dequantize", set())):
        ways.clear()
        monkeypatch.setattr(grpo.policy.lora, "choose_backend", lambda *a, backend=backend: backend)
        with torch.inference_mode():
            torch.testing.assert_close(policy(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert set(ways) == way


def test_the_torch_engines_dequantized_copy(model_folder):
    """The engine's dense twin of the policy has other base layers, which PEFT's forward takes."""
    policy = moved(load_policy(model_folder(), lora_rank=4, fused=False))
    tokens = []
    for _ in range(2):
        engine = TorchEngine(policy, eos_ids=[2, 3], dequantize=True)
        engine.sync(policy)
        tokens.append([c.token_ids for c in engine.generate([IDS[0].tolist()], 4, Sampling(max_tokens=8), seed=0)])
        fuse_adapters(policy)
    assert tokens[0] == tokens[1]


def test_no_rows(model_folder):
    policy = load_policy(model_folder(), lora_rank=4, fused=False)
    fuse_adapters(policy)
    layer = next(m for m in policy.modules() if isinstance(m, Linear4bit))
    assert layer(torch.empty(0, 3, layer.in_features)).shape == (0, 3, layer.out_features)


def test_names_and_files_stay_pefts(model_folder):
    policy = load_policy(model_folder(), lora_rank=4, fused=False)
    before = {n: t.clone() for n, t in policy.state_dict().items()}
    fuse_adapters(policy)
    after = policy.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_another_peft_is_refused(model_folder, monkeypatch):
    policy = load_policy(model_folder(), lora_rank=4, fused=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(ValueError, match=r"written for peft 0\.21\.\* and found 0\.99\.0"):
        fuse_adapters(policy)
