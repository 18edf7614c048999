"""A training step on random tokens: seconds, how much of them the GPU works, kernels, memory. Needs a GPU.

    python benchmarks/random_model.py llama31_8b MODEL
    python benchmarks/train.py MODEL                          # 8 x (256 + 768) tokens, three micro-batch sizes
    python benchmarks/train.py MODEL --micro-batch-tokens 4096 --offload

Every layer runs forward twice (activation checkpointing), except those of --kept-layers.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch.autograd import DeviceType

from grpo.advantages import group_advantages
from grpo.batch import StepTotals, micro_batches
from grpo.logprobs import completion_logps
from grpo.objective import Objective, policy_loss
from grpo.policy.models import Policy, load_policy, trainable_parameters
from grpo.sampler import Completion
from grpo_rollout.fit.memory import GIB


@dataclass
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """folder of the model, quantized or not"""
    group_size: int = 8
    """number of completions of the one prompt"""
    prompt_tokens: int = 256
    """number of tokens in the prompt"""
    completion_tokens: int = 768
    """number of tokens in each completion"""
    lora_rank: int = 16
    """rank of the adapter on all linear layers"""
    micro_batch_tokens: tuple[int, ...] = (2048, 4096, 8192)
    """numbers of prompt and completion tokens per micro-batch, one measurement each"""
    offload: bool = False
    """whether the layers' inputs wait for the backward pass in host memory"""
    kept_layers: int = 0
    """number of layers that keep their activations rather than compute them again in the backward pass"""
    fused: bool = True
    """whether layers take fewer passes over memory (grpo.policy.layers)"""
    steps: int = 5
    """number of timed steps per size, after one that is not timed"""
    profile: int = 0
    """number of kernels of a step to list, the slowest first"""


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    prompt: list[int],
    sampled: Sequence[Completion],
    *,
    micro_batch_tokens: int,
) -> float:
    """Loss, gradients and an optimizer step on one group with random rewards.

    Returns the mean |log-probability of the trainer - log-probability of the sampler|, in nats."""
    advantages = group_advantages(torch.rand(len(sampled)), len(sampled))
    ids = [c.token_ids for c in sampled]
    micros = micro_batches(
        [prompt] * len(ids), ids, [c.logps for c in sampled], advantages,
        max_tokens=micro_batch_tokens, step=StepTotals(sum(map(len, ids)), len(ids), max(map(len, ids))),
        device=next(model.parameters()).device,
    )  # fmt: skip
    gaps = []  # read at the end, because reading a number waits for the GPU
    for micro in micros:
        new, _ = completion_logps(model, micro)
        loss, _ = policy_loss(
            new, None, micro.advantages, micro.mask, Objective(), sampler_logps=micro.sampler_logps,
            token_count=micro.step.tokens, sequence_count=micro.step.sequences,
        )  # fmt: skip
        loss.backward()
        gaps.append(((new.detach() - micro.sampler_logps).abs() * micro.mask).sum())
    optimizer.step()
    optimizer.zero_grad()
    return float(sum(gaps)) / sum(map(len, ids))


def busy(events: Sequence) -> float:
    """Milliseconds in which at least one kernel ran: kernels that overlap count once."""
    total = end = 0.0
    for e in sorted((e for e in events if e.device_type == DeviceType.CUDA), key=lambda e: e.time_range.start):
        total += max(0.0, e.time_range.end - max(end, e.time_range.start))
        end = max(end, e.time_range.end)
    return total / 1e3


def profiled(what: str, run: Callable[[], object], most: int) -> None:
    """Print the kernels that `run` launches, at most `most` of them, the largest sums of time first."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    kernels = [e for e in profiler.key_averages() if e.self_device_time_total]
    total, count = sum(e.self_device_time_total for e in kernels) / 1e3, sum(e.count for e in kernels)
    print(
        f"{what}: {count} launches, {total:.1f} ms of kernels; {1e3 * wall:.1f} ms, "
        f"{busy(profiler.events()):.1f} of them with a kernel running"
    )
    if most:
        print("ms, calls, kernel")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:most]:
        print(f"{e.self_device_time_total / 1e3:9.2f}{e.count:7}  {e.key[:110]}")


def main(args: Args) -> None:
    model = load_policy(
        Policy(args.model, lora_rank=args.lora_rank, lora_alpha=args.lora_rank),
        kept_layers=args.kept_layers,
        offload=args.offload,
        fused=args.fused,
        device="cuda",
    )
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.0)  # with the memory of a real one
    rng = random.Random(0)
    prompt = [rng.randrange(10, 5000) for _ in range(args.prompt_tokens)]
    sampled = [
        Completion(
            [rng.randrange(10, 5000) for _ in range(args.completion_tokens)], [-8.0] * args.completion_tokens, True
        )
        for _ in range(args.group_size)
    ]
    print(f"device {torch.cuda.get_device_name()}, torch {torch.__version__}; {args.group_size} x "
          f"({args.prompt_tokens} + {args.completion_tokens}) tokens")  # fmt: skip
    for tokens in args.micro_batch_tokens:

        def step(tokens: int = tokens) -> None:
            train_step(model, optimizer, prompt, sampled, micro_batch_tokens=tokens)

        step()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        marks = [time.perf_counter()]
        for _ in range(args.steps):
            step()  # ends by reading a number, which waits for the GPU
            marks.append(time.perf_counter())
        seconds = [b - a for a, b in itertools.pairwise(marks)]
        print(
            f"micro-batches of {tokens:5} tokens: {statistics.median(seconds):.3f} s per step ({min(seconds):.3f} to "
            f"{max(seconds):.3f}); PyTorch {torch.cuda.max_memory_allocated() / GIB:.2f} GiB allocated, "
            f"{torch.cuda.max_memory_reserved() / GIB:.2f} reserved",
            flush=True,
        )
        profiled("  under the profiler", step, args.profile)


if __name__ == "__main__":
    main(tyro.cli(Args))
