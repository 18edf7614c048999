"""Rollouts by the vLLM engine on a trainer's 4-bit model: tokens a second, sync, memory, agreement. Needs a GPU.

python benchmarks/rollout.py MODEL                                  # 8 completions of 256 + 256 tokens, LoRA r=16
python benchmarks/rollout.py MODEL --group-size 64 --dequantize
python benchmarks/rollout.py MODEL --two-copies                     # what vLLM's own copy of the weights adds
"""

import contextlib
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from grpo.models import load_policy
from grpo_rollout.engine import Sampling
from grpo_rollout.vllm_engine import VLLMEngine

GIB = 1 << 30


@dataclass
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """folder of the model, quantised or not"""
    group_size: int = 8
    """completions of one prompt, all at a time"""
    prompt_tokens: int = 256
    """tokens of the prompt"""
    completion_tokens: int = 256
    """tokens of each completion"""
    lora_rank: int = 16
    """of the adapter on all linear layers"""
    gpu_memory_gb: float | None = None
    """what the process may use of the card"""
    dequantize: bool = False
    """decode with 16-bit weights"""
    two_copies: bool = False
    """only load vLLM with weights of its own beside the trainer's, and measure the memory"""
    profile: bool = False
    """list the kernels of 16 decode steps"""
    repeats: int = 3
    """calls of generate that are timed"""


def used() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def timed(run, repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextlib.contextmanager
def stage(name: str):
    """One part failing leaves the others their turn."""
    try:
        yield
    except Exception as error:
        print(f"{name}: FAILED {type(error).__name__}: {error}", flush=True)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def perturb(model, scale: float, seed: int) -> None:
    """An adapter that matters: B is zero at first."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)


def main(args: Args) -> None:
    start = time.perf_counter()
    torch.cuda.init()
    print(f"device {torch.cuda.get_device_name()}, {used():.2f} GiB in use by an empty process")
    model = load_policy(args.model, lora_rank=args.lora_rank, device="cuda")
    torch.cuda.empty_cache()
    weights = used()
    print(f"trainer loaded: {time.perf_counter() - start:.1f} s, {weights:.2f} GiB in use", flush=True)

    if args.two_copies:
        import vllm

        length = args.prompt_tokens + args.completion_tokens
        vllm.LLM(args.model, quantization="bitsandbytes", enforce_eager=True, max_model_len=length,
                 max_num_seqs=args.group_size, kv_cache_memory_bytes=GIB, gpu_memory_utilization=0.05,
                 skip_tokenizer_init=True, enable_lora=True, max_lora_rank=args.lora_rank)  # fmt: skip
        torch.cuda.empty_cache()
        print(f"two copies: {used():.2f} GiB in use, {used() - weights:.2f} of it vLLM with 1 GiB of KV cache")
        return

    begin = time.perf_counter()
    engine = VLLMEngine(
        model, eos_ids=[model.config.vocab_size - 1], max_prompt_tokens=args.prompt_tokens,
        max_completion_tokens=args.completion_tokens, sequences=args.group_size, gpu_memory_gb=args.gpu_memory_gb,
        dequantize=args.dequantize, tolerance=0.3,
    )  # fmt: skip
    made = time.perf_counter() - begin
    print(f"engine made: {made:.1f} s, {used():.2f} GiB in use asleep; {engine.sizes}", flush=True)
    print(f"one copy: vLLM adds {used() - weights:.2f} GiB to the trainer's {weights:.2f}, KV cache released")

    rng = random.Random(0)
    prompt = [rng.randrange(10, 5000) for _ in range(args.prompt_tokens)]
    sampling = Sampling(max_tokens=args.completion_tokens)
    with stage("generate"):
        perturb(model, 0.01, seed=1)
        engine.sync(model)
        completions = engine.generate([prompt], args.group_size, sampling, seed=0)
        print(f"first step within {time.perf_counter() - start:.1f} s of the start; check gap {engine.gap:.2e} nats")
        print("seconds", {k: round(v, 4) for k, v in engine.seconds.items()}, flush=True)
        seconds = timed(lambda: engine.generate([prompt], args.group_size, sampling, seed=1), args.repeats)
        inside = engine.seconds
        tokens = sum(len(c.token_ids) for c in completions)
        print(
            f"generate {args.group_size} x {args.completion_tokens}: {seconds:.2f} s with waking and sleeping, "
            f"{inside['generate']:.2f} without, {tokens / inside['generate']:.0f} tokens/s; wake "
            f"{1e3 * inside['wake']:.0f} ms, sleep {1e3 * inside['sleep']:.0f} ms",
            flush=True,
        )
        again = engine.generate([prompt], args.group_size, sampling, seed=0)
        print("same seed, same tokens:", [c.token_ids for c in again] == [c.token_ids for c in completions])

    with stage("agreement"):
        gaps = []
        for c in completions:
            ids = torch.tensor([prompt + c.token_ids], device="cuda")
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            trainer = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            gaps.append((trainer - torch.tensor(c.logps)).abs())
        gap = torch.cat(gaps)
        print(f"|logp sampler - logp trainer|: mean {gap.mean():.2e}, max {gap.max():.2e} nats, {len(gap)} tokens")
        del logits

    with stage("sync"):
        in_place = timed(lambda: engine.sync(model), 20)
        print(f"sync in place: {1e3 * in_place:.2f} ms", flush=True)

    with stage("wrong sync"):
        perturb(model, 0.01, seed=2)
        try:
            engine.check(prompt)
            print("a stale adapter was NOT noticed")
        except RuntimeError as error:
            print(f"a stale adapter is noticed: {error}")
        engine.sync(model)

    with stage("training memory"):
        torch.cuda.empty_cache()
        asleep = used()
        engine._wake()
        awake = used()
        engine._sleep()
        print(f"in use: asleep {asleep:.2f}, awake {awake:.2f} GiB (KV cache {engine.sizes.kv_cache_bytes / GIB:.2f})")

    if args.profile:
        with stage("profile"):
            short = Sampling(max_tokens=17)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                engine.generate([prompt], args.group_size, short, seed=0)
            print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60))

    with stage("folder"), tempfile.TemporaryDirectory() as folder:
        engine._wake()

        def through_folder() -> None:
            model.save_pretrained(folder)
            request = engine._vllm.lora.request.LoRARequest("policy", 2, folder, load_inplace=True)
            engine.llm.llm_engine.add_lora(request)

        engine.llm.llm_engine.remove_lora(1)
        print(f"sync through an adapter folder: {1e3 * timed(through_folder, 3):.0f} ms")


if __name__ == "__main__":
    main(tyro.cli(Args))
