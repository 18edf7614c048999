"""GRPO on Phi-4 (14B, NF4 weights, LoRA): competition mathematics (MATH), the answer in a box.   docs/recipes/phi4.md

    python recipes/phi4_grpo.py --steps 300                         # a whole card
    python recipes/phi4_grpo.py --steps 300 --gpu-memory-gib 14.9   # a 16 GB card: prompts of 256, answers of 1024
    python recipes/phi4_grpo.py --dry-run                           # memory by part, seconds per step; loads no weights

What to see: a model whose projections are fused (qkv_proj, gate_up_proj), a reward that is checked by algebra in worker
processes, and a reward written here, `one_box`.
Departs from the DeepSeekMath paper (arXiv 2402.03300): LoRA on 4-bit weights; 32 answers per step instead of 1024; the
loss is averaged over tokens (DAPO, arXiv 2503.14476); no KL penalty (--beta 0.04 brings it back).
"""

import functools
from dataclasses import dataclass

from grpo.advantages import Advantage, group_rewards, per_sample, reward_baseline, reward_scale, sample_mask
from grpo.batch import make_batch
from grpo.distributed import all_means, init_distributed, sum_gradients
from grpo.lazy import torch  # imported at its first use, so that --help answers at once
from grpo.logprobs import completion_logps
from grpo.objective import (
    Objective,
    average,
    entropy_bonus,
    kl_penalty,
    log_ratio,
    merge_metrics,
    sampler_weights,
    step_entropy_threshold,
    surrogate,
    token_filter,
    token_metrics,
)
from grpo.policy.chat import encode_chat, load_tokenizer
from grpo.policy.models import Policy, load_policy, reference_policy, trainable_parameters
from grpo.runs.cli import parse_args
from grpo.runs.record import open_record
from grpo.runs.run import Run, RunFlags
from grpo.sampler import Rollout, sample, sample_metrics, step_questions, step_seed
from grpo.tasks.answers import extract_lenient
from grpo.tasks.data import load_questions
from grpo.tasks.rewards import correctness
from grpo.tasks.sandbox import Sandbox
from grpo.tasks.scoring import score
from grpo_rollout.fit.memory import fit_test
from grpo_rollout.fit.plan import Card, make_plan
from grpo_rollout.make import make_engine

SYSTEM = "Reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Args:
    data: str = "math"
    """training and test questions: "math" from the hub, or a folder with train.jsonl and test.jsonl"""
    steps: int = 300
    """number of optimizer steps"""
    prompts_per_step: int = 4
    """number of questions per optimizer step, over all GPUs"""
    learning_rate: float = 2e-5
    """learning rate of AdamW, constant after the warm-up"""
    warmup_steps: int = 10
    """number of steps of linear warm-up"""
    max_grad_norm: float = 1.0
    """largest gradient norm; larger gradients are scaled down to it"""
    eval_questions: int = 200
    """number of held-out questions per evaluation, at most"""

    # Groups of flags that every recipe shares: --lora-rank, --group-size, --beta, --scale, --seed, ... (--help)
    policy: Policy = Policy("microsoft/phi-4", lora_rank=16, lora_alpha=32)
    rollout: Rollout = Rollout(group_size=8, temperature=1.0, max_prompt_tokens=256, max_completion_tokens=1024)
    objective: Objective = Objective(loss="dapo", beta=0.0)
    advantage: Advantage = Advantage(scale="group", baseline="mean")
    run: RunFlags = RunFlags(eval_every=50, save_every=50)
    card: Card = Card()


def one_box(completions: list[str], ground_truths: list[str]) -> list[float]:
    """1 for exactly one boxed answer, else 0: boxing several guesses must not pay."""
    return [float(text.count("\\boxed{") == 1) for text in completions]


def main(args: Args) -> None:
    # --- everything that can be wrong is found before a weight is read
    world, policy, rollout, objective = init_distributed(), args.policy, args.rollout, args.objective
    plan = make_plan(policy, rollout, args.card, questions=args.prompts_per_step // world.size, device=world.device)
    if args.card.dry_run:
        print(plan)
        return
    tokenizer = load_tokenizer(policy.model)
    encode = functools.partial(encode_chat, tokenizer, system=SYSTEM)  # question -> token ids of the whole prompt
    train, held_out = load_questions(
        args.data, encode, max_prompt_tokens=rollout.max_prompt_tokens, held_out=args.eval_questions
    )
    correct = functools.partial(correctness, sandbox=Sandbox())  # by math-verify, in workers with time limits
    reward_functions = {"correct": (correct, 1.0), "format": (one_box, 0.1)}  # name -> (function, weight)

    # --- policy, engine, optimizer
    inputs = {"model": policy.source, "adapter": policy.adapter, "train": train, "held_out": held_out}
    record = open_record(args, recipe=__file__, world=world, inputs=inputs)
    model = load_policy(
        policy, kept_layers=plan.kept_layers, offload=plan.offload, device=world.device, seed=args.run.seed
    )
    engine = make_engine(model, tokenizer, rollout, args.card, plan)  # samples from the trainer's own 4-bit weights
    fit_test(model, rollout, args.card, plan, entropy_grad=objective.entropy_bonus > 0)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / (args.warmup_steps + 1)))
    run = Run(record, model, optimizer, scheduler, tokenizer)  # with --resume, everything takes its saved state here
    forward = functools.partial(  # micro-batch -> log-probabilities and entropies of its completion tokens
        completion_logps, model, temperature=rollout.temperature, entropy_grad=objective.entropy_bonus > 0
    )

    def evaluate(step: int) -> dict[str, float]:
        """Greedy pass@1 on held-out questions, read strictly (as the reward reads it) and leniently."""
        with run.phase("evaluate"):
            engine.sync(model)
            answers = sample(engine, tokenizer, held_out[world.rank :: world.size], 1, rollout.greedy, seed=0)
            strict = correct(answers.texts, answers.ground_truths)
            lenient = correct(answers.texts, answers.ground_truths, extract=extract_lenient)
        run.save_completions(step, answers, {"correct": strict}, split="eval")
        means = {"eval/pass_at_1": strict, "eval/pass_at_1_lenient": lenient, "eval/length": answers.lengths}
        return all_means(means, world)

    if run.start_step == 0:
        run.log(0, evaluate(0))
    for step in run.steps(args.steps):  # saves the state after the body, every --save-every steps
        # --- sample: a group of answers to each of the step's questions
        questions = step_questions(train, args.prompts_per_step, seed=args.run.seed, step=step, world=world)
        with run.phase("generate"):
            engine.sync(model)
            seed = step_seed(args.run.seed, step, world)
            samples = sample(engine, tokenizer, questions, rollout.group_size, rollout.sampling, seed=seed)

        # --- score: a reward for each answer
        with run.phase("score"):
            scores = score(reward_functions, samples.texts, samples.ground_truths, lengths=samples.lengths)

        # --- advantage: each answer against its group, which stands in for PPO's value network:
        #         A = (reward - mean of the group) / (standard deviation of the group + 1e-4)
        rewards = group_rewards(scores, rollout.group_size, args.advantage)  # [prompts, group]
        baseline = reward_baseline(rewards, args.advantage, world)
        advantages = per_sample((rewards - baseline) / reward_scale(rewards, args.advantage, world))  # [samples]
        mask = sample_mask(args.advantage, scores, samples)  # [samples] bool: all count, unless a flag drops some

        # --- update. The loss of a token, averaged over all completion tokens of the step, is
        #         -c min(w A, clip(w, 0.8, 1.28) A) + beta KL(pi || pi_ref)
        #     with the policy ratio w = pi / pi_old and the sampler correction c = min(pi_old / pi_sampler, 2).
        #     Each micro-batch divides by the counts of the whole step, so gradients add up to those of one big batch.
        with run.phase("train"):
            batch = make_batch(samples, advantages, mask, objective, plan.micro_batch_tokens, world)
            threshold = step_entropy_threshold(forward, batch, objective, world)  # None without --top-entropy-quantile
            parts = []
            for micro in batch.micros:
                ref_logps = None
                if objective.beta:
                    with reference_policy(model):  # the same model, its adapter switched off
                        ref_logps, _ = forward(micro)
                logps, entropy = forward(micro)  # [batch, time] each, nats
                old_logps = logps.detach()  # one optimizer step per batch: pi_old = pi and w = 1; its gradient is not 0
                log_w = log_ratio(logps, old_logps, micro)
                c = sampler_weights(old_logps, micro, objective)
                losses = surrogate(logps, log_w, c, micro, objective)
                losses = losses * token_filter(logps, old_logps, entropy, threshold, micro, objective)
                kl = kl_penalty(logps, ref_logps, log_w, micro, objective)
                loss = average(losses, micro, objective) + objective.beta * average(kl, micro, objective)
                loss = loss - entropy_bonus(entropy, micro, objective)
                loss.backward()
                parts.append(token_metrics(loss, losses, kl, logps, old_logps, entropy, threshold, micro, objective))
            sum_gradients(parameters, world)
            metrics = merge_metrics(parts, world)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            if batch.tokens and run.guard_finite(step, metrics["loss"], grad_norm, batch):  # tokens of all ranks
                optimizer.step()
            optimizer.zero_grad()
            metrics |= {"grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]}
            scheduler.step()

        # --- what happened
        metrics |= sample_metrics(samples, scores, world)
        if run.evaluates(step):
            metrics |= evaluate(step)
        run.log(step, metrics)
        run.save_completions(step, samples, scores.by_function, advantages)


if __name__ == "__main__":
    main(parse_args(Args))
