"""A KV cache that is written and read in place while the torch engine decodes.

transformers copies the whole cache twice for every token: DynamicCache concatenates, and the SDPA attention repeats
keys and values for every query head that shares them. Both are replaced through transformers' own interfaces for caches
and attention, so its models stay as they are."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 64
"""number of columns that a full cache grows by; it is copied each time it grows"""
DECODING = "sdpa_decoding"
"""name under which `decode_attention` is registered with transformers"""


def growing_cache(columns: int) -> Cache:
    """An empty cache for at most `columns` columns; the model adds a `GrowingLayer` for each of its layers."""
    layer: Any = functools.partial(GrowingLayer, columns)
    return Cache(layer_class_to_replicate=layer)


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer: [rows, key heads, columns, head dim], views of longer buffers.

    Every column is kept, for models with a sliding window too: their mask leaves out the old ones."""

    def __init__(self, max_columns: int) -> None:
        super().__init__()
        self.max_columns = max_columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, key heads, new columns, head dim] and return all columns so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        filled = self.get_seq_length()
        self.buffers = [
            _append(b, filled, new, self.max_columns) for b, new in zip(self.buffers, (key_states, value_states))
        ]
        return self._view(filled + key_states.shape[2])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row indices[i] was. indices: [rows] int64, repeats allowed."""
        filled = self.get_seq_length()
        self.buffers = [b.index_select(0, indices) for b in self.buffers]
        self._view(filled)

    def _view(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (b[:, :, :columns] for b in self.buffers)
        self.keys, self.values = keys, values
        return keys, values


def _append(buffer: torch.Tensor, filled: int, new: torch.Tensor, max_columns: int) -> torch.Tensor:
    """The buffer (a longer one where it is too short) with `new` written after its first `filled` columns."""
    end = filled + new.shape[2]
    if end > buffer.shape[2]:
        longer = new.new_empty(*new.shape[:2], min(end + BLOCK, max_columns), new.shape[3])
        longer[:, :, :filled] = buffer[:, :, :filled]
        buffer = longer
    buffer[:, :, filled:end] = new
    return buffer


def decode_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token per row, in the form that transformers asks for; for more tokens, transformers' own.

    query: [rows, heads, 1, dim]; key, value: [rows, key heads, columns, dim]; attention_mask: [rows, 1, 1, columns]
    bool or None. Returns ([rows, 1, heads, dim], None). The query heads that share a key head are passed as several
    queries of it, instead of repeating the key head for each of them: the same products without the copies."""
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] > 1 or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    shared = rearrange(query, "rows (heads group) 1 dim -> rows heads group dim", group=groups)
    output = scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
    return rearrange(output, "rows heads group dim -> rows 1 (heads group) dim"), None


AttentionInterface.register(DECODING, decode_attention)
AttentionMaskInterface.register(DECODING, sdpa_mask)


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """A block in which a model of transformers, with or without PEFT's wrapper, attends by `decode_attention`.

    A model that was loaded with another attention than SDPA keeps it."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(DECODING)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
