"""The torch engine on a GPU: bf16 autocast, the GPU's attention kernels, NF4 weights, against full forward passes."""

import pytest
import torch
from conftest import write_model
from test_kv_cache import decoding_step_makes_nothing_big
from test_torch_engine import PROMPTS, UNSHARED, WINDOWED

from grpo.policy.models import Policy, load_policy
from grpo.sampler import Sampling
from grpo_rollout.torch import kv_cache
from grpo_rollout.torch.engine import TorchEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = "cuda"


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize(("architecture", "settings"), [("llama", {}), *WINDOWED, *UNSHARED], ids=str)
def test_logps_are_the_trainers(tmp_path, monkeypatch, architecture, settings, load_in_4bit):
    """Up to bf16's rounding, which a wrong position, head order or mask exceeds many times over."""
    monkeypatch.setattr(kv_cache, "BLOCK", 4)
    folder = str(write_model(tmp_path, architecture, **settings))
    policy = load_policy(Policy(folder, lora_rank=4, load_in_4bit=load_in_4bit), device=DEVICE)
    prompts = [*PROMPTS, [1, *range(8, 28)]]
    engine = TorchEngine(policy, eos_ids=[2, 3, 20, 30])
    completions = engine.generate(prompts, 5, Sampling(max_tokens=50), seed=3)
    assert len({len(c.token_ids) for c in completions}) > 8
    differences = []
    for i, completion in enumerate(completions):
        ids = torch.tensor([[*prompts[i // 5], *completion.token_ids]], device=DEVICE)
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            logits = policy(input_ids=ids).logits[0, :-1].float()
        exact = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompts[i // 5]) - 1 :, 0]
        differences.append((torch.tensor(completion.logps) - exact.cpu()).abs())
    assert torch.cat(differences).mean() < 0.05
    assert torch.cat(differences).max() < 0.5


def test_a_decoding_step_makes_nothing_of_the_caches_size(tmp_path):
    policy = Policy(str(write_model(tmp_path)), lora_rank=1, load_in_4bit=False)
    decoding_step_makes_nothing_big(load_policy(policy, device=DEVICE))
