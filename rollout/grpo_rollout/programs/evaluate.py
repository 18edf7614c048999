"""Accuracy over a whole test set: pass@1, pass@k and maj@k with standard errors, through any engine, resumable.

python -m grpo_rollout.programs.evaluate --model Qwen/Qwen2.5-1.5B-Instruct --adapter runs/mine/adapter --data gsm8k
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from grpo.tasks.answers import Number, extract_answer, extract_lenient, normalize, parse_number
from grpo.tasks.data import GENERATED, SOURCES, Example, by_hash, check_disjoint, is_single_file, load_examples
from grpo.tasks.rewards import Reward, correctness, countdown
from grpo.tasks.sandbox import Sandbox


class Generates(Protocol):
    """What of an engine is used. The engines themselves live in grpo_rollout, which this package does not import."""

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Any, *, seed: int
    ) -> Sequence[Any]: ...


class Evaluation(NamedTuple):
    metrics: dict[str, float]
    """see `summarize`"""
    records: list[dict[str, Any]]
    """one a question, in the order of the examples, as in the file"""


def evaluate(
    engine: Generates,
    sampling: Any,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    examples: Sequence[Example],
    *,
    samples: int = 1,
    seed: int = 0,
    check: Reward = correctness,
    extract: Callable[[str], str | None] = extract_answer,
    extract_lenient: Callable[[str], str | None] = extract_lenient,
    training: Iterable[Example] = (),
    out: Path | None = None,
    settings: dict[str, Any] | None = None,
    questions_per_batch: int = 64,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Evaluation:
    """Answer every question `samples` times and check the answers against the ground_truths.

    engine, sampling: as for a rollout. encode: a question to its prompt's token ids. decode: token ids to text.
    check: a reward of `grpo.tasks.rewards`, called as check(completions, ground_truths, extract=...); 1 is right. For ground_truths that only
    algebra can compare, `functools.partial(correctness, sandbox=sandbox)`. extract, extract_lenient: where a strict and
    a lenient reading find the answer. training: must share no question with examples.
    out: a .jsonl file. Its first line holds what the evaluation was made with, `settings` (of the caller) included;
    then comes a line a question. If it exists and was made with the same, the evaluation goes on where it ends, and
    gives what it would have given uninterrupted. progress: called after each batch with the questions done, all
    of them, and the metrics so far.

    Raises ValueError for no examples, fewer than one sample, a shared question, or a file made with something else,
    which it names."""
    if not examples:
        raise ValueError("no test questions: the data set is empty; check --data, --split and --limit")
    if samples < 1 or questions_per_batch < 1:
        raise ValueError(f"--samples {samples} and --batch {questions_per_batch} must be at least 1")
    check_disjoint(training, examples)
    prompts = [list(encode(e.question)) for e in examples]
    header = {
        **(settings or {}),
        "questions": len(examples),
        "examples": _digest(examples),
        "prompts": _digest(prompts),
        "sampling": sampling._asdict() if hasattr(sampling, "_asdict") else repr(sampling),
        "samples": samples,
        "seed": seed,
        "batch": questions_per_batch,
    }
    records = _begin(out, json.loads(json.dumps(header)), questions_per_batch) if out else []
    for start in range(len(records), len(examples), questions_per_batch):
        batch = examples[start : start + questions_per_batch]
        completions = engine.generate(
            prompts[start : start + len(batch)], samples, sampling, seed=seed * 1_000_003 + start
        )
        texts = [decode(c.token_ids) for c in completions]
        ground_truths = [e.ground_truth for e in batch for _ in range(samples)]
        strict = check(texts, ground_truths, extract=extract)
        lenient = check(texts, ground_truths, extract=extract_lenient)
        new = []
        for i, example in enumerate(batch):
            rows = range(i * samples, (i + 1) * samples)
            new.append(
                {
                    "index": start + i,
                    "question": example.question,
                    "ground_truth": example.ground_truth,
                    "completions": [texts[r] for r in rows],
                    "answers": [extract(texts[r]) for r in rows],
                    "lenient_answers": [extract_lenient(texts[r]) for r in rows],
                    # A check that was skipped for lack of time comes as an exception: not shown right, so not right.
                    "correct": [strict[r] == 1.0 for r in rows],
                    "lenient_correct": [lenient[r] == 1.0 for r in rows],
                    "tokens": [len(completions[r].token_ids) for r in rows],
                    "truncated": [bool(completions[r].truncated) for r in rows],
                }
            )
        records += new
        if out:
            with open(out, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in new)
        if progress:
            progress(len(records), len(examples), summarize(records))
    return Evaluation(summarize(records), records)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _begin(out: Path, header: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """Write the header of a new file, or read the whole batches of one with the same header and cut off the rest."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists() or not out.stat().st_size:
        out.write_text(json.dumps({"evaluation": header}) + "\n", encoding="utf-8")
        return []
    with open(out, "rb+") as file:
        first = file.readline()
        try:
            written = json.loads(first)["evaluation"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--out {out}: exists and is not an evaluation's file; give another") from None
        for name in {**written, **header}:
            if written.get(name) != header.get(name):
                raise ValueError(
                    f"--out {out}: was made with {name} {written.get(name)!r}, and now it is {header.get(name)!r}; "
                    "give another file, or delete this one"
                )
        records: list[dict[str, Any]] = []
        end, whole = file.tell(), 0
        for line in iter(file.readline, b""):
            if not line.endswith(b"\n"):
                break
            records.append(json.loads(line))
            if len(records) % batch == 0 or len(records) == header["questions"]:
                end, whole = file.tell(), len(records)
        file.truncate(end)  # a batch cut short is sampled anew, so that the seeds are those of an unbroken run
    return records[:whole]


# ---------------------------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased, from c right ones of n: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), eq. 1. Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, but n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """1 if the most frequent answer is right, 0 if not; the share of right ones among answers equally frequent.

    Equal numbers are one answer however they are written; samples without an answer have no vote."""
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
    number = parse_number(answer)
    if number is None:
        return normalize(answer)
    return number if number.percent else number.value


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, std(ddof=1) / sqrt(n); the error of one value is NaN."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics over questions; each accuracy with its standard error under the same name and `_se`.

    With n samples a question: `pass_at_k` for k = 1, 2, 4, ... up to n, and n; `maj_at_n` for n > 1; the same by the
    lenient reading with `_lenient`. `answered`: share of samples in which the strict reading finds an answer;
    `truncated`: share cut off by the length limit; `tokens`: mean length. The questions are what is drawn at
    random: samples of one question are no independent evidence, so errors come from the spread over questions."""
    n = len(records[0]["correct"])
    metrics: dict[str, float] = {}
    ks = sorted({1, n, *(2**i for i in range(n.bit_length()))} & set(range(1, n + 1)))
    for suffix, correct, answers in (("", "correct", "answers"), ("_lenient", "lenient_correct", "lenient_answers")):
        scores = {f"pass_at_{k}{suffix}": [pass_at_k(n, sum(r[correct]), k) for r in records] for k in ks}
        if n > 1:
            scores[f"maj_at_{n}{suffix}"] = [majority(r[answers], r[correct]) for r in records]
        for name, values in scores.items():
            metrics[name], metrics[f"{name}_se"] = mean_and_error(values)
    metrics["answered"] = _mean(a is not None for r in records for a in r["answers"])
    metrics["truncated"] = _mean(t for r in records for t in r["truncated"])
    metrics["tokens"] = _mean(t for r in records for t in r["tokens"])
    return metrics


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


# --------------------------------------------------------------------------------------------------- the command


@dataclasses.dataclass
class Args:
    model: str
    """a hub name, a transformers folder, or a .gguf file"""
    adapter: str | None = None
    """a PEFT adapter's folder; without one the model itself is evaluated"""
    data: str = "gsm8k"
    """gsm8k, math, dapo-math, arithmetic, countdown, a hub data set, or a local file or folder of splits"""
    split: str = "test"
    """which split of it. A single file's are those of the recipes: test, the one question in twenty that they hold out,
    and train, the others; all is the whole file"""
    config: str | None = None
    """configuration of a hub data set"""
    question: str | None = None
    """field that holds the question"""
    answer: str | None = None
    """field that holds the answer or solution"""
    limit: int | None = None
    """the first so many questions only"""
    training: str | None = None
    """data whose train split the model was trained on; it must share no question with the test. By default that of
    --data, where that is a known set, a folder with a train file, or a single file whose test part is asked"""
    system: str | None = None
    """system message, such as the recipe's"""
    prompt: str = "{question}"
    """user message; {question} stands for the question"""
    samples: int = 1
    """answers to each question; for pass@k and maj@k take more than one and a temperature above 0"""
    temperature: float = 0.0
    """0 is greedy"""
    max_tokens: int = 512
    """tokens an answer may take"""
    seed: int = 0
    """of the sampling"""
    batch: int = 64
    """questions generated at once"""
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """what generates: vLLM on a GPU that has it, else PyTorch"""
    load_in_4bit: bool = True
    """NF4 weights, as in training; off: 16 bit on a GPU, 32 on a CPU"""
    out: Path = Path("runs/evaluation.jsonl")
    """records, a line a question; an unfinished file is continued"""


def load_split(data: str, split: str, *, limit: int | None = None, **fields: Any) -> list[Example]:
    """The questions of one split. data, limit, fields: of `load_examples`. A single file's "train" and "test" are the
    two parts of `load_splits`, so that a recipe trained on no question of "test"; "all" is the whole file.

    Raises ValueError, as `load_examples`, and for a single file without such a split, or "all" of anything else."""
    if not is_single_file(data):
        if split == "all":
            raise ValueError(f"--split all: {data} is not a single file; name one of its splits, such as test")
        return load_examples(data, split=split, limit=limit, **fields)
    if split == "all":
        return load_examples(data, limit=limit, **fields)
    if split not in ("train", "test"):
        raise ValueError(f"--split {split}: {data} is a single file; give train, test or all")
    examples = load_examples(data, **fields)
    part = by_hash(examples, split)
    if not part:
        raise ValueError(f"--split {split}: none of the {len(examples)} questions of {data} is in it; give --split all")
    return part[:limit]


def main(args: Args) -> Evaluation:
    """The command, with its arguments as an object. Prints a line a batch and the metrics at the end."""
    # Imported here: this package depends on no engine; only who runs the command needs one, and a model.
    import torch

    from grpo.policy.models import encode_chat, load_policy, load_tokenizer, model_source, stop_ids
    from grpo.runs.run import fingerprint
    from grpo_rollout.engine import Sampling
    from grpo_rollout.make import make_engine

    if "{question}" not in args.prompt:
        raise ValueError("--prompt must hold {question}, which stands for the question")
    if args.temperature < 0 or (args.temperature == 0 and args.samples > 1):
        raise ValueError(
            f"--temperature {args.temperature} with --samples {args.samples}: greedy samples are all the same; "
            "take a temperature above 0, or one sample"
        )
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1; leave it out to take every question")
    load = functools.partial(load_split, question=args.question, answer=args.answer, config=args.config)
    examples = load(args.data, args.split, limit=args.limit)
    if is_single_file(args.data) and args.split != "all":
        print(f"{args.data} has no splits: {len(examples)} questions of its {args.split} part; --split all takes all")
    training: list[Example] = []
    if args.training:
        training = load(args.training, "train")
    elif args.split not in ("train", "all") and (
        args.data in (*SOURCES, *GENERATED) or is_single_file(args.data) or list(Path(args.data).glob("train.*"))
    ):
        training = load(args.data, "train")
    tokenizer = load_tokenizer(args.model)

    def encode(question: str) -> list[int]:
        messages = [{"role": "user", "content": args.prompt.replace("{question}", question)}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        return encode_chat(tokenizer, messages)

    check_disjoint(training, examples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Without an adapter a new one of rank 1 changes nothing: its B is zero.
    model = load_policy(
        args.model, adapter=args.adapter, lora_rank=1, load_in_4bit=args.load_in_4bit, device=device, seed=args.seed
    )
    engine = make_engine(
        args.engine,
        model,
        eos_ids=stop_ids(args.model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        max_prompt_tokens=max(len(encode(e.question)) for e in examples),
        max_completion_tokens=args.max_tokens,
    )
    engine.sync(model)
    puzzles = args.data == "countdown"
    # Where every ground_truth is a number an answer that is none is wrong; algebra would take "9*2" for 18.
    numbers_only = all(parse_number(e.ground_truth) for e in examples)
    with Sandbox() as sandbox:
        result = evaluate(
            engine,
            Sampling(temperature=args.temperature, max_tokens=args.max_tokens),
            encode,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            examples,
            samples=args.samples,
            seed=args.seed,
            check=countdown if puzzles else functools.partial(correctness, sandbox=None if numbers_only else sandbox),
            # An expression is found in its tags or box; the last number of a text, the lenient answer, is none.
            extract_lenient=extract_answer if puzzles else extract_lenient,
            training=training,
            out=args.out,
            settings={
                "model": args.model,
                "model_sha256": fingerprint(model_source(args.model))["sha256"],
                "adapter": args.adapter,
                "adapter_sha256": fingerprint(Path(args.adapter) if args.adapter else None)["sha256"],
                "load_in_4bit": args.load_in_4bit,
                "engine": type(engine).__name__,
                "check": "countdown" if puzzles else "correctness",
            },
            questions_per_batch=args.batch,
            progress=lambda done, of, metrics: print(
                f"{done}/{of} questions: pass@1 {metrics['pass_at_1']:.3f}, lenient {metrics['pass_at_1_lenient']:.3f}",
                flush=True,
            ),
        )
    for name, value in result.metrics.items():
        if not name.endswith("_se"):
            error = result.metrics.get(f"{name}_se")
            print(f"{name:24}{value:10.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    print(f"{len(result.records)} questions, {args.samples} samples each; records in {args.out}")
    return result


if __name__ == "__main__":
    import tyro

    from grpo.runs.cli import user_errors

    with user_errors():
        main(tyro.cli(Args, description=__doc__))
