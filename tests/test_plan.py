"""The plan of a run: the true shapes of the big models within their cards, and what never exceeds a limit."""

import math
import re

import pytest
from conftest import ROOT, load_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.policy.models import target_modules
from grpo_rollout.fit.memory import GIB
from grpo_rollout.fit.plan import describe, make_plan

BIG = load_recipe(ROOT / "benchmarks" / "random_model.py").SHAPES
MODULES = {name: target_modules(config, "all-linear") for name, config in BIG.items()}


def plan(name, **changes):
    arguments = {"lora_rank": 16, "sequences": 8, "max_prompt_tokens": 256, "max_completion_tokens": 768}
    return make_plan(BIG[name], MODULES[name], **(arguments | changes))


@pytest.mark.parametrize(
    ("name", "completion_tokens", "changes", "limit"),
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
def test_the_cards_that_the_recipes_promise(name, completion_tokens, changes, limit):
    """limit: in units of 1e9 bytes, the smaller reading of a card's GB."""
    made = plan(name, max_completion_tokens=completion_tokens, gpu_memory_gib=limit * 1e9 / GIB, **changes)
    assert made.peak <= limit * 1e9
    assert made.micro_batch_tokens >= 256 + completion_tokens
    if completion_tokens <= 1024:
        assert made.sequences == changes.get("sequences", 8)  # none waits its turn


@pytest.mark.parametrize("shapes", BIG)
def test_the_page_of_a_recipe_shows_its_plan(shapes):
    name = "countdown_zero" if shapes == "qwen25_3b" else shapes
    args = load_recipe(ROOT / "recipes" / f"{name}_grpo.py").Args()
    page = (ROOT / "docs" / "recipes" / f"{name}.md").read_text()
    [gib] = re.findall(r"([\d.]+) GiB is a card of", page)
    made = plan(
        shapes,
        lora_rank=args.lora_rank,
        sequences=args.prompts_per_step * args.group_size,
        max_prompt_tokens=args.max_prompt_tokens,
        max_completion_tokens=args.max_completion_tokens,
        gpu_memory_gib=float(gib),
    )
    assert describe(made) in page


def test_parts_by_hand():
    made = plan("llama31_8b")
    assert (made.limit, made.engine_gb) == (None, None)
    assert made.generate["KV cache"] == (8 * 1024 + 16) * 128 * 1024
    assert made.resident["optimizer"] == 8 * 41_943_040
    assert made.tokens_per_step == 8 * 1024
    assert made.peak == sum(made.resident.values()) + max(sum(made.generate.values()), sum(made.train.values()))
    # As measured on an H100: 256 + 256 tokens; all layers' activations kept; 256 + 768 within 10 GB.
    for sequences, seconds in ((8, 1.26), (64, 2.04), (256, 4.04)):
        made = plan("llama31_8b", max_completion_tokens=256, sequences=sequences)
        assert made.generate_seconds == pytest.approx(seconds, rel=0.1)
    made = plan("llama31_8b", max_completion_tokens=256, gpu_memory_gib=76)
    assert (made.kept_layers, made.train_seconds) == (32, pytest.approx(0.28, rel=0.15))
    made = plan("llama31_8b", gpu_memory_gib=10e9 / GIB)
    assert (made.generate_seconds, made.train_seconds) == (pytest.approx(4.3, rel=0.1), pytest.approx(0.87, rel=0.15))
    # A small model waits for the host.
    made = plan("qwen25_1_5b", max_completion_tokens=512, gpu_memory_gib=5e9 / GIB)
    assert (made.generate_seconds, made.train_seconds) == (pytest.approx(2.2, rel=0.1), pytest.approx(0.46, rel=0.4))


@settings(max_examples=25)
@given(
    st.sampled_from(["phi4", "qwen25_1_5b"]),
    st.floats(1, 40),
    st.integers(1, 64),
    st.integers(1, 20_000),
    st.none() | st.integers(1, 50_000),
)
def test_a_plan_fits_or_says_which_flags_help(name, gigabytes, sequences, completion_tokens, micro_batch_tokens):
    try:
        made = plan(
            name,
            gpu_memory_gib=gigabytes,
            sequences=sequences,
            max_completion_tokens=completion_tokens,
            micro_batch_tokens=micro_batch_tokens,
        )
    except ValueError as error:
        flags = (
            "--max-completion-tokens",
            "max_position_embeddings" if "made for" in str(error) else "--gpu-memory-gib",
        )
        if not all(flag in str(error) for flag in flags):
            raise
        return
    assert made.peak <= made.limit == int(gigabytes * GIB)
    assert 1 <= made.sequences <= sequences
    if micro_batch_tokens:
        assert made.micro_batch_tokens == micro_batch_tokens
    assert made.engine_gb < gigabytes


def test_layers_inputs_go_to_the_host_where_they_must_or_where_it_pays():
    long = {"max_completion_tokens": 20_224, "sequences": 1}
    limits = [plan("llama31_8b", gpu_memory_gib=g, **long).offload for g in (24, 20, 16)]
    assert limits == [False, False, True]
    with pytest.raises(ValueError, match=r"needs .* GiB \(CUDA context .* weights, 4 bit 3.35.*raise --gpu-memory-gib"):
        plan("llama31_8b", gpu_memory_gib=11, kv_cache_dtype="fp8", **long)
    # One micro-batch of 8192 tokens rather than two of 4096, for which the card would wait for the host.
    short = [plan("llama31_8b", gpu_memory_gib=g, max_completion_tokens=768, sequences=8) for g in (8.7, 9.31, 12)]
    assert [(made.micro_batch_tokens, made.offload) for made in short] == [(5120, True), (8192, True), (4096, False)]


def test_less_memory_means_smaller_micro_batches_then_fewer_sequences():
    plans = [plan("llama31_8b", gpu_memory_gib=g, sequences=32) for g in (11, 10, 8.5)]
    assert plans[0].micro_batch_tokens > plans[1].micro_batch_tokens > plans[2].micro_batch_tokens == 1024 * 4
    assert plans[0].sequences > plans[1].sequences > plans[2].sequences


def test_what_memory_is_left_keeps_layers_from_being_computed_twice():
    """One limit more is one layer more, never at the price of the limit, of a micro-batch of 4096 tokens, or of layers
    whose activations are not counted."""
    plans = [plan("llama31_8b", gpu_memory_gib=g, sequences=32) for g in (11, 13, 16, 24, 32, 76)]
    kept = [made.kept_layers for made in plans]
    assert kept[0] == 0 < kept[1] < kept[2] < kept[-1] == 32
    for made in plans[1:-1]:
        assert made.micro_batch_tokens >= 4096
        assert made.peak < made.limit * 0.95
        assert "kept activations" in made.train
        assert f"and of {made.kept_layers} their activations" in describe(made)
    # Two of three forward and backward passes are left.
    assert plans[-1].train_seconds == pytest.approx(plans[0].train_seconds * 2 / 3, rel=0.03)
    assert plan("llama31_8b").kept_layers == 0  # on a CPU nobody knows what is left
    other = type(BIG["llama31_8b"])(**BIG["llama31_8b"].to_dict() | {"model_type": "llama"})
    other.model_type = "another"
    assert make_plan(
        other, MODULES["llama31_8b"], lora_rank=16, sequences=32, max_prompt_tokens=256, max_completion_tokens=768,
        gpu_memory_gib=76,
    ).kept_layers == 0  # fmt: skip


def test_refusals_name_the_flag():
    for value in (-1, 0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"--gpu-memory-gib {value:g} must be above 0"):
            plan("qwen25_1_5b", gpu_memory_gib=value)
    with pytest.raises(ValueError, match=r"--max-completion-tokens 16384 are more than the 16384 tokens"):
        plan("phi4", max_completion_tokens=16_384)


def test_description_shows_every_part_and_the_sums():
    made = plan("qwen25_1_5b", gpu_memory_gib=4.5)
    text = describe(made)
    for part in (*made.resident, *made.generate, *made.train):
        assert part in text
    always = sum(made.resident.values())
    sums = [always, always + sum(made.generate.values()), always + sum(made.train.values())]
    line = next(line for line in text.splitlines() if "in all" in line)
    assert "limit 4.50" in line
    assert [float(x) for x in line.split()[-3:]] == [round(s / GIB, 2) for s in sums]
    assert "8 sequences decoded at a time" in text
