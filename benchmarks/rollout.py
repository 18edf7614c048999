"""Rollouts by the vLLM engine on a trainer's 4-bit model: tokens per second, sync, memory, agreement. Needs a GPU.

python benchmarks/random_model.py llama31_8b MODEL
python benchmarks/rollout.py MODEL                              # 8 completions of 256 + 256 tokens, LoRA rank 16
python benchmarks/rollout.py MODEL --group-size 64 --dequantize
python benchmarks/rollout.py MODEL --two-copies                 # memory that a second copy of the weights takes
"""

import contextlib
import cProfile
import itertools
import pstats
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from train import profiled, train_step

from grpo.policy.models import Policy, load_policy, trainable_parameters
from grpo.sampler import Completion, Sampling
from grpo_rollout.fit.memory import GIB
from grpo_rollout.torch.engine import dense_copy
from grpo_rollout.vllm.engine import VLLMEngine


@dataclass
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """folder of the model, quantized or not"""
    group_size: int = 8
    """number of completions of the one prompt, decoded at the same time"""
    prompt_tokens: int = 256
    """number of tokens in the prompt"""
    completion_tokens: int = 256
    """number of tokens in each completion"""
    lora_rank: int = 16
    """rank of the adapter on all linear layers"""
    gpu_memory_gib: float | None = None
    """GiB of the card that may be in use; by default 97% of it"""
    dequantize: bool = False
    """whether to decode with 16-bit copies of the weights"""
    two_copies: bool = False
    """whether to only load vLLM with a second copy of the weights beside the trainer's, and print the memory in use"""
    micro_batch_tokens: int = 4096
    """number of prompt and completion tokens in a training micro-batch"""
    reference: bool = False
    """whether to compare sampler and trainer with an fp32 forward pass too (40 GB for an 8B model)"""
    profile: bool = False
    """whether to list the kernels of 16 decode steps and of a training step"""
    host_profile: bool = False
    """whether to list where the host's time goes in a call of generate"""
    fused_nf4: bool = True
    """whether nf4_linear multiplies 4-bit weights, rather than bitsandbytes' way"""
    fused_lora: bool = True
    """whether the product adds the sampler's adapter too"""
    fused_training: bool = True
    """whether the trainer's layers take fewer passes over memory (grpo.policy.layers)"""
    kept_layers: int = 0
    """number of layers that keep their activations rather than compute them again in the backward pass"""
    repeats: int = 3
    """number of timed calls of generate"""
    steps: int = 5
    """number of whole GRPO steps"""


def used() -> float:
    """GiB in use on the card, by all processes and allocators."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


class Peak(threading.Thread):
    """A block that is watched: `most` is the largest `used()` seen in it."""

    def __enter__(self) -> "Peak":
        self.most, self.ended = used(), threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.ended.wait(0.003):
            self.most = max(self.most, used())

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.join()


def timed(run, repeats: int) -> float:
    """Median duration of `repeats` runs, in seconds."""
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
    """A block whose failure is printed, so that the parts after it still run."""
    try:
        yield
    except Exception as error:
        print(f"{name}: FAILED {type(error).__name__}: {error}", flush=True)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def perturb(model, scale: float, seed: int) -> None:
    """Give the adapter's B, which starts as zeros, random values, so that the adapter matters."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)


@torch.no_grad()
def logps(model, prompt, completions, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """The model's log-probabilities of the tokens of each completion, nats."""
    out = []
    for c in completions:
        ids = torch.tensor([prompt + c.token_ids], device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        out.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return out


def report_gaps(what: str, a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    gap = (torch.cat(a) - torch.cat(b)).abs()
    print(f"|logp {what}|: mean {gap.mean():.2e}, max {gap.max():.2e} nats, {len(gap)} tokens", flush=True)


def main(args: Args) -> None:
    start = time.perf_counter()
    torch.cuda.init()
    print(f"device {torch.cuda.get_device_name()}, {used():.2f} GiB in use by an empty process")
    model = load_policy(
        Policy(args.model, lora_rank=args.lora_rank, lora_alpha=args.lora_rank),
        kept_layers=args.kept_layers,
        fused=args.fused_training,
        device="cuda",
    )
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
        max_completion_tokens=args.completion_tokens, sequences=args.group_size, gpu_memory_gib=args.gpu_memory_gib,
        dequantize=args.dequantize, fused_nf4=args.fused_nf4, fused_lora=None if args.fused_lora else False,
        tolerance=0.3,  # random weights amplify the rounding of bf16, as --reference shows
    )  # fmt: skip
    made = time.perf_counter() - begin
    print(f"engine made: {made:.1f} s, {used():.2f} GiB in use asleep; {engine.sizes}", flush=True)
    print(f"fused products: fused_nf4 {engine.fused_nf4}, fused_lora {engine.fused_lora}")
    print(f"one copy: vLLM adds {used() - weights:.2f} GiB to the trainer's {weights:.2f}, KV cache released")

    rng = random.Random(0)
    prompt = [rng.randrange(10, 5000) for _ in range(args.prompt_tokens)]
    sampling = Sampling(max_tokens=args.completion_tokens)
    with stage("generate"):
        perturb(model, 0.01, seed=1)
        engine.sync(model)
        completions = engine.generate([prompt], args.group_size, sampling, seed=0)
        print(f"first step within {time.perf_counter() - start:.1f} s of the start; check gap {engine.gap:.2e} nats")
        print("duration in seconds", {k: round(v, 4) for k, v in engine.seconds.items()}, flush=True)
        engine.check_every = 0  # the check is timed above; in training it is due once per 20 calls
        seconds = timed(lambda: engine.generate([prompt], args.group_size, sampling, seed=1), args.repeats)
        inside = engine.seconds
        tokens = sum(len(c.token_ids) for c in completions)
        print(
            f"generate {args.group_size} x {args.completion_tokens}: {seconds:.2f} s with waking and sleeping, "
            f"{inside['generate']:.2f} without, {tokens / inside['generate']:.0f} tokens/s; wake "
            f"{1e3 * inside['wake']:.0f} ms, sleep {1e3 * inside['sleep']:.0f} ms",
            flush=True,
        )
        first = timed(lambda: engine.generate([prompt], args.group_size, Sampling(max_tokens=1), seed=1), args.repeats)
        first -= engine.seconds["wake"] + engine.seconds["sleep"]
        print(f"prompt and first tokens: {1e3 * first:.0f} ms of it")
        again = engine.generate([prompt], args.group_size, sampling, seed=0)
        print("same seed, same tokens:", [c.token_ids for c in again] == [c.token_ids for c in completions])

    with stage("agreement"):
        report_gaps(
            "sampler - trainer",
            [torch.tensor(c.logps) for c in completions[:64]],
            logps(model, prompt, completions[:64]),
        )

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

    with stage("memory"):
        torch.cuda.empty_cache()
        asleep = used()
        with engine._awake():
            awake = used()
        print(f"in use: asleep {asleep:.2f}, awake {awake:.2f} GiB (KV cache {engine.sizes.kv_cache_bytes / GIB:.2f})")
        with Peak() as peak:
            engine.generate([prompt], args.group_size, sampling, seed=0)
        print(f"peak of generate: {peak.most:.2f} GiB of the card", flush=True)

    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=5e-6)

    def train(sampled: list[Completion]) -> float:
        return train_step(model, optimizer, prompt, sampled, micro_batch_tokens=args.micro_batch_tokens)

    with stage("steps"):
        for step in range(args.steps):
            torch.cuda.synchronize()
            marks = [time.perf_counter()]
            # Asking the driver every few milliseconds slows a step down, so only the first steps are watched.
            watched = Peak() if step < 2 else contextlib.nullcontext()
            with watched:
                sampled = engine.generate([prompt], args.group_size, sampling, seed=step)
                marks.append(time.perf_counter())
                gap = train(sampled)
                marks.append(time.perf_counter())
                engine.sync(model)
                marks.append(time.perf_counter())
            generate, training, sync = (b - a for a, b in itertools.pairwise(marks))
            print(
                f"step {step}: {marks[-1] - marks[0]:.2f} s = generate {generate:.2f} + train {training:.2f} + "
                f"sync {sync:.4f}; gap {gap:.2e} nats" + (f"; peak {watched.most:.2f} GiB" if step < 2 else ""),
                flush=True,
            )
        engine.check(prompt)  # raises if the last sync did not copy the trained adapter
        completions = engine.generate([prompt], args.group_size, sampling, seed=99)

    if args.profile:
        for what, run in (
            ("decode", lambda: engine.generate([prompt], args.group_size, Sampling(max_tokens=17), seed=0)),
            ("train", lambda: train(completions)),
        )[: 2 if args.steps else 1]:
            with stage(f"profile of {what}"):
                profiled(what, run, 30)
        engine.sync(model)  # the profile trained once more
        completions = engine.generate([prompt], args.group_size, sampling, seed=99)

    if args.host_profile:
        with stage("host"):
            with cProfile.Profile() as profile:
                engine.generate([prompt], args.group_size, sampling, seed=0)
            statistics_of = pstats.Stats(profile)
            for order, most in (("tottime", 25), ("cumulative", 60)):
                statistics_of.sort_stats(order).print_stats(most)

    with stage("folder"), tempfile.TemporaryDirectory() as folder:
        from vllm.lora.request import LoRARequest

        engine.llm.wake_up()

        def through_folder() -> None:
            model.save_pretrained(folder)
            request = LoRARequest("policy", 2, folder, load_inplace=True)
            engine.llm.llm_engine.add_lora(request)

        engine.llm.llm_engine.remove_lora(1)
        print(f"sync through an adapter folder: {1e3 * timed(through_folder, 3):.0f} ms")

    if args.reference:  # last, since it changes the model
        with stage("fp32 reference"), torch.no_grad():
            bf16 = logps(model, prompt, completions)
            exact_model = dense_copy(model).float()
            exact = logps(exact_model, prompt, completions, dtype=torch.float32)
            report_gaps("sampler - fp32", [torch.tensor(c.logps) for c in completions], exact)
            report_gaps("trainer - fp32", bf16, exact)


if __name__ == "__main__":
    main(tyro.cli(Args))
