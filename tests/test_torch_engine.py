"""The torch engine against transformers' own full forward passes."""

import pytest
import torch
from conftest import ARCHITECTURES
from transformers import AutoModelForCausalLM

from grpo.models import load_policy
from grpo_rollout.engine import Sampling
from grpo_rollout.torch_engine import TorchEngine, sample

PROMPTS = [[1, 9, 10, 11, 12, 13], [1, 20], [1, 30, 31, 32], [1, 40, 41]]


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("in_flight", [40, 10_000])
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


def test_seeds(model_folder):
    engine = TorchEngine(AutoModelForCausalLM.from_pretrained(model_folder()), eos_ids=[2])
    first = engine.generate(PROMPTS, 3, Sampling(max_tokens=8), seed=5)
    assert first == engine.generate(PROMPTS, 3, Sampling(max_tokens=8), seed=5)
    assert first != engine.generate(PROMPTS, 3, Sampling(max_tokens=8), seed=6)
    assert len({tuple(c.token_ids) for c in first[:3]}) > 1  # members of a group differ


def test_the_distribution_sampled_from():
    """20,000 draws of one row against its exact probabilities; the reported log-probability is that of the draw."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    cases = {
        Sampling(): logits.softmax(-1)[0],
        Sampling(temperature=0.5): (logits / 0.5).softmax(-1)[0],
        Sampling(top_k=2): torch.tensor([2.0, 1.0]).softmax(-1),
        # 0.64 + 0.24 reach 0.8 with the second token, so two are kept
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
    with pytest.raises(ValueError, match=field):
        engine.generate(PROMPTS, 1, sampling, seed=0)


def test_refuses_empty(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    with pytest.raises(ValueError, match="eos_ids"):
        TorchEngine(model, eos_ids=[])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        TorchEngine(model, eos_ids=[2]).generate([[1], []], 1, Sampling(), seed=0)


def test_dequantized_twin_equals_the_4_bit_model_and_follows_its_adapter(model_folder):
    policy = load_policy(model_folder(), lora_rank=4)
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
