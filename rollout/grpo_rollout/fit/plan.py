"""What a run takes of a card, by part and phase, before a weight is read; and the sizes that keep it within a limit."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grpo.policy.layers import MODEL_TYPES
from grpo.policy.models import check_context
from grpo_rollout.fit.memory import GIB, Dims, PolicySize, dims, kept_bytes, policy_size, training_bytes
from grpo_rollout.fit.sizing import allowed_bytes, engine_sizes, kv_bytes_per_token

CONTEXT_BYTES = int(0.65 * GIB)
"""CUDA's context, its libraries and their workspaces, as measured on an H100"""
GRAPH_BYTES = GIB // 2
"""what the engine's captured graphs and buffers hold at rest"""
FRAGMENT_BYTES = GIB // 4
"""what PyTorch's allocator holds back in pieces too small to use"""
LONGEST_MICRO_BATCH = 16_384
"""tokens; larger micro-batches are no faster"""
DEQUANTIZE_TOKENS = 300
"""how many tokens' products take as long as dequantizing the weights once, as each pass of a micro-batch does"""
HOST_LAYER_S, HOST_STEP_S = 3.5e-3, 4.1e-3
"""what a host takes to launch one of a training pass's layers, and a decode step: small models and short micro-batches
wait for it (of a slow host; 8 x 1,024 tokens of Llama 3.1 8B at 2,048 a micro-batch, 512 tokens of Qwen2.5 1.5B)"""
OFFLOAD_COST = 1.05
"""how much longer a micro-batch takes whose layers' inputs travel to the host's memory and back"""
SPARE = 0.05
"""of the limit: what kept activations leave free, since no run fails for want of them"""
DECODE_BYTES_PER_S, KV_BYTES_PER_S, TRAIN_FLOPS = 1.0e12, 2.5e12, 5.5e14
"""one H100's with Llama 3.1 8B (8, 64 and 256 x 256 tokens in 1.26, 2.04 and 4.04 s; 0.28 s to train the first, its
activations kept), for a rough forecast"""
DECODE_SEQUENCES = 180
"""so many sequences more take as long again as reading the weights"""


class Plan(NamedTuple):
    limit: int | None
    """bytes of the card that may be in use; None where there is neither a card nor --gpu-memory-gib"""
    resident: dict[str, int]
    """bytes in use all the time, by part"""
    generate: dict[str, int]
    """bytes in use beside those while sampling"""
    train: dict[str, int]
    """bytes in use beside those while training"""
    sequences: int
    """decoded at a time"""
    micro_batch_tokens: int
    """padded tokens of one forward and backward pass"""
    offload: bool
    """whether the layers' inputs wait for the backward pass in the host's memory"""
    kept_layers: int
    """how many keep their activations for the backward pass rather than compute them again"""
    tokens_per_step: int
    """prompt and completion, if every completion is as long as can be; of this process"""
    generate_seconds: float
    """of a step with the longest completions, on an H100: a forecast"""
    train_seconds: float

    @property
    def peak(self) -> int:
        """bytes of the fuller phase"""
        return sum(self.resident.values()) + max(sum(self.generate.values()), sum(self.train.values()))

    @property
    def engine_gb(self) -> float | None:
        """GiB that the engine may fill: the limit, less what the optimizer takes after the first step."""
        return None if self.limit is None else (self.limit - self.resident["optimizer"]) / GIB


def make_plan(
    config: Any,
    modules: list[str],
    *,
    lora_rank: int,
    sequences: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    micro_batch_tokens: int | None = None,
    load_in_4bit: bool = True,
    adapter: str | Path | None = None,
    gpu_memory_gib: float | None = None,
    kv_cache_dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of a run: sequences at a time, tokens of a micro-batch and offloading so that both phases fit.

    config, modules: of `grpo.policy.models.check_policy`. sequences: sampled in a step by this process.
    adapter: a trained adapter that is trained further: its rank and layers count, not `lora_rank` and `modules`.
    micro_batch_tokens: None takes what is fastest of what fits, at most 16,384. gpu_memory_gib: GiB of the card for the
    whole process, as nvidia-smi shows it; None: what the card has (on a CPU no limit). Layers' inputs are offloaded
    where the larger micro-batches that fit then save more than the copies cost, and layers keep their activations where
    memory is left.
    Raises ValueError, with the memory by part and naming the flags, where nothing fits."""
    if gpu_memory_gib is not None and not 0 < gpu_memory_gib < math.inf:
        raise ValueError(f"--gpu-memory-gib {gpu_memory_gib:g} must be above 0; leave it out to use the whole card")
    device = torch.device(device)
    model = dims(config)
    size = policy_size(config, modules, lora_rank=lora_rank, load_in_4bit=load_in_4bit, adapter=adapter)
    budget = None if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    limit = allowed_bytes(torch.cuda.mem_get_info(device)[1], budget) if device.type == "cuda" else budget

    longest = max_prompt_tokens + max_completion_tokens
    check_context(config, max_prompt_tokens, max_completion_tokens)
    resident = {
        "CUDA context": CONTEXT_BYTES,
        "weights, 4 bit": size.quantized_bytes,
        "weights, 16 bit": size.dense_bytes,
        "adapter and gradients": size.adapter_bytes,
        "optimizer": size.optimizer_bytes,
    }
    room = (1 << 62) if limit is None else limit
    engine = engine_sizes(
        model,
        total_bytes=room,
        free_bytes=room - sum(resident.values()) - 2 * size.trainable,
        max_prompt_tokens=max_prompt_tokens,
        max_completion_tokens=max_completion_tokens,
        sequences=sequences,
        budget_bytes=room,
        kv_bytes_per_value=1 if kv_cache_dtype == "fp8" else 2,
    )
    resident["engine: graphs, adapter's copy"] = GRAPH_BYTES + 2 * size.trainable
    generate = {"KV cache": engine.kv_cache_bytes, "work": engine.working_bytes - GRAPH_BYTES}
    fused = config.get_text_config().model_type in MODEL_TYPES

    def work(tokens: int, offload: bool) -> int:
        rows = max(1, tokens // longest)
        return training_bytes(
            model,
            size,
            tokens=max(tokens, longest),
            completion_tokens=rows * max_completion_tokens,
            offload=offload,
            fused=fused,
        )

    left = room - sum(resident.values()) - FRAGMENT_BYTES
    rows = [micro_batch_tokens] if micro_batch_tokens else [n * longest for n in _rows(longest, sequences)]

    def layers_kept(tokens: int, offload: bool) -> int:
        spare = left - work(tokens, False) - int(SPARE * room)
        if offload or limit is None or not fused:
            return 0
        return min(model.layers, max(0, spare) // kept_bytes(model, tokens=max(tokens, longest)))

    def seconds(way: tuple[int, bool]) -> float:
        """Of a step of longest sequences: forward passes, second ones where they are not kept, backward passes (frozen
        weights need no gradient of their own)."""
        tokens, offload = way
        micros = -(-sequences // max(1, tokens // longest))
        busy = (sequences * longest + micros * DEQUANTIZE_TOKENS) * 2 * size.parameters / TRAIN_FLOPS
        passes = 3 - layers_kept(tokens, offload) / model.layers
        return passes * max(busy, micros * model.layers * HOST_LAYER_S) * (OFFLOAD_COST if offload else 1)

    ways = [(tokens, offload) for tokens in rows for offload in (False, True) if work(tokens, offload) <= left]
    tokens, offload = min(ways, key=seconds, default=(rows[-1], True))
    kept = layers_kept(tokens, offload)
    if not ways:
        need = sum(resident.values()) + work(tokens, True) + FRAGMENT_BYTES
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in resident.items())
        raise ValueError(
            f"training on {max(tokens, longest)} tokens at a time needs {need / GIB:.1f} GiB ({parts}, work "
            f"{work(tokens, True) / GIB:.2f}), more than the {room / GIB:.1f} allowed; raise --gpu-memory-gib, or lower "
            "--max-completion-tokens, --micro-batch-tokens or --lora-rank"
        )
    train = {"layers' inputs, one layer, head": work(tokens, offload), "fragments": FRAGMENT_BYTES}
    if kept:
        train["kept activations"] = kept * kept_bytes(model, tokens=max(tokens, longest))
    generate_seconds = _forecast(model, size, sequences, engine.max_num_seqs, max_prompt_tokens, max_completion_tokens)
    return Plan(
        limit,
        resident,
        generate,
        train,
        engine.max_num_seqs,
        tokens,
        offload,
        kept,
        sequences * longest,
        generate_seconds,
        seconds((tokens, offload)),
    )


def _rows(longest: int, sequences: int) -> range:
    """Sequences of a micro-batch that are worth trying, most first."""
    return range(min(sequences, max(1, LONGEST_MICRO_BATCH // longest)), 0, -1)


def _forecast(
    model: Dims, size: PolicySize, sequences: int, at_a_time: int, prompt_tokens: int, completion_tokens: int
) -> float:
    """Seconds to generate a step whose completions are all as long as can be, on an H100."""
    weights = size.quantized_bytes + 2 * model.vocab * model.hidden  # one 16-bit matrix, the head, is read a token
    keys = at_a_time * (prompt_tokens + completion_tokens / 2) * kv_bytes_per_token(model)
    step = weights * (1 + at_a_time / DECODE_SEQUENCES) / DECODE_BYTES_PER_S + keys / KV_BYTES_PER_S
    return -(-sequences // at_a_time) * completion_tokens * max(step, HOST_STEP_S)


def describe(plan: Plan) -> str:
    """The plan as a table, for --dry-run."""
    lines = [f"{'memory, GiB':34}{'always':>9}{'generate':>10}{'train':>9}"]
    lines += [f"  {name:32}{value / GIB:9.2f}" for name, value in plan.resident.items()]
    lines += [f"  {name:32}{'':9}{value / GIB:10.2f}" for name, value in plan.generate.items()]
    lines += [f"  {name:32}{'':19}{value / GIB:9.2f}" for name, value in plan.train.items()]
    always = sum(plan.resident.values())
    sums = [always, always + sum(plan.generate.values()), always + sum(plan.train.values())]
    limit = "no limit" if plan.limit is None else f"limit {plan.limit / GIB:.2f}"
    lines.append(f"  {'in all, ' + limit:32}{sums[0] / GIB:9.2f}{sums[1] / GIB:10.2f}{sums[2] / GIB:9.2f}")
    inputs = "wait in the host's memory" if plan.offload else "stay on the card"
    kept = f", and of {plan.kept_layers} their activations" if plan.kept_layers else ""
    lines += [
        f"{plan.tokens_per_step:,} tokens a step at most; {plan.sequences} sequences decoded at a time, "
        f"{plan.micro_batch_tokens:,} tokens a micro-batch; layers' inputs {inputs}{kept}",
        f"forecast for one H100, every completion at its limit: {plan.generate_seconds:.0f} s to generate, "
        f"{plan.train_seconds:.0f} s to train a step",
    ]
    return "\n".join(lines)
