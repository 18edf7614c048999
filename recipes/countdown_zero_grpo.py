"""R1-Zero on Countdown: a base model, no demonstrations, a rule for a reward. Does it begin to check itself?

    python recipes/countdown_zero_grpo.py --steps 500                       # the whole card
    python recipes/countdown_zero_grpo.py --steps 500 --gpu-memory-gib 7.4   # a card of 8 GB
    python recipes/countdown_zero_grpo.py --dry-run                         # memory by part, tokens, seconds a step

The puzzle: reach a target with each of some numbers once and + - * /. It is easy to check and takes search, so trying,
checking and trying again pays: the "aha moment" of DeepSeek-R1 (arXiv 2501.12948), looked for at this size by
TinyZero. What to see: a base model gets plain text, not a chat, and knows no end of turn; `self_check` counts the
completions whose reasoning takes something back or looks again, and is logged beside `length`. Puzzles are generated,
solvable, and split by hash. Each metric is explained in docs/recipes/countdown_zero.md.

Departs from R1-Zero: 3B and LoRA on 4-bit weights instead of 671B; Countdown instead of mathematics and code; 64
answers a step. From TinyZero: LoRA on 4-bit weights, no critic, no KL. There is no public notebook for this.
"""

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch.optim.lr_scheduler import LambdaLR

from grpo.advantages import Estimator, check_estimator, counted_samples, estimate_advantages, zero_variance_groups
from grpo.batch import micro_batches, step_counts
from grpo.distributed import all_means, init_distributed, sum_gradients
from grpo.logprobs import completion_logps, step_entropy_threshold
from grpo.objective import Objective, check_objective, merge_metrics, policy_loss, rows_with_gradient
from grpo.policy.models import (
    check_policy,
    check_prompt_lengths,
    load_policy,
    load_tokenizer,
    model_source,
    reference_policy,
    stop_ids,
    trainable_parameters,
)
from grpo.runs.cli import check_args, user_errors
from grpo.runs.run import command_line, start_run
from grpo.sampler import prompt_indices
from grpo.tasks.data import check_disjoint, countdown_examples
from grpo.tasks.rewards import countdown, format_tags, score
from grpo_rollout.engine import Sampling
from grpo_rollout.fit.memory import hold_memory, preflight
from grpo_rollout.fit.plan import describe, make_plan
from grpo_rollout.make import make_engine

PROMPT = """A conversation between User and Assistant. The assistant first thinks about the reasoning process and then
gives the answer, as <think> reasoning process </think> <answer> answer </answer>.
User: {question} Put the expression into the answer tags, such as <answer> (1 + 2) / 3 </answer>.
Assistant: Let me solve this step by step.
"""
PREFILL = "<think>"
"""the first word of each answer, already said"""
SELF_CHECK = re.compile(
    r"\b(wait|not (right|correct|equal)|(doesn['’]t|does not|won['’]t) work|too (high|low|big|small)|verify"
    r"|try (again|another|something|different)|let(['’]s| me| us) (re-?)?check|double.check)\b",
    re.IGNORECASE,
)


@dataclass
class Args:
    model: str = "Qwen/Qwen2.5-3B"
    """a hub name, a transformers folder (quantized or not), or a .gguf file"""
    numbers: int = 4
    """of a puzzle; 3 is easier"""
    train_puzzles: int = 20_000
    """to generate; each is seen once before any is seen twice"""
    steps: int = 500
    """optimizer steps"""
    seed: int = 0
    """of questions, samples and the adapter's initial weights"""
    run_dir: Path | None = None
    """where to write; by default a new folder under runs/"""
    resume: Path | None = None
    """run directory to continue"""
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """what samples: vLLM on a GPU that has it, else PyTorch"""
    gpu_memory_gib: float | None = None
    """GiB of the card that the whole process may use, as nvidia-smi shows it; by default all of it"""
    dry_run: bool = False
    """print the plan (memory by part, tokens and expected seconds a step) and stop"""

    prompts_per_step: int = 8
    """questions of one optimizer step, over all GPUs"""
    group_size: int = 8
    """answers sampled to each question"""
    temperature: float = 1.0
    """of sampling; the trainer's log-probabilities take the same"""
    max_prompt_tokens: int = 256
    """a longer prompt is an error"""
    max_completion_tokens: int = 1024
    """an answer's limit"""
    micro_batch_tokens: int | None = None
    """padded tokens of one forward and backward pass; by default what fits"""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """of the sampler; fp8 halves its KV cache"""
    fused_nf4: bool | None = None
    """vLLM multiplies 4-bit weights by a kernel that reads them once: None where it applies, False never"""

    learning_rate: float = 3e-5
    """AdamW's, constant after the warm-up"""
    warmup_steps: int = 10
    """of linear warm-up"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    lora_rank: int = 16
    """rank of the adapter"""
    lora_alpha: int = 32
    """scaling is alpha / rank"""
    lora_targets: str = "all-linear"
    """module names separated by commas, wildcards allowed, or all linear layers but the head"""
    adapter: Path | None = None
    """a trained adapter's folder to train further; its frozen copy is then the reference policy"""

    eval_every: int = 50
    """steps between held-out evaluations; 0: only before and after"""
    eval_questions: int = 200
    """held-out questions of an evaluation, at most"""
    save_every: int = 50
    """steps between checkpoints; 0: only the last"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """mirror the metrics there"""

    objective: Annotated[Objective, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: Objective(loss="dapo"))
    estimator: Annotated[Estimator, tyro.conf.OmitArgPrefixes] = field(default_factory=Estimator)


REWARDS = {"correct": (countdown, 1.0), "format": (functools.partial(format_tags, tags=("think", "answer")), 0.1)}
"""name -> (function, weight)"""


def self_checks(completions: list[str]) -> list[float]:
    """1 where the reasoning, the answer aside, takes something back, or looks or tries again."""
    return [float(bool(SELF_CHECK.search(text.partition("<answer>")[0]))) for text in completions]


def main(args: Args) -> None:
    # --- everything that can be wrong is found before a weight is read
    check_args(args)
    check_objective(args.objective, num_iterations=1)
    check_estimator(args.estimator)
    world = init_distributed()
    _, config, modules = check_policy(
        args.model, lora_rank=args.lora_rank, lora_targets=args.lora_targets, adapter=args.adapter
    )
    plan = make_plan(
        config,
        modules,
        lora_rank=args.lora_rank,
        adapter=args.adapter,
        sequences=args.prompts_per_step // world.size * args.group_size,
        max_prompt_tokens=args.max_prompt_tokens,
        max_completion_tokens=args.max_completion_tokens,
        micro_batch_tokens=args.micro_batch_tokens,
        gpu_memory_gib=args.gpu_memory_gib,
        kv_cache_dtype=args.kv_cache_dtype,
        device=world.device,
    )
    if args.dry_run:
        print(describe(plan))
        return
    tokenizer = load_tokenizer(args.model, chat_template=False)

    @functools.cache
    def encode(question: str) -> list[int]:
        return tokenizer(PROMPT.format(question=question) + PREFILL)["input_ids"]  # with a BOS, if the model has one

    def decode(ids: list[int]) -> str:
        return PREFILL + tokenizer.decode(ids, skip_special_tokens=True)

    train = countdown_examples(args.train_puzzles, numbers=args.numbers, split="train")
    held_out = countdown_examples(args.eval_questions, numbers=args.numbers, split="test")
    check_prompt_lengths([encode(e.question) for e in train[:1000] + held_out], args.max_prompt_tokens)
    check_disjoint(train, held_out)

    # --- policy, engine, optimizer
    run = start_run(args, recipe=Path(__file__), world=world)
    model = load_policy(
        args.model,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_targets=args.lora_targets,
        adapter=args.adapter,
        gradient_checkpointing=True,
        kept_layers=plan.kept_layers,
        device=world.device,
        seed=args.seed,
    )
    eos_ids, pad_id = stop_ids(args.model, tokenizer), tokenizer.pad_token_id
    engine = make_engine(
        args.engine,
        model,
        eos_ids=eos_ids,
        pad_id=pad_id,
        max_prompt_tokens=args.max_prompt_tokens,
        max_completion_tokens=args.max_completion_tokens,
        sequences=plan.sequences,
        gpu_memory_gib=plan.engine_gb,
        kv_cache_dtype=args.kv_cache_dtype,
        fused_nf4=args.fused_nf4,
    )
    sampling = Sampling(temperature=args.temperature, max_tokens=args.max_completion_tokens)
    hold_memory(args.gpu_memory_gib, world.device)
    preflight(
        model,
        prompt_tokens=args.max_prompt_tokens,
        completion_tokens=args.max_completion_tokens,
        micro_batch_tokens=plan.micro_batch_tokens,
        offload=plan.offload,
        entropy_grad=args.objective.entropy_bonus > 0,
    )
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / (args.warmup_steps + 1)))
    run.record_inputs(model=model_source(args.model), adapter=args.adapter, train=train, held_out=held_out)
    run.restore(model, optimizer, scheduler)

    def evaluate(step: int) -> dict[str, float]:
        """Held-out puzzles, one sample each as in training: greedily, base models repeat themselves."""
        mine = held_out[world.rank :: world.size]
        prompts, ground_truths = [encode(e.question) for e in mine], [e.ground_truth for e in mine]
        with run.phase("evaluate"):
            engine.sync(model)
            ids = [c.token_ids for c in engine.generate(prompts, 1, sampling, seed=0)]
            texts = [decode(t) for t in ids]
            solved = countdown(texts, ground_truths)
        run.save_completions(step, [tokenizer.decode(p) for p in prompts], texts, {"correct": solved}, split="eval")
        means = {"eval/pass_at_1": solved, "eval/self_check": self_checks(texts), "eval/length": [len(t) for t in ids]}
        return all_means(means, world)

    if run.start_step == 0:
        run.log(0, evaluate(0))
    for step in run.steps(args.steps):
        # --- sample: which questions, and a group of answers to each
        indices = prompt_indices(
            args.seed, step - 1, args.prompts_per_step, len(train), rank=world.rank, world_size=world.size
        )
        prompts = [encode(train[i].question) for i in indices]
        with run.phase("generate"):
            engine.sync(model)
            seed = (args.seed * 1_000_003 + step) * world.size + world.rank
            completions = engine.generate(prompts, args.group_size, sampling, seed=seed)
        ids = [c.token_ids for c in completions]  # [prompts * group_size] lists

        # --- score
        with run.phase("score"):
            texts = [decode(t) for t in ids]
            ground_truths = [train[i].ground_truth for i in indices for _ in range(args.group_size)]
            scores = score(REWARDS, texts, ground_truths)

        # --- advantage: each answer against its group
        advantages = estimate_advantages(args.estimator, scores, args.group_size, world=world)
        zero_variance = zero_variance_groups(scores.total, args.group_size)
        counted = counted_samples(args.estimator, zero_variance, [c.truncated for c in completions]).tolist()

        # --- update: micro-batches of whole sequences, whose gradients add up to that of one batch
        with run.phase("train"):
            tokens, sequences = step_counts([t for t, c in zip(ids, counted) if c], world)
            micros = micro_batches(
                [p for p in prompts for _ in range(args.group_size)],
                ids,
                [c.logps for c in completions],
                advantages,
                max_tokens=plan.micro_batch_tokens,
                pad_id=pad_id,
                device=world.device,
                keep=counted,
            )
            threshold = step_entropy_threshold(model, micros, args.objective, temperature=args.temperature, world=world)
            shares = []
            for micro in micros:
                ref_logps = None
                if args.objective.beta:
                    with reference_policy(model):  # the same model, its adapter switched off
                        ref_logps, _ = completion_logps(model, micro, temperature=args.temperature)
                logps, entropy = completion_logps(
                    model,
                    micro,
                    temperature=args.temperature,
                    entropy_grad=args.objective.entropy_bonus > 0,
                    grad_rows=rows_with_gradient(args.objective, micro.advantages, micro.mask),
                    offload=plan.offload,
                )  # [batch, time] each
                share, metrics = policy_loss(
                    logps,
                    None,  # one step on each batch is on policy: the old log-probabilities are these
                    micro.advantages,
                    micro.mask,
                    args.objective,
                    ref_logps=ref_logps,
                    sampler_logps=micro.sampler_logps,
                    entropy=entropy,
                    entropy_threshold=threshold,
                    token_count=tokens,
                    sequence_count=sequences,
                    max_completion_length=args.max_completion_tokens,
                )
                share.backward()
                shares.append(metrics)
            sum_gradients(parameters, world)
            objective = merge_metrics(shares, world)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            if tokens and run.guard_finite(step, objective["loss"], grad_norm, micros):
                optimizer.step()
            optimizer.zero_grad()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()

        # --- what happened
        metrics = {
            "reward": scores.total,
            "pass_at_1": scores.by_function["correct"],
            **{f"reward/{name}": values for name, values in scores.by_function.items()},
            "self_check": self_checks(texts),
            "length": [len(t) for t in ids],
            "truncated": [float(c.truncated) for c in completions],
            "zero_variance": zero_variance.float().tolist(),
        }
        metrics = all_means(metrics, world) | objective
        metrics |= {"tokens": step_counts(ids, world)[0], "grad_norm": grad_norm, "lr": lr}
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(step)
        run.log(step, metrics)
        run.save_completions(step, [tokenizer.decode(p) for p in prompts], texts, scores.by_function, advantages)
        if run.due(step):
            run.save(step, model, optimizer, scheduler)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, args=command_line()))
