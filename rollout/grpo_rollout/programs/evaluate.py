"""Accuracy over a whole test set: pass@k and maj@k with standard errors. An interrupted evaluation goes on.

    grpo evaluate --model Qwen/Qwen2.5-1.5B-Instruct --data gsm8k
    grpo evaluate --model Qwen/Qwen2.5-1.5B-Instruct --data gsm8k --adapter runs/mine/adapter
    grpo evaluate --model Qwen/Qwen2.5-1.5B-Instruct --data gsm8k --samples 8 --temperature 1   # pass@8 and maj@8

Ask as the recipe asked in training: --system and --prompt.   docs/evaluation.md
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grpo.errors import UserError
from grpo.lazy import torch
from grpo.policy.chat import encode_chat, load_tokenizer
from grpo.policy.models import Policy, load_policy
from grpo.runs.record import fingerprint
from grpo.sampler import Engine, Question, Rollout, Samples, Sampling, sample
from grpo.tasks.answers import Number, extract_answer, extract_lenient, normalize, parse_number
from grpo.tasks.data import SOURCES, Example, by_hash, check_disjoint, is_single_file, load_examples
from grpo.tasks.rewards import correctness, countdown
from grpo.tasks.sandbox import Sandbox
from grpo.tasks.scoring import Reward
from grpo_rollout.fit.plan import Card
from grpo_rollout.make import make_engine
from grpo_rollout.programs import run_program


class Evaluation(NamedTuple):
    """The result of an evaluation."""

    metrics: dict[str, float]
    """see `summarize`"""
    records: list[dict[str, Any]]
    """one per question, in their order, as in the file"""


def evaluate(
    engine: Engine,
    questions: Sequence[Question],
    sampling: Sampling,
    decode: Callable[[list[int]], str],
    *,
    samples: int = 1,
    seed: int = 0,
    check: Reward = correctness,
    extract: Callable[[str], str | None] = extract_answer,
    extract_lenient: Callable[[str], str | None] = extract_lenient,
    out: Path | None = None,
    settings: dict[str, Any] | None = None,
    questions_per_batch: int = 64,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Evaluation:
    """Ask every question `samples` times, and check the answers against the ground truths.

    decode: token ids of a completion -> the text that is checked.
    check: a reward of `grpo.tasks.rewards`, called as check(completions, ground_truths, extract=...); 1 is right.
    extract, extract_lenient: text -> the answer in it, by a strict and by a lenient reading.
    out: a .jsonl file. Its first line holds what the evaluation was made with, the caller's `settings` included; one
        line per question follows. If the file exists and was made with the same, the evaluation goes on where it ended,
        and gives what it would have given without interruption.
    progress: called after each batch with the number of questions done, the number of all of them, and the metrics so
        far.
    Raises UserError for no questions, fewer than one sample, or a file that was made with something else, which it
    names."""
    if not questions:
        raise UserError("no test questions: the data set is empty; check --data, --split and --limit")
    if samples < 1 or questions_per_batch < 1:
        raise UserError(f"--samples {samples} and --batch {questions_per_batch} must be at least 1")
    made_with = {
        **(settings or {}),
        "questions": len(questions),
        "examples": _digest([(question.text, question.ground_truth) for question in questions]),
        "prompts": _digest([question.prompt for question in questions]),
        "sampling": sampling._asdict(),
        "samples": samples,
        "seed": seed,
        "batch": questions_per_batch,
    }
    records = _begin(out, json.loads(json.dumps(made_with)), questions_per_batch) if out else []
    for start in range(len(records), len(questions), questions_per_batch):
        batch = questions[start : start + questions_per_batch]
        answers = sample(engine, None, batch, samples, sampling, seed=seed * 1_000_003 + start, decode=decode)
        strict = check(answers.texts, answers.ground_truths, extract=extract)
        lenient = check(answers.texts, answers.ground_truths, extract=extract_lenient)
        new = _records(answers, strict, lenient, extract, extract_lenient, first=start)
        records += new
        if out:
            with open(out, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in new)
        if progress:
            progress(len(records), len(questions), summarize(records))
    return Evaluation(summarize(records), records)


def _records(
    answers: Samples,
    strict: Sequence[float | Exception | None],
    lenient: Sequence[float | Exception | None],
    extract: Callable[[str], str | None],
    extract_lenient: Callable[[str], str | None],
    *,
    first: int,
) -> list[dict[str, Any]]:
    """One record per question. strict, lenient: [samples] what the check gave. first: index of the first question."""
    records = []
    for i, question in enumerate(answers.questions):
        rows = slice(i * answers.group_size, (i + 1) * answers.group_size)
        texts = answers.texts[rows]
        records.append(
            {
                "index": first + i,
                "question": question.text,
                "ground_truth": question.ground_truth,
                "completions": texts,
                "answers": [extract(text) for text in texts],
                "lenient_answers": [extract_lenient(text) for text in texts],
                # A timed-out check is returned as an exception; it counts as wrong.
                "correct": [value == 1.0 for value in strict[rows]],
                "lenient_correct": [value == 1.0 for value in lenient[rows]],
                "tokens": answers.lengths[rows],
                "truncated": [bool(truncated) for truncated in answers.truncated[rows]],
            }
        )
    return records


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _begin(out: Path, made_with: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """Write the first line of a new file; or read the whole batches of one that was made with the same, and cut off the
    rest of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists() or not out.stat().st_size:
        out.write_text(json.dumps({"evaluation": made_with}) + "\n", encoding="utf-8")
        return []
    with open(out, "rb+") as file:
        first = file.readline()
        try:
            written = json.loads(first)["evaluation"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--out {out}: exists and is not an evaluation's file; give another") from None
        for name in {**written, **made_with}:
            if written.get(name) != made_with.get(name):
                raise UserError(
                    f"--out {out}: was made with {name} {written.get(name)!r}, and now it is {made_with.get(name)!r}; "
                    "give another file, or delete this one"
                )
        records: list[dict[str, Any]] = []
        end, whole = file.tell(), 0
        for line in iter(file.readline, b""):
            if not line.endswith(b"\n"):
                break
            records.append(json.loads(line))
            if len(records) % batch == 0 or len(records) == made_with["questions"]:
                end, whole = file.tell(), len(records)
        # A batch that was cut short is sampled again, so that the seeds are those of an uninterrupted evaluation.
        file.truncate(end)
    return records[:whole]


# ---------------------------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples is right, estimated without bias from c right ones of n:
    1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), eq. 1. Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, but n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """1 if the most frequent answer is right, 0 if it is wrong; the fraction of right ones among equally frequent ones.

    Equal numbers are one answer, however they are written. Samples without an answer have no vote."""
    votes: dict[Any, list[bool]] = {}
    for answer, right in zip(answers, correct):
        if answer is not None:
            votes.setdefault(_key(answer), []).append(right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    tied = [rights[0] for rights in votes.values() if len(rights) == most]
    return sum(tied) / len(tied)


def _key(answer: str) -> Number | Fraction | str:
    """What two spellings of one answer have in common."""
    number = parse_number(answer)
    if number is None:
        return normalize(answer)
    return number if number.percent else number.value


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, std(ddof=1) / sqrt(n). The error of a single value is NaN."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics over questions; each accuracy has its standard error under the same name with `_se`.

    With n samples per question: `pass_at_k` for k = 1, 2, 4, ... up to n, and n; `maj_at_n` for n > 1; the same by the
    lenient reading with `_lenient`. `answered`: fraction of samples in which the strict reading finds an answer;
    `truncated`: fraction cut off by the token limit; `tokens`: mean length. The standard error comes from the spread
    over questions, since these are what was drawn at random: samples of one question are not independent evidence."""
    n = len(records[0]["correct"])
    metrics: dict[str, float] = {}
    ks = sorted({1, n, *(2**i for i in range(n.bit_length()))} & set(range(1, n + 1)))
    for suffix, correct, answers in (("", "correct", "answers"), ("_lenient", "lenient_correct", "lenient_answers")):
        scores = {f"pass_at_{k}{suffix}": [pass_at_k(n, sum(r[correct]), k) for r in records] for k in ks}
        if n > 1:
            scores[f"maj_at_{n}{suffix}"] = [majority(r[answers], r[correct]) for r in records]
        for name, values in scores.items():
            metrics[name], metrics[f"{name}_se"] = mean_and_error(values)
    metrics["answered"] = _mean(answer is not None for r in records for answer in r["answers"])
    metrics["truncated"] = _mean(truncated for r in records for truncated in r["truncated"])
    metrics["tokens"] = _mean(tokens for r in records for tokens in r["tokens"])
    return metrics


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


# --------------------------------------------------------------------------------------------------- the command


@dataclass
class Args:
    model: str
    """name on the Hugging Face hub, transformers folder, or .gguf file"""
    adapter: Path | None = None
    """folder of a PEFT adapter; without one the model itself is evaluated"""
    data: str = "gsm8k"
    """test questions: gsm8k, math, dapo-math, arithmetic, countdown, a data set on the hub, a local file or folder"""
    split: str = "test"
    """split of the data; of a single file: test (the one question in twenty that recipes hold out), train, or all"""
    config: str | None = None
    """configuration of a data set on the hub"""
    question: str | None = None
    """field that holds the question"""
    answer: str | None = None
    """field that holds the answer or a whole solution"""
    limit: int | None = None
    """maximum number of questions, the first ones"""
    training: str | None = None
    """data whose train split must share no question with the test; None: --data itself, where it has that split"""
    system: str | None = None
    """system message, such as the recipe's"""
    prompt: str = "{question}"
    """user message; {question} stands for the question"""
    samples: int = 1
    """number of answers to each question; for pass@k and maj@k take several, and a temperature above 0"""
    temperature: float = 0.0
    """sampling temperature; 0 is greedy"""
    max_tokens: int = 512
    """maximum number of tokens in an answer"""
    seed: int = 0
    """random seed for the samples"""
    batch: int = 64
    """number of questions per call of the engine"""
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """engine that samples; auto: vLLM on a GPU where it is installed, else PyTorch"""
    load_in_4bit: bool = True
    """whether to quantize the weights to NF4, as in training; otherwise bf16 on a GPU, and fp32 on a CPU"""
    out: Path | None = None
    """file of records, one line per question; None: runs/evaluation-RUN-DATA.jsonl, with the model's name for RUN"""


def main(args: Args) -> Evaluation:
    """Evaluate, and print a line per batch and the metrics. Raises UserError, naming the flag, for bad input."""
    check_args(args)
    out = args.out or default_out(args)
    examples = test_examples(args)
    check_disjoint(training_examples(args), examples)
    tokenizer = load_tokenizer(args.model)
    questions = [
        Question(text, truth, encode_chat(tokenizer, args.prompt.replace("{question}", text), system=args.system))
        for text, truth in examples
    ]
    policy = Policy(args.model, lora_rank=1, adapter=args.adapter, load_in_4bit=args.load_in_4bit)
    # Without --adapter the policy has a new adapter, which changes nothing: its B is zero.
    model = load_policy(policy, device="cuda" if torch.cuda.is_available() else "cpu", seed=args.seed)
    rollout = Rollout(
        temperature=args.temperature,
        max_prompt_tokens=max(len(question.prompt) for question in questions),
        max_completion_tokens=args.max_tokens,
    )
    engine = make_engine(model, tokenizer, rollout, Card(engine=args.engine))
    engine.sync(model)
    puzzles = args.data == "countdown"
    # Where every ground truth is a number, other answers are wrong; algebra would take "9*2" for 18.
    numbers_only = all(parse_number(question.ground_truth) for question in questions)
    with Sandbox() as sandbox:
        result = evaluate(
            engine,
            questions,
            rollout.sampling,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            samples=args.samples,
            seed=args.seed,
            check=countdown if puzzles else functools.partial(correctness, sandbox=None if numbers_only else sandbox),
            # An expression stands in its tags or box; the last number of a text, the lenient answer, is none.
            extract_lenient=extract_answer if puzzles else extract_lenient,
            out=out,
            settings={
                "model": args.model,
                "model_sha256": fingerprint(policy.source)["sha256"],
                "adapter": str(args.adapter) if args.adapter else None,
                "adapter_sha256": fingerprint(args.adapter)["sha256"],
                "load_in_4bit": args.load_in_4bit,
                "engine": type(engine).__name__,
                "check": "countdown" if puzzles else "correctness",
            },
            questions_per_batch=args.batch,
            progress=print_progress,
        )
    for name, value in result.metrics.items():
        if not name.endswith("_se"):
            error = result.metrics.get(f"{name}_se")
            print(f"{name:24}{value:10.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    print(f"{len(result.records)} questions, {args.samples} samples each; records in {out}")
    return result


def print_progress(done: int, of: int, metrics: dict[str, float]) -> None:
    """One line per batch."""
    print(
        f"{done}/{of} questions: pass@1 {metrics['pass_at_1']:.3f}, lenient {metrics['pass_at_1_lenient']:.3f}",
        flush=True,
    )


def check_args(args: Args) -> None:
    """Raise UserError for flags that cannot work, before anything is loaded."""
    if "{question}" not in args.prompt:
        raise UserError("--prompt must hold {question}, which stands for the question")
    if args.temperature < 0 or (args.temperature == 0 and args.samples > 1):
        raise UserError(
            f"--temperature {args.temperature} with --samples {args.samples}: greedy samples are all the same; "
            "take a temperature above 0, or one sample"
        )
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1; leave it out to take every question")


def default_out(args: Args) -> Path:
    """runs/evaluation-POLICY-DATA.jsonl: base model and adapter, and two data sets, have files of their own.

    POLICY is the run that an adapter comes from (with the step of a checkpoint), or else the model."""
    policy = Path(args.adapter or args.model).absolute()
    if args.adapter and policy.name == "adapter":
        policy = policy.parent
    name = policy.name
    if policy.parent.name == "checkpoints":
        name = f"{policy.parent.parent.name}-{name}"
    data = Path(args.data).absolute()
    return Path("runs") / f"evaluation-{name}-{data.stem if data.is_file() else data.name}.jsonl"


def test_examples(args: Args) -> list[Example]:
    """The questions to ask. Says how many there are of a file without splits."""
    examples = load_split(args, args.data, args.split, args.limit)
    if is_single_file(args.data) and args.split != "all":
        print(f"{args.data} has no splits: {len(examples)} questions of its {args.split} part; --split all takes all")
    return examples


def training_examples(args: Args) -> list[Example]:
    """The questions that the model was trained on, as far as they are known. The splits of a generated set need no such
    check: they share nothing by the way they are made."""
    if args.training:
        return load_split(args, args.training, "train")
    has_train_split = args.data in SOURCES or is_single_file(args.data) or any(Path(args.data).glob("train.*"))
    return load_split(args, args.data, "train") if has_train_split and args.split not in ("train", "all") else []


def load_split(args: Args, data: str, split: str, limit: int | None = None) -> list[Example]:
    """The examples of one split, by `load_examples`. The "train" and "test" of a single file are the two parts that
    recipes train on and hold out (`load_splits`); "all" is the whole file.

    Raises UserError as `load_examples` does, for a single file without such a part, and for "all" of anything else."""
    load = functools.partial(load_examples, data, question=args.question, answer=args.answer, config=args.config)
    if not is_single_file(data):
        if split == "all":
            raise UserError(f"--split all: {data} is not a single file; name one of its splits, such as test")
        return load(split=split, limit=limit)
    if split == "all":
        return load(limit=limit)
    if split not in ("train", "test"):
        raise UserError(f"--split {split}: {data} is a single file; give train, test or all")
    examples = load()
    part = by_hash(examples, split)
    if not part:
        raise UserError(f"--split {split}: none of the {len(examples)} questions of {data} is in it; give --split all")
    return part[:limit]


if __name__ == "__main__":
    run_program(Args, main)
