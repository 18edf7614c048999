"""GRPO from start to end on two CPU cores: a tiny model finds out that thinking pays.   docs/recipes/quickstart.md

    python recipes/quickstart_grpo.py

It needs no GPU and downloads nothing: the model is made here, once (grpo/tasks/tiny.py). It can add three-digit numbers if
it works digit by digit between <think> and </think>, but mostly it answers at once, and wrongly. Only a right answer is
rewarded. Held-out pass@1 rises from a quarter to 0.95 or more in 40 steps, and answers grow from 18 to 45 tokens.
Departs from the DeepSeekMath paper (arXiv 2402.03300): LoRA on NF4 weights, the mean over all tokens of a step (DAPO)
instead of each answer's own mean first, one optimizer step a batch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from grpo.advantages import Estimator, check_estimator, counted_samples, estimate_advantages, zero_variance_groups
from grpo.batch import micro_batches, step_counts
from grpo.distributed import all_means, init_distributed, sum_gradients
from grpo.logprobs import completion_logps, step_entropy_threshold
from grpo.objective import Objective, check_objective, merge_metrics, policy_loss, rows_with_gradient
from grpo.policy.models import (
    check_context,
    check_policy,
    check_prompt_lengths,
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
from grpo.tasks.data import check_disjoint
from grpo.tasks.rewards import correctness, score
from grpo.tasks.tiny import Tiny, tiny_examples, tiny_model
from grpo_rollout.engine import Sampling
from grpo_rollout.make import make_engine

PROMPT = "{question} Reply as <think>...</think><answer>...</answer>."


@dataclass
class Args:
    model: str | None = None
    """a transformers folder or a hub name, instead of the tiny model made here"""
    steps: int = 40
    """optimizer steps"""
    seed: int = 0
    """of questions, samples and the adapter's initial weights"""
    run_dir: Path | None = None
    """where to write; by default a new folder under runs/"""
    resume: Path | None = None
    """run directory to continue"""
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """what samples: vLLM on a GPU that has it, else PyTorch"""

    prompts_per_step: int = 16
    """questions of one optimizer step"""
    group_size: int = 8
    """answers sampled to each question"""
    temperature: float = 1.0
    """of sampling; the trainer's log-probabilities take the same"""
    max_prompt_tokens: int = 64
    """a longer prompt is an error"""
    max_completion_tokens: int = 64
    """the answer's limit"""
    micro_batch_tokens: int = 4096
    """padded tokens of one forward and backward pass; memory, not the result, depends on it"""

    learning_rate: float = 1e-3
    """AdamW's, constant: far above what larger models bear"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    lora_rank: int = 16
    """rank of the adapter"""
    lora_alpha: int = 32
    """the adapter's scaling is alpha / rank"""
    lora_targets: str = "all-linear"
    """module names separated by commas, wildcards allowed, or all linear layers but the head"""

    eval_every: int = 10
    """steps between held-out evaluations; 0: only before and after"""
    eval_questions: int = 200
    """held-out questions of an evaluation"""
    save_every: int = 10
    """steps between checkpoints; 0: only the last"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """mirror the metrics there"""

    objective: Annotated[Objective, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: Objective(loss="dapo", beta=0.001)
    )
    estimator: Annotated[Estimator, tyro.conf.OmitArgPrefixes] = field(default_factory=Estimator)


def correct(completions: list[str], ground_truths: list[str]) -> list[float]:
    """1 if what stands between the answer tags is the sum, else 0."""
    return correctness(completions, ground_truths)


def main(args: Args) -> None:
    # Whatever can be wrong is found before anything expensive.
    check_args(args)
    check_objective(args.objective, num_iterations=1)
    check_estimator(args.estimator)
    world = init_distributed()
    folder = args.model or str(tiny_model(Tiny(prompt=PROMPT)))
    tokenizer = load_tokenizer(folder)
    _, config, _ = check_policy(folder, lora_rank=args.lora_rank, lora_targets=args.lora_targets)
    check_context(config, args.max_prompt_tokens, args.max_completion_tokens)
    # Questions, and others that neither pretraining nor GRPO ever sees.
    train, held_out = tiny_examples(2000, "train"), tiny_examples(args.eval_questions, "test")
    check_disjoint(train, held_out)
    prompts, eval_prompts = (
        [encode_chat(tokenizer, [{"role": "user", "content": PROMPT.format(question=e.question)}]) for e in examples]
        for examples in (train, held_out)
    )
    check_prompt_lengths(prompts + eval_prompts, args.max_prompt_tokens)

    run = start_run(args, recipe=Path(__file__), world=world)
    # Frozen 4-bit weights with a trainable adapter; an engine that samples from them; an optimizer of the adapter.
    model = load_policy(
        folder,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_targets=args.lora_targets,
        device=world.device,
        seed=args.seed,
    )
    eos_ids, pad_id = stop_ids(folder, tokenizer), tokenizer.pad_token_id
    engine = make_engine(
        args.engine,
        model,
        eos_ids=eos_ids,
        pad_id=pad_id,
        max_prompt_tokens=args.max_prompt_tokens,
        max_completion_tokens=args.max_completion_tokens,
    )
    sampling = Sampling(temperature=args.temperature, max_tokens=args.max_completion_tokens)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run.record_inputs(model=model_source(folder), train=train, held_out=held_out)
    run.restore(model, optimizer)

    def evaluate(step: int) -> dict[str, float]:
        """pass@1 on held-out questions: one answer each, sampled as in training."""
        mine = range(world.rank, len(held_out), world.size)
        with run.phase("evaluate"):
            engine.sync(model)
            completions = engine.generate([eval_prompts[i] for i in mine], 1, sampling, seed=world.rank)
            texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
            rewards = correct(texts, [held_out[i].ground_truth for i in mine])
        questions = [tokenizer.decode(eval_prompts[i]) for i in mine]
        run.save_completions(step, questions, texts, {"correct": rewards}, split="eval")
        means = all_means({"eval/pass_at_1": rewards, "eval/length": [len(c.token_ids) for c in completions]}, world)
        if step in (0, args.steps) and texts:
            run.say(
                f"step {step}: pass@1 {means['eval/pass_at_1']:.3f} on {len(held_out)} held-out questions. A sample:"
            )
            run.say(f"    {held_out[mine[0]].question}  {texts[0]}  {'right' if rewards[0] else 'wrong'}")
        return means

    if run.start_step == 0:
        run.log(0, evaluate(0))
    for step in run.steps(args.steps):
        # Sample: some questions, a group of answers to each. Answer i belongs to question i // group_size.
        chosen = prompt_indices(
            args.seed, step - 1, args.prompts_per_step, len(train), rank=world.rank, world_size=world.size
        )
        with run.phase("generate"):
            engine.sync(model)
            seed = (args.seed * 1_000_003 + step) * world.size + world.rank
            completions = engine.generate([prompts[i] for i in chosen], args.group_size, sampling, seed=seed)
        ids = [c.token_ids for c in completions]  # [prompts * group_size] lists

        # Score: a reward for each answer.
        with run.phase("score"):
            texts = [tokenizer.decode(t, skip_special_tokens=True) for t in ids]
            ground_truths = [train[i].ground_truth for i in chosen for _ in range(args.group_size)]
            scores = score({"correct": correct}, texts, ground_truths)

        # Advantage: how much better than its group's mean, in the group's standard deviations.
        advantages = estimate_advantages(args.estimator, scores, args.group_size, world=world)  # [prompts * group_size]
        zero_variance = zero_variance_groups(scores.total, args.group_size)
        counted = counted_samples(args.estimator, zero_variance, [c.truncated for c in completions]).tolist()

        # Update: micro-batches, whose gradients add up to exactly that of the one big batch.
        with run.phase("train"):
            tokens, sequences = step_counts([t for t, c in zip(ids, counted) if c], world)
            micros = micro_batches(
                [prompts[i] for i in chosen for _ in range(args.group_size)],
                ids,
                [c.logps for c in completions],
                advantages,
                max_tokens=args.micro_batch_tokens,
                pad_id=pad_id,
                device=world.device,
                keep=counted,
            )
            threshold = step_entropy_threshold(model, micros, args.objective, temperature=args.temperature, world=world)
            merged = []
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
                )  # [batch, time] each
                loss, metrics = policy_loss(
                    logps,
                    None,  # on policy: the old log-probabilities are these
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
                loss.backward()
                merged.append(metrics)
            sum_gradients(parameters, world)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            objective = merge_metrics(merged, world)
            if tokens and run.guard_finite(step, objective["loss"], grad_norm, micros):
                optimizer.step()
            optimizer.zero_grad()

        # What happened.
        metrics = all_means(
            {
                "reward": scores.total,
                "pass_at_1": scores.by_function["correct"],
                **{f"reward/{name}": values for name, values in scores.by_function.items()},
                "length": [len(t) for t in ids],
                "truncated": [float(c.truncated) for c in completions],
                "zero_variance": zero_variance.float().tolist(),
            },
            world,
        )
        metrics |= {**objective, "tokens": step_counts(ids, world)[0], "grad_norm": grad_norm, "lr": args.learning_rate}
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(step)
        run.log(step, metrics)
        questions = [tokenizer.decode(prompts[i]) for i in chosen]
        run.save_completions(step, questions, texts, scores.by_function, advantages)
        if run.due(step):
            run.save(step, model, optimizer)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, args=command_line()))
