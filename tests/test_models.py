"""Loading a policy: weights, adapter, reference, tokenizer; names, GGUF files, and what is refused."""

import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from conftest import ARCHITECTURES, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.errors import UserError
from grpo.policy.chat import check_context, encode_chat, encode_messages, load_tokenizer, stop_ids
from grpo.policy.models import (
    Policy,
    check_policy,
    load_policy,
    reference_policy,
    target_modules,
    trainable_parameters,
)
from grpo.policy.sources import resolve_model
from grpo.runs.checkpoint import save_adapter

IDS = torch.tensor([[1, 9, 10, 11]])


def load(folder, **settings):
    """A policy of rank 4 whose adapter has no scaling."""
    return load_policy(Policy(folder, lora_rank=4, lora_alpha=4), **settings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_policy_is_nf4_with_a_trainable_adapter_on_every_linear(model_folder, architecture, monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)  # a CPU for which it has products of its own
    policy = load(model_folder(architecture))
    base = policy.get_base_model()
    linears = {n.split(".")[-2] for n, m in policy.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    fused = architecture == "phi3"
    attention = {"qkv_proj", "o_proj"} if fused else {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = {"gate_up_proj", "down_proj"} if fused else {"gate_proj", "up_proj", "down_proj"}
    assert linears == attention | mlp
    assert base.lm_head.weight.dtype == torch.float32  # the head is neither quantized nor adapted
    trainable = trainable_parameters(policy)
    assert len(trainable) == 2 * 2 * len(linears)  # A and B, two layers
    assert {p.dtype for p in trainable} == {torch.float32}
    with reference_policy(policy):
        expected = policy(IDS).logits
    torch.testing.assert_close(policy(IDS).logits, expected, rtol=0, atol=0)  # B = 0: it starts as the base
    before = [p.detach().clone() for p in trainable]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(2):  # the first moves B, the second A too
        policy(IDS).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != b).any() for p, b in zip(trainable, before))
    with reference_policy(policy):
        torch.testing.assert_close(policy(IDS).logits, expected, rtol=0, atol=0)
    assert (policy(IDS).logits - expected).abs().max() > 1e-3


def test_activation_checkpointing_changes_no_gradient(model_folder):
    found, passes = [], []
    for kept in (None, 0, 1, 9):
        policy = load(model_folder(), kept_layers=kept, seed=3)
        calls = []
        for name, module in policy.named_modules():
            if name.endswith("q_proj"):
                module.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name.split(".")[4]))
        policy(IDS).logits.logsumexp(-1).sum().backward()
        found.append([p.grad for p in trainable_parameters(policy)])
        passes.append("".join(calls))
    assert passes == ["01", "0110", "010", "01"]  # the layers in order of their forward passes: the last ones are kept
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b)
    assert any(g.any() for g in found[0])


def test_seed_sets_the_adapter(model_folder):
    def first_a(seed):
        policy = load(model_folder(), seed=seed)
        return next(p for n, p in policy.named_parameters() if "lora_A" in n)

    assert torch.equal(first_a(1), first_a(1))
    assert not torch.equal(first_a(1), first_a(2))


def test_continued_adapter_has_its_frozen_copy_as_reference(model_folder, tmp_path):
    policy = load(model_folder())
    with torch.no_grad():
        for p in trainable_parameters(policy):
            p.normal_(std=0.1)
    trained = policy(IDS).logits.detach()
    policy.save_pretrained(tmp_path / "adapter")

    continued = load_policy(Policy(model_folder(), lora_rank=9, adapter=tmp_path / "adapter"))
    count = len(trainable_parameters(continued))
    assert count == len(trainable_parameters(policy))  # the reference copy is frozen
    torch.testing.assert_close(continued(IDS).logits, trained)
    with torch.no_grad():
        for p in trainable_parameters(continued):
            p.mul_(2)
    assert (continued(IDS).logits - trained).abs().max() > 1e-3
    with reference_policy(continued):
        torch.testing.assert_close(continued(IDS).logits, trained)
    assert len(trainable_parameters(continued)) == count
    continued(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(continued))


def test_targets(model_folder):
    config = AutoConfig.from_pretrained(model_folder())
    names = target_modules(config, "q_proj,v_proj")
    assert names == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    assert len(target_modules(config, "*.mlp.*")) == 6
    assert len(target_modules(config, "all-linear")) == 14
    with pytest.raises(UserError, match=r"--lora-targets: 'qkv_proj' matches no .* down_proj, gate_proj"):
        target_modules(config, "q_proj,qkv_proj")


def test_chat_encoding_has_one_bos_and_keeps_the_prefill(model_folder):
    tokenizer = load_tokenizer(model_folder())
    assert encode_chat(tokenizer, "w9 w10", prefill="w11") == [1, 6, 9, 10, 3, 7, 11]
    assert encode_chat(tokenizer, "w9", system="w8") == [1, 5, 8, 3, 6, 9, 3, 7]
    turns = [{"role": role, "content": "w9"} for role in ("user", "assistant", "user")]
    assert encode_messages(tokenizer, turns) == [1, 6, 9, 3, 7, 9, 3, 6, 9, 3, 7]


def test_stop_ids_hold_every_eos_and_the_end_of_turn(tmp_path):
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [40, 41]}))
    # 2 is the tokenizer's, 3 (<end>) closes the template's turn, though no metadata names it
    assert stop_ids(str(folder), load_tokenizer(str(folder))) == [2, 3, 40, 41]
    (folder / "generation_config.json").unlink()
    assert stop_ids(str(folder), load_tokenizer(str(folder))) == [2, 3]


def test_gguf(tmp_path, monkeypatch):
    """A GGUF file of a Llama, written here, loads with the weights it was written from."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_model(tmp_path / "source")
    write_gguf(gguf, source, tmp_path / "tiny.gguf")
    folder = resolve_model(str(tmp_path / "tiny.gguf"))
    assert folder == resolve_model(str(tmp_path / "tiny.gguf"))  # made once
    logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(IDS).logits for f in (source, folder)]
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].std()  # bf16 in between
    assert not list((tmp_path / "cache" / "grpo-recipes").glob("tmp*"))


def write_gguf(gguf, source, path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    c = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["x", "y", "xy", "xx", *(f"t{i}" for i in range(4, c.vocab_size))])
    writer.add_token_merges(["x y", "x x"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"} | {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up")}
    names |= {"self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, p in model.named_parameters():
        name = name.removesuffix(".weight")
        if name in top:
            target = top[name]
        else:
            _, _, layer, module = name.split(".", 3)
            target = f"blk.{layer}.{names[module]}"
        array = p.detach().numpy()
        if target.endswith(("attn_q", "attn_k")):  # GGUF interleaves the rotary halves
            heads = c.num_attention_heads if target.endswith("q") else c.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{target}.weight", array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_refuses(model_folder, tmp_path):
    with pytest.raises(UserError, match="--model /nowhere/at/all: no such folder"):
        load_tokenizer("/nowhere/at/all")
    with pytest.raises(UserError, match="no such file; give"):
        resolve_model(str(tmp_path / "a.gguf"))
    with pytest.raises(UserError, match=r"no config\.json and no \.gguf"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.bin").touch()
    with pytest.raises(UserError, match=r"only \.gguf can be read"):
        resolve_model(str(tmp_path / "a.bin"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"several \.gguf files"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="--lora-rank 0"):
        load_policy(Policy(model_folder(), lora_rank=0))
    with pytest.raises(UserError, match="--lora-targets: 'nope'"):
        load_policy(Policy(model_folder(), lora_targets="nope"))
    with pytest.raises(UserError, match=r"--adapter .*: no adapter_config\.json"):
        load_policy(Policy(model_folder(), adapter=tmp_path))
    made, wider = tmp_path / "adapter", write_model(tmp_path / "wider", hidden_size=128)
    save_adapter(load_policy(Policy(model_folder(), lora_rank=2, lora_targets="q_proj")), made)
    for other, there in ((wider, r"has \[64, 128\] there"), (model_folder("phi3"), "has no such layer")):
        with pytest.raises(UserError, match=rf"--adapter .*q_proj.lora_A.weight does not fit: --model {there}"):
            check_policy(Policy(str(other), adapter=made))
    check_policy(Policy(model_folder(), adapter=made))
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainable_parameters(torch.nn.Linear(2, 2).requires_grad_(False))
    config = AutoConfig.from_pretrained(model_folder())
    check_context(config, 24, 1000)
    with pytest.raises(UserError, match=r"--max-prompt-tokens 25 and --max-completion-tokens 1000 .* 1024"):
        check_context(config, 25, 1000)


def test_no_chat_template(model_folder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(model_folder(), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), chat_template=False).pad_token_id == 0


def test_unknown_hub_name(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--model nobody/nothing: could not load the tokenizer"):
        load_tokenizer("nobody/nothing")


def test_what_stands_for_the_model_in_a_record(model_folder):
    assert str(Policy(model_folder()).source) == model_folder()
    assert Policy("owner/name").source == ["owner/name"]
