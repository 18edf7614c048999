"""Memory by part against models that were really loaded and against what was measured; limits kept and named."""

import pytest
import torch
from conftest import write_model
from torch import nn
from transformers import AutoConfig, LlamaConfig

from grpo.logprobs import last_hidden
from grpo.policy.models import check_policy, load_policy, target_modules
from grpo_rollout.fit.memory import GIB, dims, hold_memory, kept_bytes, policy_size, preflight, training_bytes

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", ["all-linear", "o_proj,down_proj"])
def test_counts_are_those_of_the_loaded_policy(tmp_path, architecture, targets):
    folder = str(write_model(tmp_path, architecture, hidden_size=256, intermediate_size=512, num_attention_heads=16))
    _, config, modules = check_policy(folder, lora_rank=4, lora_targets=targets)
    size = policy_size(config, modules, lora_rank=4)
    model = load_policy(folder, lora_rank=4, lora_targets=targets)
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
    modules = target_modules(tied, "all-linear")
    assert policy_size(tied, modules, lora_rank=1).dense_bytes == 2 * (64 * 64 + 5 * 64)  # embedding, norms
    whole = policy_size(tied, modules, lora_rank=1)
    tied.quantization_config = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}
    assert whole.quantized - policy_size(tied, modules, lora_rank=1).quantized == 3 * 64 * 128
    assert policy_size(tied, modules, lora_rank=1, load_in_4bit=False).quantized > 0  # the checkpoint's word counts
    tied.quantization_config = None
    assert policy_size(tied, modules, lora_rank=1, load_in_4bit=False).quantized == 0


def test_a_continued_adapter_counts_by_itself_and_twice(model_folder, tmp_path):
    folder = model_folder("llama")
    load_policy(folder, lora_rank=8, lora_targets="q_proj").save_pretrained(tmp_path)
    _, config, modules = check_policy(folder, lora_rank=2, adapter=tmp_path)
    size = policy_size(config, modules, lora_rank=2, adapter=tmp_path)
    model = load_policy(folder, lora_rank=2, adapter=tmp_path)
    numel = {t: sum(p.numel() for n, p in model.named_parameters() if f".{t}." in n) for t in ("default", "reference")}
    assert size.trainable == numel["default"] == 2 * 8 * (64 + 64)
    assert size.reference == numel["reference"]
    assert size.adapter_bytes == (4 + 4 + 4) * numel["default"]  # weights, gradients, copy


def test_llama_8b_by_hand():
    size = policy_size(LLAMA_8B, target_modules(LLAMA_8B, "all-linear"), lora_rank=16)
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
        model = load_policy(folder, lora_rank=8, gradient_checkpointing=True, kept_layers=layers)
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
def policy(model_folder):
    model = load_policy(model_folder("llama"), lora_rank=4, gradient_checkpointing=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_preflight_leaves_nothing_behind(policy):
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    state = torch.get_rng_state()
    assert preflight(policy, prompt_tokens=5, completion_tokens=7, micro_batch_tokens=40) == 0.0  # no GPU
    assert all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(before[n], p) for n, p in policy.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_preflight_runs_the_largest_micro_batch_and_names_the_flags(policy, monkeypatch):
    seen = []

    def full(model, batch, **_):
        seen.append((tuple(batch.ids.shape), tuple(batch.mask.shape), batch.prompt_lengths.tolist()))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("grpo_rollout.fit.memory.completion_logps", full)
    with pytest.raises(ValueError, match=r"3 x \(5 \+ 7\) tokens does not fit.*--micro-batch-tokens"):
        preflight(policy, prompt_tokens=5, completion_tokens=7, micro_batch_tokens=40)
    with pytest.raises(ValueError, match=r"1 x \(50 \+ 7\)"):  # one sequence at least
        preflight(policy, prompt_tokens=50, completion_tokens=7, micro_batch_tokens=40)
    assert seen[0] == ((3, 12), (3, 7), [5, 5, 5])


def test_held_memory_leaves_room_for_what_pytorch_does_not_see(monkeypatch):
    device = torch.device("cuda")
    card = {"free": 60 * GIB, "reserved": 15 * GIB, "fraction": None}  # 20 GiB in use, 5 of them not PyTorch's
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (card["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: card["reserved"])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, d: card.update(fraction=f))
    hold_memory(None, device)
    hold_memory(10, torch.device("cpu"))
    assert card["fraction"] is None
    hold_memory(30, device)
    assert card["fraction"] == pytest.approx((25 - 1 / 8) / 80)  # with 5 for the others, and what comes later, 30
    with pytest.raises(ValueError, match=r"--gpu-memory-gib 4: 20.0 GiB of the card are in use"):
        hold_memory(4, device)
