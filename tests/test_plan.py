"""The plan of a run: the true shapes of the big models within their cards, and what never exceeds a limit."""

import dataclasses
import functools
import math
import re

import pytest
from conftest import ROOT, load_recipe, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.policy.models import Policy, target_modules
from grpo.sampler import Rollout
from grpo_rollout.fit.memory import GIB, dims, policy_size
from grpo_rollout.fit.plan import Card, make_plan, plan_within

BIG = load_recipe(ROOT / "benchmarks" / "random_model.py").SHAPES


@functools.cache
def sized(name, lora_rank):
    """The sizes of a big model and of its policy. Counting takes a moment."""
    config = BIG[name]
    modules = target_modules(config, "all-linear")
    return dims(config), policy_size(config, modules, Policy(name, lora_rank=lora_rank))


def plan(name, *, lora_rank=16, sequences=8, prompt=256, completion=768, limit=None, fused=True, **card):
    """limit: GiB."""
    rollout = Rollout(max_prompt_tokens=prompt, max_completion_tokens=completion)
    limit_bytes = None if limit is None else int(limit * GIB)
    return plan_within(limit_bytes, *sized(name, lora_rank), rollout, Card(**card), sequences=sequences, fused=fused)


@pytest.mark.parametrize(
    ("name", "completion", "changes", "gigabytes"),
    [
        ("phi4", 256, {"sequences": 6}, 15),
        ("phi4", 1024, {}, 16),
        ("llama31_8b", 768, {}, 10),
        ("mistral_7b", 768, {}, 10),
        ("qwen25_7b", 768, {}, 10),
        ("qwen25_1_5b", 512, {}, 5),
        ("llama31_8b", 20_224, {}, 24),
        ("llama33_70b", 768, {"lora_rank": 8}, 48),
    ],
)
def test_the_cards_that_the_recipes_promise(name, completion, changes, gigabytes):
    """gigabytes: units of 1e9 bytes, the smaller reading of a card's GB."""
    made = plan(name, completion=completion, limit=gigabytes * 1e9 / GIB, **changes)
    assert made.peak_bytes <= gigabytes * 1e9
    assert made.micro_batch_tokens >= 256 + completion
    if completion <= 1024:
        assert made.sequences == changes.get("sequences", 8)  # none waits its turn


@pytest.mark.parametrize("shapes", BIG)
def test_the_page_of_a_recipe_shows_its_plan(shapes, tmp_path):
    name = "countdown_zero" if shapes == "qwen25_3b" else shapes
    args = load_recipe(ROOT / "recipes" / f"{name}_grpo.py").Args()
    page = (ROOT / "docs" / "recipes" / f"{name}.md").read_text()
    [gib] = re.findall(r"([\d.]+) GiB is a card of", page)
    BIG[shapes].save_pretrained(tmp_path)
    made = make_plan(
        dataclasses.replace(args.policy, model=str(tmp_path)),
        args.rollout,
        dataclasses.replace(args.card, gpu_memory_gib=float(gib)),
        questions=args.prompts_per_step,
        device="cpu",
    )
    assert str(made) in page
    assert made.kept_layers is None  # on a CPU every layer keeps its activations; the page shows the plan for a GPU


def test_parts_by_hand():
    made = plan("llama31_8b")
    assert (made.limit_bytes, made.engine_gib) == (None, None)
    assert made.generate["KV cache"] == (8 * 1024 + 16) * 128 * 1024
    assert made.resident["optimizer"] == 8 * 41_943_040
    assert made.tokens_per_step == 8 * 1024
    assert made.peak_bytes == sum(made.resident.values()) + max(sum(made.generate.values()), sum(made.train.values()))
    # As measured on an H100: 256 + 256 tokens; all layers' activations kept; 256 + 768 within 10 GB.
    for sequences, seconds in ((8, 1.26), (64, 2.04), (256, 4.04)):
        made = plan("llama31_8b", completion=256, sequences=sequences)
        assert made.generate_seconds == pytest.approx(seconds, rel=0.1)
    made = plan("llama31_8b", completion=256, limit=76)
    assert (made.kept_layers, made.train_seconds) == (32, pytest.approx(0.28, rel=0.15))
    made = plan("llama31_8b", limit=10e9 / GIB)
    assert (made.generate_seconds, made.train_seconds) == (pytest.approx(4.3, rel=0.1), pytest.approx(0.87, rel=0.15))
    # A small model waits for the host.
    made = plan("qwen25_1_5b", completion=512, limit=5e9 / GIB)
    assert (made.generate_seconds, made.train_seconds) == (pytest.approx(2.2, rel=0.1), pytest.approx(0.46, rel=0.4))


@settings(max_examples=50)
@given(
    st.sampled_from(["phi4", "qwen25_1_5b"]),
    st.floats(1, 40),
    st.integers(1, 64),
    st.integers(1, 16_000),
    st.none() | st.integers(1, 50_000),
)
def test_a_plan_fits_or_says_which_flags_help(name, limit, sequences, completion, micro_batch_tokens):
    changes = {"sequences": sequences, "completion": completion, "micro_batch_tokens": micro_batch_tokens}
    try:
        made = plan(name, limit=limit, **changes)
    except UserError as error:
        if not all(flag in str(error) for flag in ("--max-completion-tokens", "--gpu-memory-gib")):
            raise
        return
    assert made.peak_bytes <= made.limit_bytes == int(limit * GIB)
    assert 1 <= made.sequences <= sequences
    assert micro_batch_tokens in (None, made.micro_batch_tokens)
    assert made.engine_gib < limit


def test_layers_inputs_go_to_the_host_where_they_must_or_where_it_pays():
    long = {"completion": 20_224, "sequences": 1}
    assert [plan("llama31_8b", limit=g, **long).offload for g in (24, 20, 16)] == [False, False, True]
    with pytest.raises(UserError, match=r"needs .* GiB \(CUDA context .* weights, 4 bit 3.35.*raise --gpu-memory-gib"):
        plan("llama31_8b", limit=11, kv_cache_dtype="fp8", **long)
    # One micro-batch of 8192 tokens rather than two of 4096, for which the card would wait for the host.
    short = [plan("llama31_8b", limit=g) for g in (8.7, 9.31, 12)]
    assert [(made.micro_batch_tokens, made.offload) for made in short] == [(5120, True), (8192, True), (4096, False)]


def test_less_memory_means_smaller_micro_batches_then_fewer_sequences():
    plans = [plan("llama31_8b", limit=g, sequences=32) for g in (11, 10, 8.5)]
    assert plans[0].micro_batch_tokens > plans[1].micro_batch_tokens > plans[2].micro_batch_tokens == 1024 * 4
    assert plans[0].sequences > plans[1].sequences > plans[2].sequences


def test_what_memory_is_left_keeps_layers_from_being_computed_twice():
    """More memory keeps more layers, never at the price of the limit, of a micro-batch of 4096 tokens, or of layers
    whose activations are not counted."""
    plans = [plan("llama31_8b", limit=g, sequences=32) for g in (11, 13, 16, 24, 32, 76)]
    kept = [made.kept_layers for made in plans]
    assert kept[0] == 0 < kept[1] < kept[2] < kept[-1] == 32
    for made in plans[1:-1]:
        assert made.micro_batch_tokens >= 4096
        assert made.peak_bytes < made.limit_bytes * 0.95
        assert "kept activations" in made.train
        assert f"and of {made.kept_layers} their activations" in str(made)
    # Two of three forward and backward passes are left.
    assert plans[-1].train_seconds == pytest.approx(plans[0].train_seconds * 2 / 3, rel=0.03)
    assert plan("llama31_8b").kept_layers == 0  # without a limit nobody knows what is left
    assert plan("llama31_8b", limit=76, sequences=32, fused=False).kept_layers == 0


def test_the_flags_reach_the_plan(tmp_path, monkeypatch):
    write_model(tmp_path, "qwen3", max_position_embeddings=64)
    policy, rollout = Policy(str(tmp_path), lora_rank=4), Rollout(4, 1.0, 16, 48)

    def made(device="cpu", **card):
        return make_plan(policy, rollout, Card(**card), questions=3, device=device)

    assert made().tokens_per_step == 3 * 4 * 64
    assert made(micro_batch_tokens=100).micro_batch_tokens == 100
    assert made().generate["KV cache"] == 2 * made(kv_cache_dtype="fp8").generate["KV cache"]
    for adapted in (dataclasses.replace(policy, lora_rank=8), dataclasses.replace(policy, load_in_4bit=False)):
        assert make_plan(adapted, rollout, Card(), questions=3, device="cpu").peak_bytes > made().peak_bytes
    # On a GPU the card has a limit of its own. Qwen3's layers are not fused, so no activations of theirs are counted.
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (GIB, 20 * GIB))
    assert made("cuda").limit_bytes == int(0.97 * 20 * GIB)
    assert (made("cuda").kept_layers, made("cpu").kept_layers) == (0, None)
    with pytest.raises(UserError, match=r"--gpu-memory-gib 21\.0 is more than the card has"):
        made("cuda", gpu_memory_gib=21)
    for value in (-1, 0, math.nan, math.inf):
        with pytest.raises(UserError, match=f"--gpu-memory-gib {value:g} must be above 0"):
            made(gpu_memory_gib=value)
    rollout = Rollout(4, 1.0, 16, 49)
    with pytest.raises(UserError, match=r"--max-completion-tokens 49 are more than the 64 tokens"):
        made()


def test_the_table_shows_every_part_and_the_sums():
    made = plan("qwen25_1_5b", limit=4.5)
    text = str(made)
    for part in (*made.resident, *made.generate, *made.train):
        assert part in text
    always = sum(made.resident.values())
    sums = [always, always + sum(made.generate.values()), always + sum(made.train.values())]
    line = next(line for line in text.splitlines() if "in all" in line)
    assert "limit 4.50" in line
    assert [float(x) for x in line.split()[-3:]] == [round(s / GIB, 2) for s in sums]
    assert "8 sequences decoded at a time" in text
