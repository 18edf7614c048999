"""Layers recomputed our way against torch's checkpoint: the same gradients, less work; inputs that wait on the host."""

import functools
import gc
import weakref

import pytest
import torch
from conftest import write_model
from test_lora import in_bf16, moved
from torch.utils.checkpoint import checkpoint

import grpo.policy.lora
import grpo.policy.recompute
from grpo.batch import micro_batches
from grpo.logprobs import causal_lm, completion_logps, last_hidden
from grpo.policy.models import load_policy, trainable_parameters
from grpo.policy.recompute import LAYERS, HostInputs, Recompute

IDS = torch.tensor([[1, 9, 10, 11, 30, 12], [1, 20, 21, 22, 23, 2]])


def load(folder, **settings):
    return moved(load_policy(folder, lora_rank=3, lora_alpha=12, gradient_checkpointing=True, **settings))


def torchs_checkpoint(policy):
    """What transformers sets, in place of ours."""
    for layer in policy.modules():
        if isinstance(getattr(layer, "_gradient_checkpointing_func", None), Recompute):
            layer._gradient_checkpointing_func = functools.partial(
                checkpoint, use_reentrant=True, preserve_rng_state=False
            )
    return policy


def gradients(policy, **settings):
    hidden = last_hidden(policy, IDS, use_cache=False, **settings).last_hidden_state
    (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    found = [p.grad.clone() for p in trainable_parameters(policy)]
    policy.zero_grad()
    return found


def same(ones, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3", "qwen2"])
def test_gradients_are_bit_for_bit_those_of_torchs_checkpoint(model_folder, architecture, bf16):
    policy = load(model_folder(architecture))
    if bf16:
        in_bf16(policy)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = policy(input_ids=IDS).logits
        # Outside of autocast, as a training loop calls it: the second pass is inside again all the same.
        (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        found.append([p.grad.clone() for p in trainable_parameters(policy)])
        policy.zero_grad()
        torchs_checkpoint(policy)
    assert all(g.any() for g in found[0])
    assert same(*found)


def test_the_last_product_is_not_made_twice(model_folder, monkeypatch):
    """Llama's seven products a layer: weights dequantized in the first pass, the second, and the backward pass."""
    sizes = []
    weight = grpo.policy.lora._weight
    monkeypatch.setattr(
        grpo.policy.lora, "_weight", lambda base, dtype: sizes.append(base.in_features) or weight(base, dtype)
    )
    policy = load(model_folder())
    gradients(policy)
    assert len(sizes) == 2 * (7 + 6 + 7)
    assert sizes.count(128) == 2 * (1 + 0 + 1)  # down_proj
    sizes.clear()
    gradients(torchs_checkpoint(policy))
    assert len(sizes) == 2 * (7 + 7 + 7)


def test_what_no_one_reads_may_be_anything(model_folder, monkeypatch):
    policy = load(model_folder())
    expected = gradients(policy)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, float("nan")))
    assert same(gradients(policy), expected)


def test_an_error_in_the_second_pass_leaves_the_layer_as_it_was(model_folder, monkeypatch):
    policy = load(model_folder())
    expected = policy(input_ids=IDS).logits
    mlp = causal_lm(policy).base_model.layers[1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            expected.sum().backward()
    assert torch.equal(policy(input_ids=IDS).logits, expected)


def test_which_layers_are_ours(model_folder):
    """Those of known classes that are checkpointed, and not in a policy that is to be transformers' own."""

    def ours(architecture, **settings):
        policy = load(model_folder(architecture), **settings)
        functions = [m._gradient_checkpointing_func for m in policy.modules() if type(m) in LAYERS]
        return sum(isinstance(f, Recompute) and f.last is not None for f in functions)

    assert [ours("llama"), ours("phi3"), ours("llama", kept_layers=1)] == [2, 2, 1]
    assert [ours("qwen3"), ours("llama", fused=False)] == [0, 0]
    dense = load(model_folder(), load_in_4bit=False)  # nothing to skip there
    assert same(gradients(dense), gradients(torchs_checkpoint(dense)))


def test_without_gradient_nothing_is_kept(model_folder, monkeypatch):
    monkeypatch.setattr(grpo.policy.recompute._Recomputed, "apply", lambda *_: 1 / 0)
    policy = load(model_folder())
    with torch.no_grad():
        last_hidden(policy, IDS, use_cache=False, offload=True)


def test_gradients_that_would_go_astray_are_refused(model_folder):
    policy = load(model_folder())
    inputs = torch.randn(1, 3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"call backward\(\), without inputs"):
        torch.autograd.grad(policy(inputs_embeds=inputs).logits.sum(), inputs)


def test_offloading_moves_each_layers_input_and_no_value(tmp_path, monkeypatch):
    """No more than two of them are on the device, and none is left behind."""
    policy = load(write_model(tmp_path, num_hidden_layers=5))
    made, near = [], []
    for name in ("put", "get"):
        real = getattr(HostInputs, name)

        def watched(self, x, real=real):
            result = real(self, x)
            made.append(self)
            near.append(len(self.near))
            return result

        monkeypatch.setattr(HostInputs, name, watched)
    expected = gradients(policy)
    assert not made
    assert same(gradients(policy, offload=True), expected)
    assert near == [1] * 5 + [1] * 4 + [0]  # beside the one in use
    [host] = set(made)
    assert host.far == [None] * 5
    assert same(gradients(policy), expected)  # and the next pass is without
    assert len(made) == 10


def test_offloaded_inputs_are_copies(model_folder):
    host = HostInputs(torch.device("cpu"))
    inputs = [torch.full((2, 3), float(i)) for i in range(3)]
    for x in inputs:
        host.put(x)
    kept = [x.clone() for x in inputs]
    for x in inputs[:2]:  # the memory of the others serves something else by now
        x.fill_(-1.0)
    assert same([host.get(i) for i in (2, 1, 0)], kept[::-1])
    with pytest.raises(RuntimeError, match="one backward pass"):
        host.get(2)


def test_an_offloaded_pass_without_backward_is_gone(model_folder):
    """Graph and inputs must not hold each other."""
    policy = load(model_folder())
    hidden = last_hidden(policy, IDS, use_cache=False, offload=True).last_hidden_state
    node = hidden.grad_fn
    while not hasattr(node, "host"):
        node = node.next_functions[0][0]
    alive = weakref.ref(node.host)
    gc.collect()
    gc.disable()
    try:
        del node, hidden
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_offloading_a_model_that_torch_checkpoints(model_folder, monkeypatch, architecture):
    prompts, completions, logps = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 2]], [[0, 0], [0, 0, 0]]
    [batch] = micro_batches(prompts, completions, logps, torch.ones(2), max_tokens=99, pad_id=0)
    policy = torchs_checkpoint(load(model_folder(architecture)))
    moved_shapes = []
    save_on_cpu = torch.autograd.graph.save_on_cpu

    class Counting(save_on_cpu):
        def __init__(self, pin_memory=False):
            super().__init__(pin_memory)
            self.pack_hook, pack = (lambda t: moved_shapes.append(t.shape) or pack(t)), self.pack_hook

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counting)
    found = []
    for offload in (False, True):
        logps, _ = completion_logps(policy, batch, offload=offload)
        logps.sum().backward()
        found.append([p.grad.clone() for p in trainable_parameters(policy)])
        policy.zero_grad()
    assert same(*found)
    assert moved_shapes.count(torch.Size([2, 5, 64])) >= 2  # layers
