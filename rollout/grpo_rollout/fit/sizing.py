"""How large a rollout engine may be: sequences at a time and KV cache, from free memory, model and lengths."""

from typing import NamedTuple

from grpo_rollout.fit.memory import GIB, Dims

KV_BLOCK = 16
"""tokens of the KV cache that vLLM allocates at a time, as the engine tells it to on a GPU"""


class Sizes(NamedTuple):
    max_model_len: int
    """tokens of the longest sequence, prompt and completion"""
    max_num_seqs: int
    """sequences decoded at a time; more wait their turn"""
    max_num_batched_tokens: int
    """tokens of one forward pass at most; longer prompts are taken in pieces"""
    kv_tokens: int
    kv_cache_bytes: int
    working_bytes: int
    """what the engine takes beside weights and KV cache, an estimate from above"""


def kv_bytes_per_token(model: Dims, bytes_per_value: int = 2) -> int:
    """Keys and values of every layer."""
    return 2 * model.layers * model.kv_heads * model.head_dim * bytes_per_value


def working_bytes(model: Dims, tokens: int, sequences: int, *, cuda_graphs: bool = True) -> int:
    """What a forward pass of `tokens` tokens and the sampling of `sequences` next tokens need, in bytes.

    The sum of: activations in bf16 (residual, normed, qkv and the two halves of the MLP alive together, once
    more as graph inputs), the largest layer's weight dequantized to bf16 (gate and up together), logits of the
    sequences in bf16 and, thrice, fp32 (logits, tempered, log-probabilities), and what captured graphs hold."""
    activations = tokens * (6 * model.hidden + 3 * model.intermediate) * 2 * 2
    weight = 2 * model.intermediate * model.hidden * 2
    logits = sequences * model.vocab * (2 + 3 * 4)
    graphs = GIB // 2 if cuda_graphs else 0
    return activations + weight + logits + graphs


def allowed_bytes(total_bytes: int, budget_bytes: int | None) -> int:
    """What may be in use of a card: the budget, or without one 97% of it. Raises ValueError, naming the flag, for a
    budget that is more than the card has."""
    if budget_bytes is not None and budget_bytes > total_bytes:
        raise ValueError(
            f"--gpu-memory-gib {budget_bytes / GIB:.1f} is more than the card has ({total_bytes / GIB:.1f} GiB)"
        )
    return int(total_bytes * 0.97) if budget_bytes is None else budget_bytes


def must_be_free(sizes: Sizes, total_bytes: int, budget_bytes: int | None) -> int:
    """Bytes of the card that must be free for the engine to wake and work without passing `allowed_bytes`.

    Where they are, PyTorch keeps what it cached while training, and need not ask the driver for it at each step."""
    return total_bytes - allowed_bytes(total_bytes, budget_bytes) + sizes.kv_cache_bytes + sizes.working_bytes


def captured_batches(sequences: int) -> list[int]:
    """Sequences of the decode steps that are captured as CUDA graphs: each step runs in the next larger one.

    `sequences`, the most there are, is always the last: a step above it would run without a graph, many times as slow.
    Few in between, as each costs seconds at the start: 1, 2, 4, 8, then where the NF4 product's tiles end (16, 32, 64,
    ...) and once halfway."""
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < sequences:
        sizes += [3 * sizes[-1] // 2, 2 * sizes[-1]]
    return [size for size in sizes if size < sequences] + [sequences]


def attention_splits(context: int) -> int:
    """How many parts a decode step may cut a sequence's keys into, to be combined by a kernel of its own.

    One up to 1,024 tokens: a multiprocessor is through with those before the second kernel would have started. Above,
    as many as vLLM allows by default: a few long sequences would leave most multiprocessors idle."""
    return 1 if context <= 1024 else 32


def engine_sizes(
    model: Dims,
    *,
    total_bytes: int,
    free_bytes: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    sequences: int,
    budget_bytes: int | None = None,
    kv_bytes_per_value: int = 2,
    kv_block: int = KV_BLOCK,
    cuda_graphs: bool = True,
) -> Sizes:
    """The largest engine that fits: at most `sequences` at a time, each able to reach its full length.

    total_bytes, free_bytes: of the card, the trainer's weights, adapter and optimizer being loaded already.
    budget_bytes: what may be in use on it, all that is used now included (None: 97% of the card).
    --gpu-memory-gib is in GiB, 2**30 bytes, as nvidia-smi's MiB are in 2**20: 15 allows 15,360 MiB there.
    kv_block: tokens of the KV cache that are allocated at a time.
    What is left after `working_bytes` is for the KV cache. The KV cache holds every running sequence at full
    length, so none is ever evicted and computed again; where that does not fit, fewer run at a time.
    Training may use the KV cache's share: it is released then.
    Raises ValueError, naming the flags, if not one sequence fits."""
    for name, value in [
        ("max_prompt_tokens", max_prompt_tokens),
        ("max_completion_tokens", max_completion_tokens),
        ("sequences", sequences),
    ]:
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    limit = allowed_bytes(total_bytes, budget_bytes)
    used = total_bytes - free_bytes
    length = max_prompt_tokens + max_completion_tokens
    per_token = kv_bytes_per_token(model, kv_bytes_per_value)
    per_sequence = -(-length // kv_block) * kv_block
    # Prompts are short against completions: a small first pass costs little and bounds the activations.
    tokens = max(min(2048, sequences * max_prompt_tokens), sequences, 64)

    for running in range(sequences, 0, -1):
        working = working_bytes(model, tokens, running, cuda_graphs=cuda_graphs)
        kv_tokens = running * per_sequence + kv_block  # one block is vLLM's own
        if used + working + kv_tokens * per_token <= limit:
            return Sizes(length, running, tokens, kv_tokens, kv_tokens * per_token, working)
    need = used + working + (per_sequence + kv_block) * per_token
    raise ValueError(
        f"one sequence of {max_prompt_tokens} + {max_completion_tokens} tokens needs {need / GIB:.1f} GiB "
        f"({used / GIB:.1f} in use, {working / GIB:.1f} to work in, {(need - used - working) / GIB:.1f} of KV cache), "
        f"more than the {limit / GIB:.1f} GiB allowed; raise --gpu-memory-gib, or shorten --max-prompt-tokens or "
        "--max-completion-tokens"
    )
