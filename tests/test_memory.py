"""Memory by part against models that were really loaded and against what was measured; limits kept and named."""

from types import SimpleNamespace

import pytest
import torch
from conftest import write_model
from transformers import AutoConfig, LlamaConfig

from grpo.errors import UserError
from grpo.logprobs import last_hidden
from grpo.policy.models import Policy, check_policy, load_policy, target_modules
from grpo.sampler import Rollout
from grpo_rollout.fit import memory
from grpo_rollout.fit.memory import (
    GIB,
    cap_gpu_memory,
    dims,
    fit_test,
    kept_bytes,
    largest_micro_batch,
    policy_size,
    training_bytes,
    try_micro_batch,
)
from grpo_rollout.fit.plan import Card, make_plan

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [*((name, "all-linear") for name in ("llama", "phi3", "mistral", "qwen2", "qwen3")), ("phi3", "o_proj,down_proj")],
)
def test_counts_are_those_of_the_loaded_policy(tmp_path, architecture, targets):
    folder = str(write_model(tmp_path, architecture, hidden_size=256, intermediate_size=512, num_attention_heads=16))
    policy = Policy(folder, lora_rank=4, lora_targets=targets)
    _, config, modules = check_policy(policy)
    size = policy_size(config, modules, policy)
    model = load_policy(policy)
    base = [p for n, p in model.named_parameters() if "lora_" not in n]
    packed = [p for p in base if p.dtype == torch.uint8]
    assert size.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.quantized == sum(2 * p.numel() for p in packed)
    assert size.parameters == size.quantized + sum(p.numel() for p in base if p.dtype != torch.uint8)
    assert size.largest == max(2 * p.numel() for p in packed)
    states = [p.quant_state for p in packed]
    stored = sum(p.numel() for p in packed) + sum(s.absmax.numel() + 4 * s.state2.absmax.numel() for s in states)
    assert size.quantized_bytes == pytest.approx(stored, rel=0.002)


def test_a_tied_head_counts_once_and_layers_left_in_16_bit_are_dense(tmp_path):
    tied = AutoConfig.from_pretrained(write_model(tmp_path, tie_word_embeddings=True))
    modules, policy = target_modules(tied, "all-linear"), Policy("tied", lora_rank=1)
    in_16_bits = Policy("tied", lora_rank=1, load_in_4bit=False)
    whole = policy_size(tied, modules, policy)
    assert whole.dense_bytes == 2 * (64 * 64 + 5 * 64)  # embedding, norms
    tied.quantization_config = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}
    assert whole.quantized - policy_size(tied, modules, policy).quantized == 3 * 64 * 128
    assert policy_size(tied, modules, in_16_bits).quantized > 0  # the checkpoint's word counts
    tied.quantization_config = None
    assert policy_size(tied, modules, in_16_bits).quantized == 0


def test_a_continued_adapter_counts_by_itself_and_twice(model_folder, tmp_path):
    folder = model_folder("llama")
    load_policy(Policy(folder, lora_rank=8, lora_targets="q_proj")).save_pretrained(tmp_path)
    policy = Policy(folder, lora_rank=2, adapter=tmp_path)
    _, config, modules = check_policy(policy)
    size = policy_size(config, modules, policy)
    model = load_policy(policy)
    numel = {t: sum(p.numel() for n, p in model.named_parameters() if f".{t}." in n) for t in ("default", "reference")}
    assert size.trainable == numel["default"] == 2 * 8 * (64 + 64)
    assert size.reference == numel["reference"]
    assert size.adapter_bytes == (4 + 4 + 4) * numel["default"]  # weights, gradients, copy


def test_llama_8b_by_hand():
    size = policy_size(LLAMA_8B, target_modules(LLAMA_8B, "all-linear"), Policy("llama"))
    assert size.parameters == 8_030_261_248  # as the hub says
    assert size.trainable == 41_943_040
    assert size.quantized_bytes == pytest.approx(3.60e9, rel=0.01)
    assert size.dense_bytes == pytest.approx(2 * 2 * 128_256 * 4096, rel=0.001)
    # Measured on an H100: a step with 4096 tokens, half of them of completions, adds 3.1 GiB, gradients among them.
    work = training_bytes(dims(LLAMA_8B), size, tokens=4096, completion_tokens=2048, offload=False, fused=False)
    assert work / GIB == pytest.approx(3.1 - 4 * size.trainable / GIB, rel=0.1)
    less = training_bytes(dims(LLAMA_8B), size, tokens=4096, completion_tokens=2048, offload=True, fused=False)
    assert work - less == 30 * 4096 * 4096 * 2


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_kept_activations_are_what_autograd_holds(tmp_path, architecture):
    """All storages that one more kept layer makes autograd hold, parameters aside."""
    folder = str(write_model(tmp_path, architecture, hidden_size=256, intermediate_size=512, num_attention_heads=16))
    ids = torch.randint(10, 50, (4, 100), generator=torch.Generator().manual_seed(0))
    held = []
    for layers in range(3):
        model = load_policy(Policy(folder, lora_rank=8), kept_layers=layers)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            last_hidden(model, ids, use_cache=False)
        held.append(sum(size for address, size in saved.items() if address not in parameters))
    for more, fewer in zip(held[1:], held):
        bf16 = (more - fewer) / 2
        assert 0.78 < bf16 / kept_bytes(dims(model.config), tokens=400) <= 1


@pytest.fixture
def model(model_folder):
    model = load_policy(Policy(model_folder("llama"), lora_rank=4), kept_layers=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_largest_micro_batch():
    rollout = Rollout(max_prompt_tokens=5, max_completion_tokens=7)
    micro = largest_micro_batch(rollout, 40)
    assert (micro.ids.shape, micro.mask.shape, micro.sampler_logps.shape) == ((3, 12), (3, 7), (3, 7))
    assert micro.prompt_lengths.tolist() == [5, 5, 5]
    assert micro.mask.all()
    assert micro.advantages.all()
    assert micro.needs_grad is None  # every row has a gradient
    assert micro.step == (21, 3, 7)
    assert len(largest_micro_batch(rollout, 11).ids) == 1  # one sequence at least


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_a_trial_leaves_nothing_behind(model, entropy_grad):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    try_micro_batch(model, largest_micro_batch(Rollout(4, 1.0, 5, 7), 40), entropy_grad=entropy_grad)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_micro_batch_that_does_not_fit_names_the_flags(model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "completion_logps", full)
    micro = largest_micro_batch(Rollout(4, 1.0, 5, 7), 40)
    with pytest.raises(UserError, match=r"3 x \(5 \+ 7\) tokens does not fit.*--micro-batch-tokens.*--gpu-memory-gib"):
        try_micro_batch(model, micro)


def test_the_fit_test_caps_memory_first_and_does_nothing_on_a_cpu(model, model_folder, monkeypatch):
    calls = []
    rollout, card = Rollout(4, 1.0, 5, 7), Card(gpu_memory_gib=15, micro_batch_tokens=40)
    monkeypatch.setattr(memory, "cap_gpu_memory", lambda limit_gib, device: calls.append((limit_gib, device.type)))
    monkeypatch.setattr(memory, "try_micro_batch", lambda model, micro, **flags: calls.append((micro, flags)))
    monkeypatch.setattr(memory, "largest_micro_batch", lambda *given: given)
    plan = make_plan(Policy(model_folder("llama")), rollout, card, questions=1, device="cpu")
    fit_test(model, rollout, card, plan)
    assert calls == []
    device = torch.device("cuda")
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=device)]))
    fit_test(on_gpu, rollout, card, plan, entropy_grad=True)
    assert calls == [(15, "cuda"), ((rollout, 40, device), {"entropy_grad": True})]


def test_capped_memory_leaves_room_for_what_pytorch_does_not_see(monkeypatch):
    device = torch.device("cuda")
    card = {"free": 60 * GIB, "reserved": 15 * GIB, "fraction": None}  # 20 GiB in use, 5 of them not PyTorch's
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (card["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: card["reserved"])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, d: card.update(fraction=f))
    cap_gpu_memory(None, device)
    cap_gpu_memory(10, torch.device("cpu"))
    assert card["fraction"] is None
    cap_gpu_memory(30, device)
    assert card["fraction"] == pytest.approx((25 - 1 / 8) / 80)  # with 5 for the others, and what comes later, 30
    with pytest.raises(UserError, match=r"--gpu-memory-gib 4: 20.0 GiB of the card are in use"):
        cap_gpu_memory(4, device)
