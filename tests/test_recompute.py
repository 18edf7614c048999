"""Our activation checkpointing against torch's: the same gradients, less work; and inputs that wait on the host."""

import functools
import gc
import weakref

import pytest
import torch
from conftest import write_model
from test_lora import IDS, in_bf16, load
from torch.utils.checkpoint import checkpoint

import grpo.policy.lora
import grpo.policy.recompute
from grpo.logprobs import causal_lm, last_hidden
from grpo.policy.models import trainable_parameters
from grpo.policy.recompute import ActivationCheckpoint, OffloadedInputs


def torchs_checkpoint(policy):
    """The policy with what transformers sets, in place of ours."""
    for layer in policy.modules():
        if isinstance(getattr(layer, "_gradient_checkpointing_func", None), ActivationCheckpoint):
            layer._gradient_checkpointing_func = functools.partial(
                checkpoint, use_reentrant=True, preserve_rng_state=False
            )
    return policy


def loss(policy, ids=IDS):
    hidden = last_hidden(policy, ids, use_cache=False).last_hidden_state
    return (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum()


def gradients(policy, *losses):
    for part in losses or (loss(policy),):
        part.backward()
    found = [p.grad.clone() for p in trainable_parameters(policy)]
    policy.zero_grad()
    return found


def same(ones, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3", "qwen2"])
def test_gradients_are_bit_for_bit_those_of_torchs_checkpoint(model_folder, architecture, bf16):
    policy = load(model_folder(architecture), kept_layers=0)
    if bf16:
        in_bf16(policy)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            part = loss(policy)
        # backward() outside of autocast, as a training loop calls it: the second pass is inside again all the same.
        found.append(gradients(policy, part))
        torchs_checkpoint(policy)
    assert all(g.any() for g in found[0])
    assert same(*found)


def test_16_bit_weights(model_folder):
    """There is no product to skip there."""
    dense = load(model_folder(), kept_layers=0, load_in_4bit=False)
    assert same(gradients(dense), gradients(torchs_checkpoint(dense)))


def test_the_last_product_is_not_made_twice(model_folder, monkeypatch):
    """Llama's seven products a layer: weights dequantized in the first pass, the second, and the backward pass."""
    sizes = []
    dense_weight = grpo.policy.lora.dense_weight
    monkeypatch.setattr(
        grpo.policy.lora,
        "dense_weight",
        lambda base, dtype: sizes.append(base.in_features) or dense_weight(base, dtype),
    )
    policy = load(model_folder(), kept_layers=0)
    gradients(policy)
    assert len(sizes) == 2 * (7 + 6 + 7)
    assert sizes.count(128) == 2 * (1 + 0 + 1)  # down_proj
    sizes.clear()
    gradients(torchs_checkpoint(policy))
    assert len(sizes) == 2 * (7 + 7 + 7)


def test_an_error_in_the_second_pass_leaves_the_layer_as_it_was(model_folder, monkeypatch):
    policy = load(model_folder(), kept_layers=0)
    expected = policy(input_ids=IDS).logits
    mlp = causal_lm(policy).base_model.layers[1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            expected.sum().backward()
    assert torch.equal(policy(input_ids=IDS).logits, expected)


def test_without_gradient_nothing_is_kept(model_folder, monkeypatch):
    monkeypatch.setattr(grpo.policy.recompute._CheckpointedLayer, "apply", lambda *_: 1 / 0)
    policy = load(model_folder(), kept_layers=0)
    with torch.no_grad():
        last_hidden(policy, IDS, use_cache=False)


def test_gradients_that_would_go_astray_are_refused(model_folder):
    policy = load(model_folder(), kept_layers=0)
    inputs = torch.randn(1, 3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"call backward\(\), without inputs"):
        torch.autograd.grad(policy(inputs_embeds=inputs).logits.sum(), inputs)


def test_offloading_moves_each_layers_input_and_no_value(tmp_path, monkeypatch):
    """No more than two of them are on the device, and none is left behind."""
    folder = write_model(tmp_path, num_hidden_layers=5)
    expected = gradients(load(folder, kept_layers=0))
    made, on_device = [], []
    for name in ("put", "get"):
        real = getattr(OffloadedInputs, name)

        def watched(self, x, real=real):
            result = real(self, x)
            made.append(self)
            on_device.append(len(self.on_device))
            return result

        monkeypatch.setattr(OffloadedInputs, name, watched)
    policy = load(folder, kept_layers=0, offload=True)
    for _ in range(2):  # a second pass of the backbone, or of a layer, is like the first
        made.clear(), on_device.clear()
        assert same(gradients(policy), expected)
        assert on_device == [1] * 5 + [1] * 4 + [0]  # beside the one in use
        [offloaded] = set(made)
        assert offloaded.on_host == [None] * 5


def test_two_offloaded_passes_before_one_backward_pass(model_folder):
    other = IDS.flip(0)[:1]
    plain, offloading = (load(model_folder(), kept_layers=0, offload=offload) for offload in (False, True))
    expected = gradients(plain, loss(plain) + loss(plain, other))
    assert same(gradients(offloading, loss(offloading) + loss(offloading, other)), expected)
    parts = [loss(offloading), loss(offloading, other)]
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(gradients(offloading, *parts), expected))


def test_offloaded_inputs_are_copies():
    offloaded = OffloadedInputs(torch.device("cpu"))
    inputs = [torch.full((2, 3), float(i)) for i in range(3)]
    for x in inputs:
        offloaded.put(x)
    kept = [x.clone() for x in inputs]
    for x in inputs[:2]:  # the memory of the others serves something else by now
        x.fill_(-1.0)
    assert same([offloaded.get(i) for i in (2, 1, 0)], kept[::-1])
    with pytest.raises(RuntimeError, match="only one backward pass"):
        offloaded.get(2)


def test_an_offloaded_pass_without_backward_is_gone(model_folder):
    """Graph and inputs must not hold each other."""
    policy = load(model_folder(), kept_layers=0, offload=True)
    hidden = last_hidden(policy, IDS, use_cache=False).last_hidden_state
    node = hidden.grad_fn
    while not hasattr(node, "offloaded"):
        node = node.next_functions[0][0]
    alive = weakref.ref(node.offloaded)
    gc.collect()
    gc.disable()
    try:
        del node, hidden
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("architecture", "kept_layers"), [("llama", None), ("qwen3", 0)])
def test_offloading_a_model_without_our_checkpoint(model_folder, monkeypatch, architecture, kept_layers):
    """Everything that the forward pass keeps goes to the host, and nothing of a checkpointed layer's second pass."""
    expected = gradients(load(model_folder(architecture), kept_layers=kept_layers))
    moved_shapes = []
    save_on_cpu = torch.autograd.graph.save_on_cpu

    class Counting(save_on_cpu):
        def __init__(self, pin_memory=False):
            super().__init__(pin_memory)
            self.pack_hook, pack = (lambda t: moved_shapes.append(t.shape) or pack(t)), self.pack_hook

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counting)
    policy = load(model_folder(architecture), kept_layers=kept_layers, offload=True)
    part = loss(policy)
    assert moved_shapes.count(torch.Size([2, 6, 64])) >= 2  # the layers' inputs
    in_forward = len(moved_shapes)
    assert same(gradients(policy, part), expected)
    assert len(moved_shapes) == in_forward
