"""Questions and ground_truth answers: from the hub, from local files, or generated. Splits are functions of the text alone."""

import csv
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from grpo.errors import looks_like_path
from grpo.tasks.answers import final_answer

logger = logging.getLogger(__name__)

GENERATED = ("arithmetic", "countdown")
FILE_TYPES = (".jsonl", ".csv", ".parquet")


class Example(NamedTuple):
    question: str
    ground_truth: str
    """the final answer alone, not its derivation"""


class Source(NamedTuple):
    """Where a data set lives on the hub, and which of its fields are the question and the answer."""

    hub: str
    config: str | None
    question: str
    answer: str
    splits: tuple[str, ...]
    """of the hub; without a "test" among them one is cut from "train" by hash (`by_hash`)"""


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", "question", "answer", ("train", "test")),
    "math": Source("DigitalLearningGmbH/MATH-lighteval", "default", "problem", "solution", ("train", "test")),
    "dapo-math": Source("open-r1/DAPO-Math-17k-Processed", "en", "prompt", "solution", ("train",)),
}


def load_examples(
    source: str,
    *,
    split: str = "train",
    question: str | None = None,
    answer: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """Questions and ground_truths of one split, in a fixed order, each question once.

    source: "gsm8k", "math" or "dapo-math" (from the hub); "arithmetic" or "countdown" (generated, see there); a
        local .jsonl, .csv or .parquet file, which is taken whole whatever the split; a local folder that holds
        `<split>.jsonl` (or .csv, .parquet); or else the name of any hub data set, with `config`.
    question, answer: fields of a row, by default "question" and "answer" or the known set's own. A dotted name goes
        into nested fields: "reward_model.ground_truth", "prompt.0.content". The ground_truth is `final_answer` of the
        answer field, so whole solutions in GSM8K's or MATH's form will do.
    limit: the first so many examples only. seed: of the generated ones.

    Raises ValueError that names the flag, or the row and the field, and the remedy."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} must be at least 1; leave it out to take every example")
    if source in (*GENERATED, *SOURCES) and split not in ("train", "test"):
        raise ValueError(f'split {split!r}: {source} has "train" and "test"')
    if source in GENERATED:
        if source == "arithmetic":
            return arithmetic_examples(limit, seed=seed, split=split)
        return countdown_examples(limit or 10_000, seed=seed, split=split)
    known = SOURCES.get(source, Source(source, config, "question", "answer", ("train", "test")))
    path, name = Path(source), source
    if source in SOURCES:
        rows = _hub_rows(known, split)
    elif path.is_dir():
        file = _split_file(path, split)
        rows, name = _file_rows(file), str(file)
    elif path.suffix in FILE_TYPES or path.is_file():
        rows = _file_rows(path)
    elif looks_like_path(source):
        raise ValueError(f"--data {source}: no such file or folder; give one, or the name of a hub data set")
    else:
        rows = _hub_rows(known._replace(config=config, splits=(split,)), split)
    examples = examples_from_rows(rows, question or known.question, answer or known.answer, name)
    if source in SOURCES and "test" not in known.splits:
        examples = by_hash(examples, split)
    return examples[:limit]


def examples_from_rows(
    rows: Iterable[tuple[str, Any]], question: str, answer: str, source: str = "data"
) -> list[Example]:
    """rows: pairs of a place ("row 3") and a row (a dictionary). Later copies of a question are dropped, and said so.

    Raises ValueError, naming place and field, for a row without the field, or with nothing in it."""
    examples: dict[str, Example] = {}
    duplicates = 0
    for place, row in rows:
        texts = []
        for field in (question, answer):
            value = _field(row, field, f"{source}, {place}")
            text = "" if value is None else str(value).strip()
            if not text:
                raise ValueError(
                    f"{source}, {place}: field {field!r} is empty; every row needs a question and an answer"
                )
            texts.append(text)
        ground_truth = final_answer(texts[1])
        if not ground_truth:
            raise ValueError(f"{source}, {place}: field {answer!r} holds no answer after its mark: {texts[1][-80:]!r}")
        key = question_hash(texts[0])
        duplicates += key in examples
        examples.setdefault(key, Example(texts[0], ground_truth))
    if not examples:
        raise ValueError(f"{source} holds no rows")
    if duplicates:
        logger.warning("%s: dropped %d rows that repeat a question", source, duplicates)
    return list(examples.values())


def _field(row: Any, name: str, place: str) -> Any:
    value = row
    for part in [name] if isinstance(row, dict) and name in row else name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            fields = ", ".join(map(repr, row)) if isinstance(row, dict) else f"no fields: it is a {type(row).__name__}"
            raise ValueError(
                f"{place}: no field {name!r}; it has {fields}. Rename them, or name yours "
                "where the recipe calls load_splits(..., question=..., answer=...)"
            )
    return value


def _split_file(folder: Path, split: str) -> Path:
    for suffix in FILE_TYPES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise ValueError(f"{folder} holds no {split}.jsonl, .csv or .parquet; give a file, or a folder with that split")


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file; give one, a folder, or the name of a hub data set")
    if path.suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets, and is slow to import

        for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
            yield f"row {i}", row
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            for i, row in enumerate(csv.DictReader(file)):
                yield f"row {i}", row
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"line {i}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {i}: not JSON ({error})") from None
    else:
        raise ValueError(f"{path}: cannot read a {path.suffix or 'file without suffix'}; use .jsonl, .csv or .parquet")


def _hub_rows(source: Source, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and only needed here

    hub_split = split if split in source.splits else "train"
    try:
        rows = datasets.load_dataset(source.hub, source.config, split=hub_split)
    except Exception as error:  # whatever went wrong, of many libraries, the user's remedy is the same
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--data {source.hub}: split {hub_split!r} cannot be loaded from the hub "
            f"({type(error).__name__}: {reason}); check the name, the split and the connection, or give a "
            "folder that holds train.jsonl and test.jsonl"
        ) from error
    return ((f"row {i}", row) for i, row in enumerate(rows))


# ------------------------------------------------------------------------------------------ splits and filters


def question_hash(question: str) -> str:
    """SHA-256 (hex) of a question, whatever its case and spacing: the same question has the same hash."""
    return hashlib.sha256(" ".join(question.split()).casefold().encode("utf-8", "surrogatepass")).hexdigest()


def in_held_out(key: str, share: float = 0.2) -> bool:
    """Whether a text falls into the held-out `share`, by its hash: for ever, whatever else is in the data."""
    return int(question_hash(key)[:8], 16) < share * 2**32


def by_hash(examples: Sequence[Example], split: str, *, share: float = 0.05) -> list[Example]:
    """The "train" or the held-out ("test") examples of a set that has no split of its own, by the questions' hashes."""
    return [e for e in examples if in_held_out(e.question, share) == (split != "train")]


def is_single_file(source: str) -> bool:
    """Whether `--data` names one file, which has no splits of its own."""
    return source not in SOURCES and source not in GENERATED and Path(source).is_file()


def load_splits(source: str, **fields: Any) -> tuple[list[Example], list[Example]]:
    """The training and the held-out examples of `--data`. source, fields: of `load_examples`.

    A single file has no splits: one in twenty of its questions is held out, by their hashes, and a warning says so.
    Raises ValueError, as `load_examples`, and for a file too short to hold a question out."""
    if not is_single_file(source):
        train, test = (load_examples(source, split=split, **fields) for split in ("train", "test"))
        return train, test
    examples = load_examples(source, **fields)
    train, test = (by_hash(examples, split) for split in ("train", "test"))
    if not (train and test):
        raise ValueError(
            f"--data {source}: {len(examples)} questions are too few to hold one in twenty out; give a folder with "
            "train.jsonl and test.jsonl"
        )
    logger.warning("%s has no splits: %d of its %d questions are held out", source, len(test), len(examples))
    return train, test


def fixed_sample(examples: Sequence[Example], n: int) -> list[Example]:
    """`n` of the examples (all, where there are fewer), by the questions' hashes: the same ones whatever their order in
    the file, and not those of its first chapter only."""
    return sorted(examples, key=lambda e: question_hash(e.question))[:n]


def check_disjoint(train: Iterable[Example], test: Iterable[Example]) -> None:
    """Raise ValueError, with the first such question, where a training question is also a test question."""
    hashes = {question_hash(e.question) for e in train}
    shared = [e.question for e in test if question_hash(e.question) in hashes]
    if shared:
        raise ValueError(
            f"{len(shared)} test questions are training questions too, the first {shared[0][:100]!r}; "
            "an accuracy on them would mean nothing: evaluate on another split"
        )


def drop_long(
    examples: Sequence[Example], length: Callable[[str], int], max_length: int, *, what: str = "prompt tokens"
) -> list[Example]:
    """The examples whose question has at most `max_length` of whatever `length` counts (tokens of the whole prompt,
    say). Logs a warning with the number dropped and the longest.

    Raises ValueError where nothing is left."""
    lengths = [length(e.question) for e in examples]
    kept = [e for e, n in zip(examples, lengths) if n <= max_length]
    if examples and not kept:
        raise ValueError(
            f"all {len(examples)} questions are longer than {max_length} {what} (the shortest has {min(lengths)}); "
            "raise --max-prompt-tokens"
        )
    if len(kept) < len(examples):
        logger.warning(
            "dropped %d of %d questions of more than %d %s (the longest has %d)",
            len(examples) - len(kept),
            len(examples),
            max_length,
            what,
            max(lengths),
        )
    return kept


# ------------------------------------------------------------------------------------------------- generated


def arithmetic_examples(
    n: int | None = None, *, digits: int = 1, operations: str = "+", seed: int = 0, split: str = "train"
) -> list[Example]:
    """`n` distinct questions such as "What is 3+4?", the same for the same arguments.

    digits: operands are the integers of at most so many digits. operations: any of "+-*/"; a quotient is whole,
    and no divisor 0. split: "train", or "test" for the held-out fifth. The split goes by the operands: for + and *
    "3+4" and "4+3" fall on the same side, so what is asked in one split is never in the other.
    n None: every one there is (of up to 100,000). Raises ValueError where there are not so many."""
    if not 1 <= digits <= 9:
        raise ValueError(f"digits {digits} must lie in 1..9")
    if not operations or set(operations) - set("+-*/"):
        raise ValueError(f"operations {operations!r} must be some of + - * /, such as '+-'")
    base = 10**digits
    population = base * base * len(operations)
    if n is None and population > 100_000:
        raise ValueError(f"digits={digits} makes {population} questions: say how many are wanted")
    draws = population if n is None else min(population, 20 * n)
    while True:
        examples: dict[str, Example] = {}
        for index in random.Random(seed).sample(range(population), draws):  # lazy, however large the population
            index, a = divmod(index, base)
            which, b = divmod(index, base)
            operation = operations[which]
            if operation == "/":
                b = max(b, 1)
                a, ground_truth = a * b, a
            else:
                ground_truth = {"+": a + b, "-": a - b, "*": a * b}[operation]
            first, second = sorted((a, b)) if operation in "+*" else (a, b)
            if in_held_out(f"{first}{operation}{second}") == (split != "train"):
                examples.setdefault(f"{a}{operation}{b}", Example(f"What is {a}{operation}{b}?", str(ground_truth)))
        if n is None or len(examples) >= n:
            return list(examples.values())[:n]
        if draws == population:
            raise ValueError(
                f"{n} {split} questions asked, but digits={digits} and operations={operations!r} make only "
                f"{len(examples)}; ask for fewer, or for more digits or operations"
            )
        draws = min(population, 4 * draws)


def countdown_examples(
    n: int, *, numbers: int = 4, max_number: int = 99, max_target: int = 100, seed: int = 0, split: str = "train"
) -> list[Example]:
    """`n` Countdown puzzles, each solvable: the target is the value of a random expression of all its numbers.

    The ground_truth is "target: number number ...", which `grpo.tasks.rewards.countdown` reads: any right expression is a
    solution. numbers: how many, of 1..max_number; the target lies in 1..max_target. split: "train", or "test" for
    the held-out fifth, by hash of the numbers and target."""
    if n < 1 or not 2 <= numbers <= 8 or max_number < 1 or max_target < 1:
        raise ValueError(f"countdown: {n=}, {numbers=}, {max_number=}, {max_target=}: n, maxima from 1, numbers 2..8")
    rng = random.Random(seed)
    examples: dict[str, Example] = {}
    for _ in range(2000 * n):
        if len(examples) == n:
            return list(examples.values())
        values = [rng.randint(1, max_number) for _ in range(numbers)]
        target = _random_value(values, rng)
        if target is None or target.denominator != 1 or not 1 <= target <= max_target:
            continue
        listed = " ".join(map(str, values))
        key = f"{target}: {' '.join(map(str, sorted(values)))}"
        if in_held_out(key) == (split != "train"):
            question = (
                f"Using the numbers {listed.replace(' ', ', ')}, write an expression that equals {target}. "
                "Use each number exactly once, and only + - * / and parentheses."
            )
            examples.setdefault(key, Example(question, f"{target}: {listed}"))
    raise ValueError(f"countdown: {n} different puzzles of {numbers} numbers up to {max_number} could not be found")


def _random_value(values: Sequence[int], rng: random.Random) -> Fraction | None:
    """The value of a random expression that uses each number once; None where it divides by zero."""
    terms = [Fraction(v) for v in values]
    while len(terms) > 1:
        a = terms.pop(rng.randrange(len(terms)))
        b = terms.pop(rng.randrange(len(terms)))
        operation = rng.choice("+-*/")
        if operation != "/":
            terms.append({"+": a + b, "-": a - b, "*": a * b}[operation])
        elif b:
            terms.append(a / b)
        else:
            return None
    return terms[0]
