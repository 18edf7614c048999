"""The torch engine against transformers' own full forward passes."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, write_model
from transformers import AutoModelForCausalLM

from grpo.errors import UserError
from grpo.policy.chat import load_tokenizer
from grpo.policy.models import Policy, load_policy
from grpo.runs.cli import vllm_installed
from grpo.sampler import Rollout, Sampling
from grpo_rollout.fit.plan import Card
from grpo_rollout.make import make_engine
from grpo_rollout.torch import kv_cache
from grpo_rollout.torch.engine import TorchEngine, sample

PROMPTS = [[1, 9, 10, 11, 12, 13], [1, 20], [1, 30, 31, 32], [1, 40, 41]]


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize(("architecture", "in_flight"), [*((a, 10_000) for a in ARCHITECTURES), ("llama", 40)])
def test_greedy_is_the_argmax_and_logps_are_the_models(model_folder, architecture, in_flight):
    model = AutoModelForCausalLM.from_pretrained(model_folder(architecture))
    engine = TorchEngine(model, eos_ids=[2, 3], max_tokens_in_flight=in_flight)
    completions = engine.generate(PROMPTS, 2, Sampling(temperature=0, max_tokens=12), seed=0)
    assert len(completions) == 8
    for i, completion in enumerate(completions):
        prompt = PROMPTS[i // 2]
        table = logits_of(model, [*prompt, *completion.token_ids]).log_softmax(-1)[len(prompt) - 1 : -1]
        assert completion.token_ids == table.argmax(-1).tolist()
        exact = table.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps).double(), exact, rtol=1e-4, atol=1e-5)


def test_sampled_logps_are_those_of_the_sampling_temperature(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    engine = TorchEngine(model, eos_ids=[2, 3])
    ended = 0
    for completion, prompt in zip(
        engine.generate(PROMPTS, 16, Sampling(temperature=1.7, max_tokens=20), seed=1),
        [p for p in PROMPTS for _ in range(16)],
    ):
        ids = completion.token_ids
        table = (logits_of(model, [*prompt, *ids]) / 1.7).log_softmax(-1)[len(prompt) - 1 : -1]
        exact = table.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps).double(), exact, rtol=1e-4, atol=1e-4)
        stops = [t in (2, 3) for t in ids]
        assert not any(stops[:-1])  # both EOS ids end it, and the EOS is kept
        assert completion.truncated == (not stops[-1])
        assert not completion.truncated or len(ids) == 20
        ended += stops[-1]
    assert 8 < ended < 64  # both ways of ending were seen


# A window shorter than the prompts; in the Qwen models the second layer alone has one.
WINDOWED = [
    ("mistral", {"sliding_window": 5}),
    ("phi3", {"sliding_window": 5}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
]
UNSHARED = [("llama", {"num_key_value_heads": 4})]  # one key head per query head, as in Phi-3 mini


@pytest.mark.parametrize(
    ("architecture", "settings"), [*((a, {}) for a in ARCHITECTURES), *WINDOWED, *UNSHARED], ids=lambda v: str(v)
)
def test_rows_that_end_at_different_times(tmp_path, monkeypatch, architecture, settings):
    """Prompts and completions of many lengths, buffers that grow every 4 tokens and rows that leave in between, against
    full forward passes without a cache; and the shape of the batch at every step."""
    monkeypatch.setattr(kv_cache, "BLOCK", 4)
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model", architecture, **settings))
    eos, seen = [2, 3, 20, 30], []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)) if kwargs.get("use_cache") else None,
        with_kwargs=True,
    )
    prompts = [*PROMPTS, [1, *range(8, 28)]]
    engine = TorchEngine(model, eos_ids=eos)
    completions = engine.generate(prompts, 5, Sampling(temperature=1.3, max_tokens=50), seed=3)
    for i, completion in enumerate(completions):
        prompt, ids = prompts[i // 5], completion.token_ids
        table = (logits_of(model, [*prompt, *ids]) / 1.3).log_softmax(-1)[len(prompt) - 1 : -1]
        exact = table.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps).double(), exact, rtol=1e-4, atol=1e-4)
        assert completion.truncated == (ids[-1] not in eos)
        assert not set(eos) & set(ids[:-1])
    lengths = [len(c.token_ids) for c in completions]
    assert len(set(lengths)) > 8
    assert seen[0] == (5, 21)  # one prefill for a group
    assert {columns for _, columns in seen[1:]} == {1}
    for step, (rows, _) in enumerate(seen[1:], 1):
        going = sum(n > step for n in lengths)
        assert going <= rows
        assert going > rows * 3 // 4 or step == 1  # at least three quarters of the rows are still needed
    assert seen[-1][0] < 15
    if "sliding_window" in settings:  # the window matters: without it, the model computes something else
        without = {**settings, "sliding_window": None, "use_sliding_window": False}
        whole = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "whole", architecture, **without))
        assert torch.equal(whole.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)
        assert (logits_of(model, prompts[4]) - logits_of(whole, prompts[4])).abs().max() > 0.1


def test_tokens_in_flight(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    seen = []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["attention_mask"].shape), with_kwargs=True)
    TorchEngine(model, eos_ids=[63], max_tokens_in_flight=40).generate(PROMPTS, 2, Sampling(max_tokens=9), seed=0)
    sizes = [rows * columns for rows, columns in seen]
    assert 20 < max(sizes) <= 40
    assert seen[0][1] == 6  # the longest prompt comes first


def test_seeds(model_folder):
    engine = TorchEngine(AutoModelForCausalLM.from_pretrained(model_folder()), eos_ids=[2])
    first = engine.generate(PROMPTS, 3, Sampling(max_tokens=8), seed=5)
    assert first == engine.generate(PROMPTS, 3, Sampling(max_tokens=8), seed=5)
    assert first != engine.generate(PROMPTS, 3, Sampling(max_tokens=8), seed=6)
    assert len({tuple(c.token_ids) for c in first[:3]}) > 1  # members of a group differ


def test_the_distribution_sampled_from():
    """20,000 draws from one row against its exact probabilities; the reported log-probability is the draw's."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    cases = {
        Sampling(): logits.softmax(-1)[0],
        Sampling(temperature=0.5): (logits / 0.5).softmax(-1)[0],
        Sampling(top_k=2): torch.tensor([2.0, 1.0]).softmax(-1),
        # 0.64 + 0.24 exceed 0.8 with the second token, so two are kept.
        Sampling(top_p=0.8): torch.tensor([2.0, 1.0]).softmax(-1),
    }
    for sampling, expected in cases.items():
        token, logp = sample(logits.expand(20_000, -1), sampling, torch.Generator().manual_seed(0))
        counts = torch.bincount(token, minlength=5).float() / 20_000
        full = torch.cat([expected, torch.zeros(5 - len(expected))])
        assert (counts - full).abs().max() < 0.012, sampling
        torch.testing.assert_close(logp, full.log()[token])


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(temperature=-1), "temperature"),
        (Sampling(max_tokens=0), "max_tokens"),
        (Sampling(top_p=0), "top_p"),
        (Sampling(top_k=-1), "top_k"),
    ],
)
def test_refuses_settings(model_folder, sampling, field):
    engine = TorchEngine(AutoModelForCausalLM.from_pretrained(model_folder()), eos_ids=[2])
    with pytest.raises(UserError, match=field):
        engine.generate(PROMPTS, 1, sampling, seed=0)


def test_refuses_empty(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    with pytest.raises(ValueError, match="eos_ids"):
        TorchEngine(model, eos_ids=[])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        TorchEngine(model, eos_ids=[2]).generate([[1], []], 1, Sampling(), seed=0)


def test_the_dense_copy_equals_the_4_bit_model_and_follows_its_adapter(model_folder):
    policy = load_policy(Policy(model_folder(), lora_rank=4, lora_alpha=4))
    plain, dense = (TorchEngine(policy, eos_ids=[2], dequantize=d) for d in (False, True))
    sampling = Sampling(max_tokens=10)
    before = plain.generate(PROMPTS, 2, sampling, seed=0)
    assert dense.generate(PROMPTS, 2, sampling, seed=0) == before
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    after = plain.generate(PROMPTS, 2, sampling, seed=0)
    assert after != before
    assert dense.generate(PROMPTS, 2, sampling, seed=0) == after
    assert policy.training  # generate leaves the mode as it was


def test_make_engine(model_folder):
    """On a CPU "auto" is the torch engine. It has no use for VLLMEngine's settings, but a misspelt one is refused."""
    folder = model_folder()
    model, tokenizer = load_policy(Policy(folder, lora_rank=1)), load_tokenizer(folder)
    for kind in ("auto", "torch"):
        engine = make_engine(model, tokenizer, Rollout(), Card(engine=kind), sequences=4, tolerance=0.5)
        assert isinstance(engine, TorchEngine)
        assert engine.eos_ids == [2, 3]  # </s> of the tokenizer, and <end>, which the model's generation config adds
        assert engine.pad_id == tokenizer.pad_token_id
        assert engine.sampler is not model  # dense on a CPU
    with pytest.raises(UserError, match="--engine nonsense"):
        make_engine(model, tokenizer, Rollout(), Card(engine="nonsense"))
    for unknown in ("sequence", "eos_ids"):
        with pytest.raises(TypeError, match=f"no setting {unknown}$"):
            make_engine(model, tokenizer, Rollout(), Card(), **{unknown: 4})


def test_make_engine_gives_vllm_what_the_plan_says(model_folder, monkeypatch):
    class Seen(Exception):
        pass

    def init(self, model, **settings):
        raise Seen(settings)

    folder = model_folder()
    model, tokenizer = load_policy(Policy(folder, lora_rank=1)), load_tokenizer(folder)
    rollout = Rollout(max_prompt_tokens=20, max_completion_tokens=30)
    card = Card(engine="vllm", gpu_memory_gib=15.0, kv_cache_dtype="fp8", fused_nf4=False)
    monkeypatch.setattr("grpo_rollout.make.check_vllm_installed", lambda: None)
    monkeypatch.setattr("grpo_rollout.make._check_settings", lambda settings: None)
    monkeypatch.setattr("grpo_rollout.vllm.engine.VLLMEngine.__init__", init)

    def given(plan=None, **settings):
        with pytest.raises(Seen) as error:
            make_engine(model, tokenizer, rollout, card, plan, **settings)
        return error.value.args[0]

    always = {"eos_ids": [2, 3], "max_prompt_tokens": 20, "max_completion_tokens": 30, "kv_cache_dtype": "fp8"}
    always |= {"fused_nf4": False}
    assert given() == always | {"gpu_memory_gib": 15.0}
    plan = SimpleNamespace(sequences=7, engine_gib=14.2)
    assert given(plan) == always | {"sequences": 7, "gpu_memory_gib": 14.2}
    assert given(plan, sequences=3) == always | {"sequences": 3, "gpu_memory_gib": 14.2}


@pytest.mark.skipif(vllm_installed(), reason="vLLM is installed")
def test_a_missing_vllm_is_named(model_folder):
    folder = model_folder()
    with pytest.raises(UserError, match="--engine vllm: vLLM is not installed"):
        make_engine(load_policy(Policy(folder, lora_rank=1)), load_tokenizer(folder), Rollout(), Card(engine="vllm"))
