"""The adapted NF4 layer in one step on a GPU: bf16, the dequantising kernel, joined storage, against fp32 and PEFT."""

import pytest
import torch
from conftest import write_model
from test_lora import moved, relative_error, run

import grpo.lora
from grpo.layers import fuse_layers
from grpo.lora import fuse_adapters
from grpo.models import load_policy
from grpo_rollout.shared_weights import base_linears, share

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
IDS = torch.arange(8, 64).repeat(2, 6)[:, :300]  # more rows than the fused product takes


@pytest.mark.parametrize("fuse", [fuse_adapters, fuse_layers])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_no_worse_than_peft(tmp_path, architecture, joined, checkpointing, fuse):
    """Logits and gradients, where q, k, v share storage with a sampler too; norms and MLPs as well."""
    folder = str(write_model(tmp_path, architecture, hidden_size=256, intermediate_size=512, head_dim=64,
                             initializer_range=0.05))  # fmt: skip
    exact = run(moved(load_policy(folder, lora_rank=8, lora_alpha=12, fused=False)), IDS)
    settings = {"gradient_checkpointing": checkpointing, "device": "cuda"}
    policy = moved(load_policy(folder, lora_rank=8, lora_alpha=12, fused=False, **settings))
    if joined:
        linears = base_linears(policy.get_base_model())
        for i in range(2):
            share([linears[f"model.layers.{i}.self_attn.{name}_proj"] for name in "qkv"])

    def errors():
        with torch.autocast("cuda", torch.bfloat16):
            return [relative_error(a.cpu(), e) for a, e in zip(run(policy, IDS), exact)]

    theirs = errors()
    fuse(policy)
    for ours, peft in zip(errors(), theirs):
        assert ours < 1.2 * peft


def test_few_rows_without_gradient(tmp_path, monkeypatch):
    """As the torch engine decodes: the fused product, its adapter included; with a gradient or more rows it is not."""
    taken = []
    read_once = grpo.lora._read_once
    monkeypatch.setattr(grpo.lora, "_read_once", lambda x, *rest: taken.append(len(x)) or read_once(x, *rest))
    folder = str(write_model(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64, initializer_range=0.05))
    with torch.inference_mode():
        exact = moved(load_policy(folder, lora_rank=8, lora_alpha=12, fused=False))(input_ids=IDS[:, :20]).logits
        policy = moved(load_policy(folder, lora_rank=8, lora_alpha=12, device="cuda", fused=False))
        errors = []
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                errors.append(relative_error(policy(input_ids=IDS[:, :20].cuda()).logits.cpu(), exact))
            fuse_adapters(policy)
    assert errors[1] < 1.2 * errors[0]
    assert taken == [40] * 14
    policy(input_ids=IDS[:, :20].cuda())  # with gradient
    with torch.no_grad():  # as the vLLM engine's check compares: by another way than the sampler's
        policy(input_ids=IDS[:, :20].cuda())
    with torch.inference_mode():
        policy(input_ids=IDS[:, :150].cuda())  # 300 rows
    assert len(taken) == 14
