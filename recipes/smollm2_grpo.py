"""GRPO on SmolLM2-135M-Instruct: a real instruct model on real questions, small enough for two CPU cores.

    python recipes/smollm2_grpo.py                            # single-digit arithmetic, weights from the hub
    python recipes/smollm2_grpo.py --data gsm8k               # or a folder with train.jsonl and test.jsonl, or a .jsonl
    python recipes/smollm2_grpo.py --model smollm2.gguf       # or a transformers folder

What to see beside quickstart_grpo.py: the model comes from elsewhere, with its own tokenizer, chat template and EOS
ids. It never heard of answer tags, so the reward reads the last number of whatever it says.
Departs from the DeepSeekMath paper (arXiv 2402.03300): LoRA on 4-bit weights, one optimizer step a batch, no KL.
Each metric is explained in docs/recipes/smollm2.md.
"""

import functools
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
    check_context,
    check_policy,
    encode_chat,
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
from grpo.tasks.answers import extract_lenient, last_number
from grpo.tasks.data import check_disjoint, drop_long, fixed_sample, load_splits
from grpo.tasks.rewards import correctness, score
from grpo_rollout.engine import Sampling
from grpo_rollout.make import make_engine


@dataclass
class Args:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """a hub name, a transformers folder, or a .gguf file (or a folder that holds one)"""
    data: str = "arithmetic"
    """"arithmetic" (sums of single digits), "gsm8k" from the hub, or a folder with train.jsonl and test.jsonl"""
    steps: int = 40
    """batches, each of --num-iterations optimizer steps"""
    seed: int = 0
    """of questions, samples and the adapter's initial weights"""
    run_dir: Path | None = None
    """where to write; by default a new folder under runs/"""
    resume: Path | None = None
    """run directory to continue"""
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """what samples: vLLM on a GPU that has it, else PyTorch"""

    prompts_per_step: int = 8
    """questions of one optimizer step, over all GPUs"""
    group_size: int = 8
    """answers sampled to each question"""
    num_iterations: int = 1
    """optimizer steps on each batch; above 1 the ratio leaves 1 and clipping matters"""
    temperature: float = 1.0
    """of sampling; the trainer's log-probabilities take the same"""
    max_prompt_tokens: int = 256
    """a longer prompt is an error"""
    max_completion_tokens: int | None = None
    """the answer's limit; by default 24 for arithmetic and 256 for gsm8k"""
    micro_batch_tokens: int = 2048
    """padded tokens of one forward and backward pass; memory, not the result, depends on it"""

    learning_rate: float = 2e-4
    """AdamW's, constant after the warm-up"""
    warmup_steps: int = 2
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
    load_in_4bit: bool = True
    """NF4 weights; off: 16 bit on a GPU, 32 on a CPU"""

    eval_every: int = 10
    """steps between held-out evaluations; 0: only before and after"""
    eval_questions: int = 100
    """held-out questions of an evaluation, at most"""
    save_every: int = 10
    """steps between checkpoints; 0: only the last"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """mirror the metrics there"""

    objective: Annotated[Objective, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: Objective(loss="dapo"))
    estimator: Annotated[Estimator, tyro.conf.OmitArgPrefixes] = field(default_factory=Estimator)


def messages(question: str, data: str) -> list[dict[str, str]]:
    if data == "arithmetic":  # "3+4" it often takes for a name; "3 + 4" for a sum
        return [{"role": "user", "content": question.replace("+", " + ")}]
    return [
        {"role": "user", "content": question + " Think step by step, then end with 'The answer is' and the number."}
    ]


def correct(completions: list[str], ground_truths: list[str]) -> list[float]:
    """1 if the last number said is the ground_truth answer: a number said earlier does not count, nor does listing them all."""
    return correctness(completions, ground_truths, extract=last_number)


def main(args: Args) -> None:
    # --- everything that can be wrong is found before the model is loaded
    check_args(args)
    check_objective(args.objective, num_iterations=args.num_iterations)
    check_estimator(args.estimator)
    world = init_distributed()
    tokenizer = load_tokenizer(args.model)
    _, config, _ = check_policy(
        args.model, lora_rank=args.lora_rank, lora_targets=args.lora_targets, adapter=args.adapter
    )
    max_tokens = args.max_completion_tokens or (24 if args.data == "arithmetic" else 256)
    check_context(config, args.max_prompt_tokens, max_tokens)

    @functools.cache
    def encode(question: str) -> list[int]:
        return encode_chat(tokenizer, messages(question, args.data))

    train, held_out = (
        drop_long(part, lambda q: len(encode(q)), args.max_prompt_tokens) for part in load_splits(args.data)
    )
    held_out = fixed_sample(held_out, args.eval_questions)
    check_disjoint(train, held_out)
    prompts = [encode(e.question) for e in train]
    eval_prompts = [encode(e.question) for e in held_out][world.rank :: world.size]
    eval_ground_truths = [e.ground_truth for e in held_out][world.rank :: world.size]
    sampling = Sampling(temperature=args.temperature, max_tokens=max_tokens)

    # --- policy, engine, optimizer
    run = start_run(args, recipe=Path(__file__), world=world)
    model = load_policy(
        args.model,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_targets=args.lora_targets,
        adapter=args.adapter,
        load_in_4bit=args.load_in_4bit,
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
        max_completion_tokens=max_tokens,
    )
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / (args.warmup_steps + 1)))
    run.record_inputs(model=model_source(args.model), adapter=args.adapter, train=train, held_out=held_out)
    run.restore(model, optimizer, scheduler)

    def evaluate(step: int) -> dict[str, float]:
        """Greedy pass@1 on held-out questions: by the reward's own reading, and by a forgiving one."""
        with run.phase("evaluate"):
            engine.sync(model)
            completions = engine.generate(eval_prompts, 1, sampling._replace(temperature=0), seed=0)
            texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
            strict = correct(texts, eval_ground_truths)
            lenient = correctness(texts, eval_ground_truths, extract=extract_lenient)
        questions = [tokenizer.decode(p) for p in eval_prompts]
        run.save_completions(step, questions, texts, {"correct": strict}, split="eval")
        lengths = [len(c.token_ids) for c in completions]
        means = {"eval/pass_at_1": strict, "eval/pass_at_1_lenient": lenient, "eval/length": lengths}
        return all_means(means, world)

    if run.start_step == 0:
        run.log(0, evaluate(0))
    for step in run.steps(args.steps):
        # --- sample: which questions, and a group of answers to each
        indices = prompt_indices(
            args.seed, step - 1, args.prompts_per_step, len(train), rank=world.rank, world_size=world.size
        )
        with run.phase("generate"):
            engine.sync(model)
            completions = engine.generate(
                [prompts[i] for i in indices],
                args.group_size,
                sampling,
                seed=(args.seed * 1_000_003 + step) * world.size + world.rank,
            )
        group_prompts = [prompts[i] for i in indices for _ in range(args.group_size)]  # [prompts * group_size]
        ids = [c.token_ids for c in completions]

        # --- score
        with run.phase("score"):
            texts = [tokenizer.decode(t, skip_special_tokens=True) for t in ids]
            ground_truths = [train[i].ground_truth for i in indices for _ in range(args.group_size)]
            scores = score({"correct": correct}, texts, ground_truths)

        # --- advantage: each answer against its group
        advantages = estimate_advantages(args.estimator, scores, args.group_size, world=world)  # [prompts * group_size]
        zero_variance = zero_variance_groups(scores.total, args.group_size)
        counted = counted_samples(args.estimator, zero_variance, [c.truncated for c in completions]).tolist()

        # --- update: micro-batches of whole sequences, whose gradients add up to that of one batch
        with run.phase("train"):
            tokens, sequences = step_counts([t for t, c in zip(ids, counted) if c], world)
            micros = micro_batches(
                group_prompts,
                ids,
                [c.logps for c in completions],
                advantages,
                max_tokens=args.micro_batch_tokens,
                pad_id=pad_id,
                device=world.device,
                keep=counted,
            )
            threshold = step_entropy_threshold(model, micros, args.objective, temperature=args.temperature, world=world)
            old_logps, ref_logps = [None] * len(micros), [None] * len(micros)
            if args.num_iterations > 1:  # one iteration is on policy: old = new, and needs no pass of its own
                with torch.no_grad():
                    old_logps = [completion_logps(model, m, temperature=args.temperature)[0] for m in micros]
            if args.objective.beta:
                with reference_policy(model):
                    ref_logps = [completion_logps(model, m, temperature=args.temperature)[0] for m in micros]
            for _ in range(args.num_iterations):
                shares, loss = [], 0.0
                for micro, old, ref in zip(micros, old_logps, ref_logps):
                    logps, entropy = completion_logps(
                        model,
                        micro,
                        temperature=args.temperature,
                        entropy_grad=args.objective.entropy_bonus > 0,
                        grad_rows=rows_with_gradient(args.objective, micro.advantages, micro.mask),
                    )  # [batch, time] each
                    share, metrics = policy_loss(
                        logps,
                        old,
                        micro.advantages,
                        micro.mask,
                        args.objective,
                        ref_logps=ref,
                        sampler_logps=micro.sampler_logps,
                        entropy=entropy,
                        entropy_threshold=threshold,
                        token_count=tokens,
                        sequence_count=sequences,
                        max_completion_length=max_tokens,
                    )
                    share.backward()
                    loss += share.item()
                    shares.append(metrics)
                sum_gradients(parameters, world)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                if tokens and run.guard_finite(step, loss, grad_norm, micros):
                    optimizer.step()
                optimizer.zero_grad()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()

        # --- what happened
        metrics = {
            **all_means(
                {
                    "reward": scores.total,
                    "pass_at_1": scores.by_function["correct"],
                    **{f"reward/{name}": values for name, values in scores.by_function.items()},
                    "length": [len(t) for t in ids],
                    "truncated": [float(c.truncated) for c in completions],
                    "zero_variance": zero_variance.float().tolist(),
                },
                world,
            ),
            **merge_metrics(shares, world),
            "tokens": step_counts(ids, world)[0],
            "grad_norm": grad_norm,
            "lr": lr,
        }
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(step)
        run.log(step, metrics)
        questions = [tokenizer.decode(prompts[i]) for i in indices]
        run.save_completions(step, questions, texts, scores.by_function, advantages)
        if run.due(step):
            run.save(step, model, optimizer, scheduler)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, args=command_line()))
