"""The growing cache against transformers' dynamic one, and attention without repeated heads against its SDPA."""

import pytest
import torch
from conftest import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grpo.sampler import Sampling
from grpo_rollout.torch import kv_cache
from grpo_rollout.torch.engine import TorchEngine
from grpo_rollout.torch.kv_cache import DECODING, decode_attention, decoding, growing_cache


@settings(max_examples=60)
@given(st.lists(st.one_of(st.integers(1, 9), st.lists(st.integers(0, 99), min_size=1, max_size=6)), max_size=12))
def test_equals_the_dynamic_cache(actions):
    """Any order of appended columns (numbers) and chosen rows (lists); in blocks of 4, so that buffers grow often."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs, rows = growing_cache(110), DynamicCache(), 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "BLOCK", 4)
        for action in [2, *actions]:
            if isinstance(action, list):
                indices = torch.tensor(action) % rows
                rows = len(indices)
                ours.batch_select_indices(indices)
                theirs.batch_select_indices(indices)
                continue
            for layer in range(2):
                key = torch.randn(rows, 2, action, 4, generator=generator)
                value = torch.randn(rows, 2, action, 6, generator=generator)  # values may have another width
                expected = theirs.update(key, value, layer)
                for got, want in zip(ours.update(key, value, layer), expected):
                    torch.testing.assert_close(got, want, rtol=0, atol=0)
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


def test_a_token_is_written_where_the_cache_stands():
    cache = growing_cache(10 + 2 * kv_cache.BLOCK + 7)
    key = torch.randn(3, 2, 10, 4)
    places = set()
    for _ in range(1 + 2 * kv_cache.BLOCK):
        keys, values = cache.update(key, key, 0)
        places.add((keys.data_ptr(), values.data_ptr()))
        key = torch.randn(3, 2, 1, 4)
    assert len(places) == 2  # the cache was moved once, for its second block
    for _ in range(7):
        cache.update(key, key, 0)
    assert {b.shape for b in cache.layers[0].buffers} == {(3, 2, 10 + 2 * kv_cache.BLOCK + 7, 4)}  # and no more


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [1, 5])
def test_attention_equals_sdpa_with_repeated_heads(key_heads, masked, columns):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 6 // key_heads
    query = torch.randn(3, 6, columns, 8, dtype=torch.float64)
    key, value = (torch.randn(3, key_heads, 20, 8, dtype=torch.float64)[:, :, :7] for _ in range(2))
    mask = torch.rand(3, 1, columns, 7) > 0.4 if masked else None
    if masked:
        mask[..., 0] = True
    got = decode_attention(module, query, key, value, mask, scaling=0.3)[0]
    want = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0]
    assert got.shape == (3, columns, 6, 8)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_comes_back(tmp_path, implementation):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path), attn_implementation=implementation)
    during = []

    def fail():
        with decoding(model):
            during.append(model.config._attn_implementation)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert during == [DECODING if implementation == "sdpa" else "eager"]
    assert model.config._attn_implementation == implementation


class BigTensors(TorchDispatchMode):
    """Counts operations that fill a tensor of their own with at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                self.count += tensor.untyped_storage().data_ptr() not in held
        return out


def decoding_step_makes_nothing_big(model):
    """No copy of the cache and no repeated heads: nothing big beyond the prefill, however many tokens follow."""
    engine = TorchEngine(model, eos_ids=[63])
    prompts = [[1] + [8 + i % 50 for i in range(150)], [1] + [9] * 140]

    def made(max_tokens):
        with BigTensors(2 * 150 * 16 * 2) as big:  # rows x columns x head dim x key heads
            engine.generate(prompts, 1, Sampling(temperature=0, max_tokens=max_tokens), seed=0)
        return big.count

    assert made(2) == made(40) > 0


def test_a_decoding_step_makes_nothing_of_the_caches_size(tmp_path):
    decoding_step_makes_nothing_big(AutoModelForCausalLM.from_pretrained(write_model(tmp_path)))
