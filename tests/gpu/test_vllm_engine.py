"""The vLLM engine on a GPU: the KV cache comes and goes, graphs see a new adapter, both sides agree in bf16."""

import importlib.util

import pytest
import torch
from conftest import write_model

from grpo.models import load_policy
from grpo_rollout.engine import Sampling

if not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
    pytest.skip("needs a GPU and vLLM", allow_module_level=True)

from grpo_rollout.vllm_engine import SyncError, VLLMEngine

PROMPT = [1, *range(10, 40)]


def free() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("llama"), "llama", hidden_size=256, head_dim=64, intermediate_size=512)
    model = load_policy(str(folder), lora_rank=8, device="cuda")
    engine = VLLMEngine(model, eos_ids=[2, 3], max_prompt_tokens=128, max_completion_tokens=128, sequences=256)
    yield model, engine
    engine.close()


def perturb(model, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)


def test_kv_cache_has_memory_only_while_generating(pair):
    _, engine = pair
    asleep = free()
    with engine._awake():
        awake = free()
    assert asleep - awake >= 0.9 * engine.sizes.kv_cache_bytes
    assert abs(free() - asleep) < 32 << 20


@pytest.mark.parametrize("seed", [1, 2])
def test_captured_graphs_use_the_synced_adapter(pair, seed):
    model, engine = pair
    perturb(model, seed)
    engine.sync(model)
    completions = engine.generate([PROMPT], 64, Sampling(max_tokens=32), seed=0)
    gaps, wrong = [], []
    for c in completions:
        ids = torch.tensor([PROMPT + c.token_ids], device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            on = model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
            with model.disable_adapter():
                off = model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
        taken = ids[0, len(PROMPT) :, None]
        sampler = torch.tensor(c.logps)
        gaps.append((on.gather(1, taken)[:, 0].cpu() - sampler).abs())
        wrong.append((off.gather(1, taken)[:, 0].cpu() - sampler).abs())
    assert torch.cat(gaps).mean() < 0.05
    assert torch.cat(wrong).mean() > 5 * torch.cat(gaps).mean()


def test_a_forgotten_sync_stops_the_run(pair):
    model, engine = pair
    perturb(model, 3)
    with pytest.raises(SyncError, match="not the trainer's"):
        engine.check(PROMPT)
    engine.sync(model)
    engine.check(PROMPT)
