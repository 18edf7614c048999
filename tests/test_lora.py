"""The adapted NF4 layer against PEFT's own forward: values and gradients, in fp32 and bf16.

The functions of this file serve the other tests of the policy too."""

import pytest
import torch
from conftest import write_model
from peft.tuners.lora.bnb import Linear4bit

import grpo.policy.lora
import grpo.policy.patches
from grpo.policy.models import Policy, load_policy, reference_policy, trainable_parameters
from grpo.policy.patches import fuse_adapters, fuse_layers
from grpo.sampler import Sampling
from grpo_rollout.torch.engine import TorchEngine

IDS = torch.tensor([[1, 9, 10, 11, 30, 12], [1, 20, 21, 22, 23, 2]])


def load(folder, rank=3, alpha=12, *, kept_layers=None, offload=False, fused=True, device="cpu", seed=0, **flags):
    """A policy whose adapter matters (a fresh one's B is zero)."""
    policy = Policy(str(folder), lora_rank=rank, lora_alpha=alpha, **flags)
    return moved(load_policy(policy, kept_layers=kept_layers, offload=offload, fused=fused, device=device), 1 + seed)


def moved(policy, seed: int = 1):
    """The policy with other adapter weights."""
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


def assert_close(actual, expected, bound: float = 1e-5) -> None:
    """Logits and gradients of `run`."""
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < bound


def in_bf16(policy):
    """As on a GPU: all but the adapter."""
    for m in policy.modules():
        if isinstance(m, Linear4bit):
            m.get_base_layer().compute_dtype = m.get_base_layer().weight.quant_state.dtype = torch.bfloat16
    for p in policy.parameters():
        if p.is_floating_point() and not p.requires_grad:
            p.data = p.data.bfloat16()
    return policy


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_equals_peft(model_folder, architecture):
    policy = load(model_folder(architecture), fused=False)
    expected = run(policy)
    assert fuse_adapters(policy) == sum(isinstance(m, Linear4bit) for m in policy.modules())
    assert_close(run(policy), expected)
    with torch.no_grad():  # and the adapter matters
        for p in trainable_parameters(policy):
            p.zero_()
    assert relative_error(run(policy)[0], expected[0]) > 0.1


def test_bf16_is_no_worse(tmp_path):
    """Errors against fp32, of logits and gradients, summed over six models: PEFT's, with our adapters, and with all."""
    errors = torch.zeros(3, 2)
    for seed in range(6):
        folder = write_model(tmp_path / str(seed), seed=seed, hidden_size=128, intermediate_size=256, head_dim=32,
                             initializer_range=0.06)  # fmt: skip
        policy = moved(load(folder, 8, 12, fused=False), seed)
        exact = run(policy)
        in_bf16(policy)
        for total, patch_next in zip(errors, (fuse_adapters, fuse_layers, lambda _: None)):
            with torch.autocast("cpu", torch.bfloat16):
                total += torch.tensor([relative_error(a, e) for a, e in zip(run(policy), exact)])
            patch_next(policy)
    theirs, *ours = errors
    for ours_ in ours:
        assert (ours_ < 1.1 * theirs).all()
        assert (ours_ > 1e-2).all()  # it was bf16


def test_the_reference_is_the_base_model_or_the_frozen_adapter(model_folder, tmp_path):
    policy = load(model_folder(), fused=False)
    with reference_policy(policy):
        base = policy(input_ids=IDS).logits
    policy.save_pretrained(tmp_path)
    trained = policy(input_ids=IDS).logits
    fuse_adapters(policy)
    with reference_policy(policy):
        torch.testing.assert_close(policy(input_ids=IDS).logits, base, rtol=0, atol=0)
    continued = moved(load_policy(Policy(model_folder(), adapter=tmp_path)), seed=2)
    with reference_policy(continued):
        torch.testing.assert_close(continued(input_ids=IDS).logits, trained)
    assert (continued(input_ids=IDS).logits - trained).abs().max() > 0.1


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_halves_of_an_adapter_get_no_gradient(model_folder, frozen):
    policy = load(model_folder(), 3, 3)
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


def test_layers_of_other_ranks_and_frozen_parts(model_folder):
    """The As of q, k, v and of gate, up are multiplied as one, whatever their ranks, and whichever parts are frozen."""
    policy = load(model_folder(), fused=False)
    generator = torch.Generator().manual_seed(2)
    for name, module in policy.named_modules():
        if name.endswith(("k_proj", "up_proj")):
            rank = 4 if name.endswith("k_proj") else 7
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
    for patch in (fuse_adapters, fuse_layers):
        patch(policy)
        assert_close(run(policy), expected)


def test_no_rows(model_folder):
    policy = load(model_folder())
    layer = next(m for m in policy.modules() if isinstance(m, Linear4bit))
    assert layer(torch.empty(0, 3, layer.in_features)).shape == (0, 3, layer.out_features)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_kernel_that_decodes(model_folder, monkeypatch, architecture):
    """A decoding step on a GPU takes it; here it is its torch reference."""

    def fused_products(x, layers, **_):
        results = [grpo.policy.lora.fused_product(x.flatten(0, 1), layer) for layer in layers]
        return [y.unflatten(0, x.shape[:2]) for y in results]

    monkeypatch.setattr(grpo.policy.patches, "lora_products", fused_products)
    policy = load(model_folder(architecture), fused=False)
    with torch.no_grad():
        expected = policy(input_ids=IDS).logits
        fuse_adapters(policy)
        assert relative_error(policy(input_ids=IDS).logits, expected) < 1e-5


def test_inference_mode_decodes(model_folder, monkeypatch):
    """Where the kernel applies it serves inference mode, and nothing else: the check of the sampler, which runs without
    gradient, must not compute as the sampler does."""
    calls = []
    for name in ("fused_product", "lora_products"):
        real = getattr(grpo.policy.patches, name)
        monkeypatch.setattr(
            grpo.policy.patches, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k)
        )
    policy = load(model_folder(), 4, 4, fused=False)
    fuse_adapters(policy)
    with torch.no_grad():
        expected = policy(input_ids=IDS).logits
        assert set(calls) == {"lora_products"}
    for backend, called in (("fused", {"fused_product"}), ("dequantize", set())):
        calls.clear()
        monkeypatch.setattr(grpo.policy.patches, "choose_backend", lambda *a, backend=backend: backend)
        with torch.inference_mode():
            torch.testing.assert_close(policy(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert set(calls) == called


def test_the_torch_engines_dense_copy(model_folder):
    """Its base layers are not bitsandbytes', so PEFT's forward runs; the hooks of offloading are copied as well."""
    policy = load(model_folder(), 4, 4, fused=False, offload=True)
    tokens = []
    for _ in range(2):
        engine = TorchEngine(policy, eos_ids=[2, 3], dequantize=True)
        engine.sync(policy)
        tokens.append([c.token_ids for c in engine.generate([IDS[0].tolist()], 4, Sampling(max_tokens=8), seed=0)])
        fuse_adapters(policy)
    assert tokens[0] == tokens[1]
