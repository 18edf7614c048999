"""How large a rollout engine may be: sequences at a time and KV cache, from free memory, model and lengths."""

from __future__ import annotations

from typing import NamedTuple

from grpo.errors import UserError
from grpo_rollout.fit.memory import GIB, Dims

KV_BLOCK = 16
"""tokens of the KV cache that vLLM allocates at a time, as the engine tells it to on a GPU"""
DEFAULT_FRACTION = 0.97
"""fraction of the card that may be in use where --gpu-memory-gib sets no limit"""


class EngineSizes(NamedTuple):
    """What an engine is made with."""

    max_model_len: int
    """tokens of the longest sequence, prompt and completion"""
    max_num_seqs: int
    """sequences decoded at a time; more of them wait for their turn"""
    max_num_batched_tokens: int
    """maximum number of tokens in one forward pass; longer prompts are taken in pieces"""
    kv_tokens: int
    """tokens that the KV cache holds"""
    kv_cache_bytes: int
    working_bytes: int
    """what the engine takes beside weights and KV cache, estimated from above"""


def kv_bytes_per_token(model: Dims, bytes_per_value: int = 2) -> int:
    """Keys and values of all layers for one token."""
    return 2 * model.layers * model.kv_heads * model.head_dim * bytes_per_value


def working_bytes(model: Dims, tokens: int, sequences: int, *, cuda_graphs: bool = True) -> int:
    """What a forward pass of `tokens` tokens and the sampling of `sequences` next tokens need.

    The sum of: activations in bf16 (residual, normed input, qkv and both halves of the MLP are alive together, and once
    more as inputs of graphs); the largest layer's weight (gate and up together) dequantized to bf16; logits of the
    sequences in bf16 and three times in fp32 (logits, tempered logits, log-probabilities); and what captured graphs
    hold."""
    activations = tokens * (6 * model.hidden + 3 * model.intermediate) * 2 * 2
    weight = 2 * model.intermediate * model.hidden * 2
    logits = sequences * model.vocab * (2 + 3 * 4)
    graphs = GIB // 2 if cuda_graphs else 0
    return activations + weight + logits + graphs


def card_limit(total_bytes: int, limit_bytes: int | None) -> int:
    """Bytes of a card that may be in use: the limit that --gpu-memory-gib sets, or 97% of the card without one.

    Raises UserError, naming the flag, for a limit above what the card has."""
    if limit_bytes is None:
        return int(total_bytes * DEFAULT_FRACTION)
    if limit_bytes > total_bytes:
        raise UserError(
            f"--gpu-memory-gib {limit_bytes / GIB:.1f} is more than the card has ({total_bytes / GIB:.1f} GiB); lower "
            "it, or leave it out to use the whole card"
        )
    return limit_bytes


def must_be_free(sizes: EngineSizes, total_bytes: int, limit_bytes: int | None) -> int:
    """Bytes of the card that must be free for the engine to wake and work within `card_limit`.

    Where they are free, PyTorch may keep the blocks that it cached while training, and need not ask the driver for
    memory at each step."""
    return total_bytes - card_limit(total_bytes, limit_bytes) + sizes.kv_cache_bytes + sizes.working_bytes


def captured_batches(sequences: int) -> list[int]:
    """Numbers of sequences for which a decode step is captured as a CUDA graph: each step runs in the next larger one.

    The largest number, `sequences`, is always captured, since a step without a graph takes many times as long. There
    are few in between, because each costs seconds at the start: 1, 2, 4, 8, then where the tiles of the NF4 product end
    (16, 32, 64, ...) and once halfway."""
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < sequences:
        sizes += [3 * sizes[-1] // 2, 2 * sizes[-1]]
    return [size for size in sizes if size < sequences] + [sequences]


def attention_splits(context: int) -> int:
    """Number of parts into which a decode step may cut the keys of a sequence, to be combined by a second kernel.

    One up to 1,024 tokens, which a multiprocessor finishes before the second kernel could start. Above that, as many as
    vLLM allows by default, since a few long sequences would leave most multiprocessors without work."""
    return 1 if context <= 1024 else 32


def engine_sizes(
    model: Dims,
    *,
    total_bytes: int,
    free_bytes: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    sequences: int,
    limit_bytes: int | None = None,
    kv_bytes_per_value: int = 2,
    kv_block: int = KV_BLOCK,
    cuda_graphs: bool = True,
) -> EngineSizes:
    """The largest engine that fits: at most `sequences` at a time, each of which can reach its full length.

    total_bytes, free_bytes: of the card, when the trainer's weights, adapter and optimizer are loaded already.
    limit_bytes: bytes of the card that may be in use, all that is used already included (see `card_limit`).
    kv_block: tokens of the KV cache that are allocated at a time.
    The KV cache gets what is left beside `working_bytes`. It holds every running sequence at full length, so that none
    is ever evicted and computed again; where that does not fit, fewer sequences run at a time. Training may use the
    memory of the KV cache, which is released then.
    Raises UserError, naming flags, where not one sequence fits."""
    for name, value in [
        ("max_prompt_tokens", max_prompt_tokens),
        ("max_completion_tokens", max_completion_tokens),
        ("sequences", sequences),
    ]:
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    allowed_bytes = card_limit(total_bytes, limit_bytes)
    used_bytes = total_bytes - free_bytes
    length = max_prompt_tokens + max_completion_tokens
    per_token = kv_bytes_per_token(model, kv_bytes_per_value)
    per_sequence = -(-length // kv_block) * kv_block
    # Prompts are short beside completions: a small first pass costs little time and bounds the activations.
    tokens = max(min(2048, sequences * max_prompt_tokens), sequences, 64)

    for running in range(sequences, 0, -1):
        working = working_bytes(model, tokens, running, cuda_graphs=cuda_graphs)
        kv_tokens = running * per_sequence + kv_block  # vLLM takes one block for itself
        if used_bytes + working + kv_tokens * per_token <= allowed_bytes:
            return EngineSizes(length, running, tokens, kv_tokens, kv_tokens * per_token, working)
    kv_bytes = (per_sequence + kv_block) * per_token
    need_bytes = used_bytes + working + kv_bytes
    raise UserError(
        f"one sequence of {max_prompt_tokens} + {max_completion_tokens} tokens needs {need_bytes / GIB:.1f} GiB "
        f"({used_bytes / GIB:.1f} in use, {working / GIB:.1f} to work in, {kv_bytes / GIB:.1f} of KV cache), more than "
        f"the {allowed_bytes / GIB:.1f} GiB allowed; raise --gpu-memory-gib, or shorten --max-prompt-tokens or "
        "--max-completion-tokens"
    )
