"""Engine sizes: by hand for Llama 3.1 8B, and the properties that keep a run from running out of memory."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GemmaConfig, LlamaConfig

from grpo.errors import UserError
from grpo_rollout.fit.memory import GIB, Dims, dims
from grpo_rollout.fit.sizing import (
    KV_BLOCK,
    EngineSizes,
    attention_splits,
    captured_batches,
    engine_sizes,
    kv_bytes_per_token,
    must_be_free,
    working_bytes,
)

LLAMA_8B = Dims(layers=32, hidden=4096, intermediate=14336, kv_heads=8, head_dim=128, vocab=128_256)


def sizes(**changes):
    arguments = {
        "total_bytes": 80 * GIB,
        "free_bytes": 73 * GIB,
        "max_prompt_tokens": 256,
        "max_completion_tokens": 256,
        "sequences": 8,
    }
    return engine_sizes(LLAMA_8B, **(arguments | changes))


def test_dims_of_configs_that_name_or_imply_heads():
    assert dims(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)).head_dim == 128
    assert dims(GemmaConfig(hidden_size=3072, num_attention_heads=16, head_dim=256)).head_dim == 256  # not 3072 / 16
    config = LlamaConfig(num_attention_heads=4, hidden_size=64)
    config.num_key_value_heads = None  # multi-head attention
    assert dims(config).kv_heads == 4


def test_kv_cache_of_llama_8b():
    assert kv_bytes_per_token(LLAMA_8B) == 128 * 1024  # 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert kv_bytes_per_token(LLAMA_8B, 1) == 64 * 1024


def test_everything_asked_for_where_there_is_room():
    made = sizes()
    assert (made.max_model_len, made.max_num_seqs) == (512, 8)
    assert made.kv_tokens == 8 * 512 + KV_BLOCK
    assert made.kv_cache_bytes == made.kv_tokens * 128 * 1024
    assert made.max_num_batched_tokens == 2048


def test_lengths_are_rounded_up_to_blocks():
    assert sizes(max_prompt_tokens=250, max_completion_tokens=251, sequences=1).kv_tokens == 512 + KV_BLOCK


def test_fewer_sequences_under_a_limit_and_the_limit_is_kept():
    asked = sizes(sequences=64, max_completion_tokens=1792)
    tight = sizes(sequences=64, max_completion_tokens=1792, limit_bytes=15 * GIB)
    assert asked.max_num_seqs == 64
    assert 1 <= tight.max_num_seqs < 64
    assert 7 * GIB + tight.working_bytes + tight.kv_cache_bytes <= 15 * GIB
    one_more = (tight.max_num_seqs + 1) * 2048 * 128 * 1024
    assert 7 * GIB + tight.working_bytes + one_more > 15 * GIB  # no sequence was given away


def test_fp8_cache_holds_twice_as_many():
    bf16 = sizes(sequences=512, max_completion_tokens=3840, limit_bytes=20 * GIB)
    fp8 = sizes(sequences=512, max_completion_tokens=3840, limit_bytes=20 * GIB, kv_bytes_per_value=1)
    assert 1.9 <= fp8.max_num_seqs / bf16.max_num_seqs <= 2.1


def test_work_grows_with_tokens_and_sequences():
    base = working_bytes(LLAMA_8B, 2048, 8)
    assert working_bytes(LLAMA_8B, 4096, 8) > base
    assert working_bytes(LLAMA_8B, 2048, 9) - base == 128_256 * 14  # a row of logits, bf16 and thrice fp32
    assert base - working_bytes(LLAMA_8B, 2048, 8, cuda_graphs=False) == GIB // 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"limit_bytes": 8 * GIB}, "--gpu-memory-gib"),
        ({"max_completion_tokens": 10_000_000}, "--max-completion-tokens"),
        ({"limit_bytes": 81 * GIB}, "more than the card has"),
        ({"sequences": 0}, "sequences"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens"),
    ],
)
def test_refusals_name_the_flag(changes, named):
    with pytest.raises(UserError, match=named):
        sizes(**changes)


@given(
    free=st.integers(10, 79),
    prompt=st.integers(1, 4096),
    completion=st.integers(1, 8192),
    sequences=st.integers(1, 600),
    limit=st.none() | st.integers(12, 80),
)
def test_never_over_the_limit_and_always_room_for_each_sequence(free, prompt, completion, sequences, limit):
    limit_bytes = None if limit is None else limit * GIB
    try:
        made = sizes(
            free_bytes=free * GIB,
            max_prompt_tokens=prompt,
            max_completion_tokens=completion,
            sequences=sequences,
            limit_bytes=limit_bytes,
        )
    except UserError:
        return
    assert (80 - free) * GIB + made.working_bytes + made.kv_cache_bytes <= (limit_bytes or 0.97 * 80 * GIB)
    assert 1 <= made.max_num_seqs <= sequences
    assert made.kv_tokens >= made.max_num_seqs * (prompt + completion)
    assert made.max_num_batched_tokens >= made.max_num_seqs  # a decode step fits one pass


def test_what_must_be_free_is_what_the_engine_takes_and_what_nobody_may():
    sizes = EngineSizes(512, 8, 2048, 4112, kv_cache_bytes=4 * GIB, working_bytes=GIB)
    assert must_be_free(sizes, 80 * GIB, 24 * GIB) == (80 - 24 + 5) * GIB
    assert must_be_free(sizes, 80 * GIB, None) == pytest.approx(7.4 * GIB)


def test_only_long_sequences_are_split_for_attention():
    assert [attention_splits(n) for n in (512, 1024, 1025, 20_480)] == [1, 1, 32, 32]


def test_captured_batches():
    assert captured_batches(1) == [1]
    assert captured_batches(6) == [1, 2, 4, 6]  # a group of 6 runs in a graph, not without one
    assert captured_batches(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert captured_batches(300) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300]


@given(st.integers(1, 2000))
def test_every_batch_is_captured_and_padded_to_less_than_twice_its_size(sequences):
    sizes = captured_batches(sequences)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == sequences
    assert all(big < 2 * (small + 1) for small, big in itertools.pairwise(sizes))
