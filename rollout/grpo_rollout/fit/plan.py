"""What a run takes of a card, by part and phase, before a weight is read; and the sizes that keep it within a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from grpo.errors import UserError
from grpo.lazy import torch
from grpo.policy.chat import check_context
from grpo.policy.models import Policy, check_policy
from grpo.sampler import Rollout
from grpo_rollout.fit.memory import GIB, Dims, PolicySize, dims, kept_bytes, policy_size, training_bytes
from grpo_rollout.fit.sizing import EngineSizes, card_limit, engine_sizes, kv_bytes_per_token

NO_LIMIT_BYTES = 1 << 62
"""stands for the limit where there is none"""
CONTEXT_BYTES = int(0.65 * GIB)
"""CUDA's context, its libraries and their workspaces, as measured on an H100"""
GRAPH_BYTES = GIB // 2
"""captured graphs and buffers that the engine holds at rest"""
FRAGMENT_BYTES = GIB // 4
"""memory that PyTorch's allocator holds in pieces too small to use"""
MAX_MICRO_BATCH_TOKENS = 16_384
"""micro-batch size above which larger micro-batches are no faster"""
DEQUANTIZE_TOKENS = 300
"""number of tokens whose products take as long as dequantizing the weights once, as each pass of a micro-batch does"""
HOST_LAYER_S, HOST_STEP_S = 3.5e-3, 4.1e-3
"""seconds that a slow host takes to launch one layer of a training pass, and one decode step. Small models and short
micro-batches wait for the host (8 x 1,024 tokens of Llama 3.1 8B in micro-batches of 2,048; 512 tokens of Qwen2.5
1.5B)"""
OFFLOAD_COST = 1.05
"""factor on the seconds of a micro-batch whose layers' inputs travel to host memory and back"""
SPARE_FRACTION = 0.05
"""fraction of the limit kept free when deciding how many layers may keep their activations"""
DECODE_BYTES_PER_S, KV_BYTES_PER_S, TRAIN_FLOPS = 1.0e12, 2.5e12, 5.5e14
"""rates of one H100 with Llama 3.1 8B (8, 64 and 256 x 256 tokens in 1.26, 2.04 and 4.04 s; 0.28 s to train the first,
with activations kept), for a rough forecast"""
DECODE_SEQUENCES = 180
"""number of sequences at which a decode step takes twice as long as reading the weights alone"""


@dataclass(frozen=True)
class Card:
    """Flags of the card: which engine samples, and how much memory the run may take."""

    engine: Literal["auto", "vllm", "torch"] = "auto"
    """engine that samples; auto: vLLM on a GPU where it is installed, else PyTorch"""
    gpu_memory_gib: float | None = None
    """memory that everything on the card may take together, in GiB, as nvidia-smi shows it; None: the whole card"""
    micro_batch_tokens: int | None = None
    """padded tokens per forward and backward pass; None: what is fastest of what fits"""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """type of vLLM's KV cache; auto: the model's; fp8 takes half the memory"""
    fused_nf4: bool | None = None
    """whether vLLM multiplies 4-bit weights with our fused kernel; None: where it is fast and passes a trial"""
    dry_run: bool = False
    """whether to print the plan (memory by part, tokens and expected seconds per step) and stop"""

    def check(self) -> None:
        """Raise UserError for a limit that is not a number of GiB."""
        if self.gpu_memory_gib is not None and not 0 < self.gpu_memory_gib < math.inf:
            raise UserError(
                f"--gpu-memory-gib {self.gpu_memory_gib:g} must be above 0; leave it out to use the whole card"
            )


@dataclass(frozen=True)
class Plan:
    """The sizes that a run is made with, and the memory that they take. On a CPU it is the plan for a GPU."""

    limit_bytes: int | None
    """bytes of the card that may be in use; None where there is neither a card nor --gpu-memory-gib"""
    resident: dict[str, int]
    """bytes in use all the time, by part"""
    generate: dict[str, int]
    """further bytes in use while sampling"""
    train: dict[str, int]
    """further bytes in use while training"""
    sequences: int
    """number of sequences decoded at a time"""
    micro_batch_tokens: int
    """padded tokens per forward and backward pass"""
    offload: bool
    """whether the inputs of the layers wait for the backward pass in host memory"""
    kept_on_gpu: int
    """number of layers that keep their activations for the backward pass on a GPU; the others run forward twice"""
    on_cpu: bool
    """whether the run itself is on a CPU"""
    tokens_per_step: int
    """prompt and completion tokens of this process per step, where every completion is as long as it can be"""
    generate_seconds: float
    """forecast of the seconds per step for sampling, on an H100, where every completion is as long as it can be"""
    train_seconds: float
    """forecast of the seconds per step for training"""

    @property
    def kept_layers(self) -> int | None:
        """Number of layers that keep their activations. None on a CPU, where all of them do: memory is not short."""
        return None if self.on_cpu else self.kept_on_gpu

    @property
    def peak_bytes(self) -> int:
        """Bytes in use in the fuller phase."""
        return sum(self.resident.values()) + max(sum(self.generate.values()), sum(self.train.values()))

    @property
    def engine_gib(self) -> float | None:
        """GiB that the engine may fill: the limit, less what the optimizer takes from the first step on."""
        return None if self.limit_bytes is None else (self.limit_bytes - self.resident["optimizer"]) / GIB

    def __str__(self) -> str:
        """The plan as a table, for --dry-run."""
        lines = [f"{'memory, GiB':34}{'always':>9}{'generate':>10}{'train':>9}"]
        lines += [f"  {name:32}{value / GIB:9.2f}" for name, value in self.resident.items()]
        lines += [f"  {name:32}{'':9}{value / GIB:10.2f}" for name, value in self.generate.items()]
        lines += [f"  {name:32}{'':19}{value / GIB:9.2f}" for name, value in self.train.items()]
        always = sum(self.resident.values())
        sums = [always, always + sum(self.generate.values()), always + sum(self.train.values())]
        limit = "no limit" if self.limit_bytes is None else f"limit {self.limit_bytes / GIB:.2f}"
        lines.append(f"  {'in all, ' + limit:32}{sums[0] / GIB:9.2f}{sums[1] / GIB:10.2f}{sums[2] / GIB:9.2f}")
        inputs = "wait in the host's memory" if self.offload else "stay on the card"
        kept = f", and of {self.kept_on_gpu} their activations" if self.kept_on_gpu else ""
        lines += [
            f"{self.tokens_per_step:,} tokens per step at most; {self.sequences} sequences decoded at a time, "
            f"{self.micro_batch_tokens:,} tokens per micro-batch; layers' inputs {inputs}{kept}",
            f"forecast for one H100, every completion at its limit: {self.generate_seconds:.0f} s to generate, "
            f"{self.train_seconds:.0f} s to train, per step",
        ]
        return "\n".join(lines)


def make_plan(policy: Policy, rollout: Rollout, card: Card, *, questions: int, device: torch.device | str) -> Plan:
    """The sizes with which both phases of a step fit: sequences at a time, tokens per micro-batch, offloading, and how
    many layers keep their activations. Reads the model's config, and no weight.

    questions: number of questions of this process per step. device: where the run will be; a CPU has no limit of its
    own, and --gpu-memory-gib then asks for the plan of a card.
    Raises UserError, naming flags and with the memory by part, where nothing fits or the model cannot be had."""
    from grpo.policy.layers import MODEL_TYPES

    card.check()
    device = torch.device(device)
    _, config, modules = check_policy(policy)
    check_context(config, rollout.max_prompt_tokens, rollout.max_completion_tokens)
    limit_bytes = None if card.gpu_memory_gib is None else int(card.gpu_memory_gib * GIB)
    if device.type == "cuda":
        limit_bytes = card_limit(torch.cuda.mem_get_info(device)[1], limit_bytes)
    return plan_within(
        limit_bytes,
        dims(config),
        policy_size(config, modules, policy),
        rollout,
        card,
        sequences=questions * rollout.group_size,
        fused=config.get_text_config().model_type in MODEL_TYPES,
        on_cpu=device.type == "cpu",
    )


def plan_within(
    limit_bytes: int | None,
    model: Dims,
    size: PolicySize,
    rollout: Rollout,
    card: Card,
    *,
    sequences: int,
    fused: bool = True,
    on_cpu: bool = False,
) -> Plan:
    """The plan of `make_plan`, by arithmetic alone. sequences: number of samples of this process per step.

    fused: whether `grpo.policy.layers` replaces the layers' forward.
    Raises UserError, naming flags and with the memory by part, where nothing fits."""
    allowed_bytes = NO_LIMIT_BYTES if limit_bytes is None else limit_bytes
    resident = {
        "CUDA context": CONTEXT_BYTES,
        "weights, 4 bit": size.quantized_bytes,
        "weights, 16 bit": size.dense_bytes,
        "adapter and gradients": size.adapter_bytes,
        "optimizer": size.optimizer_bytes,
    }
    adapter_copy = 2 * size.trainable
    engine = engine_sizes(
        model,
        total_bytes=allowed_bytes,
        free_bytes=allowed_bytes - sum(resident.values()) - adapter_copy,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_completion_tokens=rollout.max_completion_tokens,
        sequences=sequences,
        limit_bytes=allowed_bytes,
        kv_bytes_per_value=1 if card.kv_cache_dtype == "fp8" else 2,
    )
    resident["engine: graphs, adapter's copy"] = GRAPH_BYTES + adapter_copy

    step = _TrainingStep(model, size, rollout, sequences, fused)
    free_bytes = allowed_bytes - sum(resident.values()) - FRAGMENT_BYTES
    spare_bytes = int(SPARE_FRACTION * allowed_bytes)

    def kept_layers(way: _Way) -> int:
        if way.offload or limit_bytes is None or not fused:
            return 0  # without a limit nobody knows what is left; `kept_bytes` counts fused layers only
        return step.layers_kept_in(free_bytes - spare_bytes, way)

    rows = [card.micro_batch_tokens] if card.micro_batch_tokens else step.sizes_to_try()
    ways = [_Way(tokens, offload) for tokens in rows for offload in (False, True)]
    fitting = [way for way in ways if step.work_bytes(way) <= free_bytes]
    if not fitting:
        raise UserError(step.does_not_fit(ways[-1], resident, allowed_bytes))
    way = min(fitting, key=lambda way: step.seconds(way, kept_layers(way)))
    kept = kept_layers(way)
    train = {"layers' inputs, one layer, head": step.work_bytes(way), "fragments": FRAGMENT_BYTES}
    if kept:
        train["kept activations"] = kept * step.kept_bytes(way)
    return Plan(
        limit_bytes=limit_bytes,
        resident=resident,
        generate={"KV cache": engine.kv_cache_bytes, "work": engine.working_bytes - GRAPH_BYTES},
        train=train,
        sequences=engine.max_num_seqs,
        micro_batch_tokens=way.micro_batch_tokens,
        offload=way.offload,
        kept_on_gpu=kept,
        on_cpu=on_cpu,
        tokens_per_step=sequences * step.longest,
        generate_seconds=_generate_seconds(model, size, rollout, engine, sequences),
        train_seconds=step.seconds(way, kept),
    )


class _Way(NamedTuple):
    """One way of dividing a step."""

    micro_batch_tokens: int
    offload: bool


class _TrainingStep(NamedTuple):
    """A step of longest sequences: what its micro-batches take, in bytes and in seconds."""

    model: Dims
    size: PolicySize
    rollout: Rollout
    sequences: int
    fused: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.rollout.max_prompt_tokens + self.rollout.max_completion_tokens

    def rows(self, way: _Way) -> int:
        """Number of longest sequences per micro-batch; a micro-batch holds one at least."""
        return max(1, way.micro_batch_tokens // self.longest)

    def sizes_to_try(self) -> list[int]:
        """Tokens of the micro-batches that are worth trying, the largest first."""
        most = min(self.sequences, max(1, MAX_MICRO_BATCH_TOKENS // self.longest))
        return [rows * self.longest for rows in range(most, 0, -1)]

    def work_bytes(self, way: _Way) -> int:
        """See `training_bytes`."""
        return training_bytes(
            self.model,
            self.size,
            tokens=max(way.micro_batch_tokens, self.longest),
            completion_tokens=self.rows(way) * self.rollout.max_completion_tokens,
            offload=way.offload,
            fused=self.fused,
        )

    def kept_bytes(self, way: _Way) -> int:
        """See `kept_bytes`."""
        return kept_bytes(self.model, tokens=max(way.micro_batch_tokens, self.longest))

    def layers_kept_in(self, free_bytes: int, way: _Way) -> int:
        """Number of layers whose activations fit into `free_bytes`, beside the work of a micro-batch."""
        left_bytes = max(0, free_bytes - self.work_bytes(way))
        return min(self.model.layers, left_bytes // self.kept_bytes(way))

    def seconds(self, way: _Way, kept_layers: int) -> float:
        """Forecast for an H100. Each micro-batch has a forward pass, a second one for layers that do not keep their
        activations, and a backward pass (as long as a forward pass, since frozen weights need no gradient)."""
        micros = -(-self.sequences // self.rows(way))
        tokens = self.sequences * self.longest + micros * DEQUANTIZE_TOKENS
        device_seconds = tokens * 2 * self.size.parameters / TRAIN_FLOPS
        host_seconds = micros * self.model.layers * HOST_LAYER_S
        passes = 3 - kept_layers / self.model.layers
        return passes * max(device_seconds, host_seconds) * (OFFLOAD_COST if way.offload else 1)

    def does_not_fit(self, way: _Way, resident: dict[str, int], allowed_bytes: int) -> str:
        """The message for a step that does not fit even in this way, the one that takes least."""
        work = self.work_bytes(way)
        need = sum(resident.values()) + work + FRAGMENT_BYTES
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in resident.items())
        return (
            f"training on {max(way.micro_batch_tokens, self.longest)} tokens at a time needs {need / GIB:.1f} GiB "
            f"({parts}, work {work / GIB:.2f}), more than the {allowed_bytes / GIB:.1f} allowed; raise "
            "--gpu-memory-gib, or lower --max-completion-tokens, --micro-batch-tokens or --lora-rank"
        )


def _generate_seconds(model: Dims, size: PolicySize, rollout: Rollout, engine: EngineSizes, sequences: int) -> float:
    """Forecast for an H100: seconds to sample a step whose completions are all as long as they can be."""
    at_a_time = engine.max_num_seqs
    weights = size.quantized_bytes + 2 * model.vocab * model.hidden  # a decode step reads one 16-bit matrix, the head
    keys = at_a_time * (rollout.max_prompt_tokens + rollout.max_completion_tokens / 2) * kv_bytes_per_token(model)
    decode = weights * (1 + at_a_time / DECODE_SEQUENCES) / DECODE_BYTES_PER_S + keys / KV_BYTES_PER_S
    return -(-sequences // at_a_time) * rollout.max_completion_tokens * max(decode, HOST_STEP_S)
