"""Questions and their ground truths: from the hub, from local files, or generated.

Which split a question belongs to depends on its text alone: on no random generator, no order of rows, and no other
question. docs/data.md describes the sources and their columns.
"""

import csv
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from grpo.errors import UserError, looks_like_path
from grpo.sampler import Question
from grpo.tasks.answers import final_answer

logger = logging.getLogger(__name__)

GENERATED = ("arithmetic", "countdown")
FILE_TYPES = (".jsonl", ".csv", ".parquet")


class Example(NamedTuple):
    """A question and its ground truth, as the data have them; with a prompt it becomes a `Question`."""

    question: str
    ground_truth: str
    """the final answer alone, without its derivation"""


class Source(NamedTuple):
    """Where a data set lives on the hub, and which of its fields hold the question and the answer."""

    hub: str
    """name of the data set on the hub"""
    config: str | None
    """name of its configuration"""
    question: str
    """field that holds the question"""
    answer: str
    """field that holds the answer or a whole solution"""
    splits: tuple[str, ...]
    """splits on the hub; if "test" is not among them, it is cut from "train" by hash (`by_hash`)"""


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", "question", "answer", ("train", "test")),
    "math": Source("DigitalLearningGmbH/MATH-lighteval", "default", "problem", "solution", ("train", "test")),
    "dapo-math": Source("open-r1/DAPO-Math-17k-Processed", "en", "prompt", "solution", ("train",)),
}


# ------------------------------------------------------------------------------------------- what recipes call


def load_questions(
    data: str, encode: Callable[[str], list[int]], *, max_prompt_tokens: int, held_out: int, **fields: Any
) -> tuple[list[Question], list[Question]]:
    """The training questions of `--data`, in the order of the data, and at most `held_out` questions to evaluate on.

    data, fields: source and keywords of `load_examples` (`question=`, `answer=`, `config=`). encode: question -> token
    ids of its whole prompt; it is called once per question. Questions with longer prompts than `max_prompt_tokens` are
    dropped. The held-out ones are a `fixed_sample` of the test split.

    Raises UserError as `load_splits`, `drop_long` and `check_disjoint` do."""
    train, test = (_encoded(part, encode, max_prompt_tokens) for part in load_splits(data, **fields))
    sample = fixed_sample(test, held_out)
    check_disjoint(train, sample)
    return train, sample


def split_questions(
    train: list[Example], held_out: list[Example], encode: Callable[[str], list[int]], *, max_prompt_tokens: int
) -> tuple[list[Question], list[Question]]:
    """The questions of two lists of examples, generated ones for instance, in their order. See `load_questions`.

    Raises UserError if a prompt length leaves nothing, or if a question is in both."""
    questions = _encoded(train, encode, max_prompt_tokens), _encoded(held_out, encode, max_prompt_tokens)
    check_disjoint(*questions)
    return questions


def _encoded(examples: list[Example], encode: Callable[[str], list[int]], max_prompt_tokens: int) -> list[Question]:
    return drop_long([Question(e.question, e.ground_truth, encode(e.question)) for e in examples], max_prompt_tokens)


# -------------------------------------------------------------------------------------------------------- sources


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
    """The examples of one split, in a fixed order, each question once.

    source: "gsm8k", "math" or "dapo-math" (from the hub); "arithmetic" or "countdown" (generated, see below); a local
        .jsonl, .csv or .parquet file, which is taken whole, whatever the split; a local folder that holds
        `<split>.jsonl` (or .csv, .parquet); else the name of any data set on the hub, with `config`.
    question, answer: names of the fields of a row; by default "question" and "answer", or those of the known set. A
        dotted name leads into nested fields: "reward_model.ground_truth", "prompt.0.content". The ground truth is
        `final_answer` of the answer field, so the field may hold a whole solution in GSM8K's or MATH's form.
    limit: maximum number of examples, the first ones. seed: random seed of the generated sets.

    Raises UserError that names the flag, or the row and the field, and the remedy."""
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} must be at least 1; leave it out to take every example")
    if source in (*GENERATED, *SOURCES) and split not in ("train", "test"):
        raise UserError(f'split {split!r}: {source} has "train" and "test"')
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
        raise UserError(f"--data {source}: no such file or folder; give one, or the name of a hub data set")
    else:
        rows = _hub_rows(known._replace(config=config, splits=(split,)), split)
    examples = examples_from_rows(rows, question or known.question, answer or known.answer, name)
    if source in SOURCES and "test" not in known.splits:
        examples = by_hash(examples, split)
    return examples[:limit]


def examples_from_rows(
    rows: Iterable[tuple[str, Any]], question: str, answer: str, source: str = "data"
) -> list[Example]:
    """One example per row; later copies of a question are dropped, and a warning says how many.

    rows: pairs of a place ("row 3") and a row (a dictionary). question, answer: names of its fields. source: name of
    the data in messages. Raises UserError, naming place and field, if a field is missing or empty."""
    examples: dict[str, Example] = {}
    duplicates = 0
    for place, row in rows:
        texts = []
        for field in (question, answer):
            value = _field(row, field, f"{source}, {place}")
            text = "" if value is None else str(value).strip()
            if not text:
                raise UserError(
                    f"{source}, {place}: field {field!r} is empty; every row needs a question and an answer"
                )
            texts.append(text)
        ground_truth = final_answer(texts[1])
        if not ground_truth:
            raise UserError(f"{source}, {place}: field {answer!r} holds no answer after its mark: {texts[1][-80:]!r}")
        key = question_hash(texts[0])
        duplicates += key in examples
        examples.setdefault(key, Example(texts[0], ground_truth))
    if not examples:
        raise UserError(f"{source} holds no rows")
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
            raise UserError(
                f"{place}: no field {name!r}; it has {fields}. Rename them, or name yours "
                "where the recipe calls load_questions(..., question=..., answer=...)"
            )
    return value


def _split_file(folder: Path, split: str) -> Path:
    for suffix in FILE_TYPES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise UserError(f"{folder} holds no {split}.jsonl, .csv or .parquet; give a file, or a folder with that split")


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise UserError(f"--data {path}: no such file; give one, a folder, or the name of a hub data set")
    if path.suffix == ".parquet":
        import pyarrow.parquet  # a dependency of datasets; slow to import

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
                        raise UserError(f"{path}, line {i}: not JSON ({error})") from None
    else:
        raise UserError(f"{path}: cannot read a {path.suffix or 'file without suffix'}; use .jsonl, .csv or .parquet")


def _hub_rows(source: Source, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and only needed here

    hub_split = split if split in source.splits else "train"
    try:
        rows = datasets.load_dataset(source.hub, source.config, split=hub_split)
    except Exception as error:  # many libraries can fail here in many ways, and the user's remedy is always the same
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--data {source.hub}: split {hub_split!r} cannot be loaded from the hub "
            f"({type(error).__name__}: {reason}); check the name, the split and the connection, or give a "
            "folder that holds train.jsonl and test.jsonl"
        ) from error
    return ((f"row {i}", row) for i, row in enumerate(rows))


# ------------------------------------------------------------------------------------------ splits and filters


def question_hash(question: str) -> str:
    """SHA-256 of a question, as hexadecimal digits. Case and spacing do not change it."""
    return hashlib.sha256(" ".join(question.split()).casefold().encode("utf-8", "surrogatepass")).hexdigest()


def in_held_out(key: str, share: float = 0.2) -> bool:
    """Whether a text falls into the held-out `share` (a fraction) by its hash, whatever else is in the data."""
    return int(question_hash(key)[:8], 16) < share * 2**32


def by_hash(examples: Sequence[Example], split: str, *, share: float = 0.05) -> list[Example]:
    """The "train" or the "test" examples of a set that has no splits of its own. The hash of a question decides;
    `share` is the fraction that is held out for "test"."""
    return [e for e in examples if in_held_out(e.question, share) == (split != "train")]


def is_single_file(source: str) -> bool:
    """Whether `--data` names a single file, which has no splits of its own."""
    return source not in SOURCES and source not in GENERATED and Path(source).is_file()


def load_splits(source: str, **fields: Any) -> tuple[list[Example], list[Example]]:
    """The training and the test examples of `--data`. source, fields: as in `load_examples`.

    A single file has no splits: one question in twenty is held out by its hash, and a warning says so. Raises UserError
    as `load_examples` does, and for a file with too few questions to hold one out."""
    if not is_single_file(source):
        train, test = (load_examples(source, split=split, **fields) for split in ("train", "test"))
        return train, test
    examples = load_examples(source, **fields)
    train, test = (by_hash(examples, split) for split in ("train", "test"))
    if not (train and test):
        raise UserError(
            f"--data {source}: {len(examples)} questions are too few to hold one in twenty out; give a folder with "
            "train.jsonl and test.jsonl"
        )
    logger.warning("%s has no splits: %d of its %d questions are held out", source, len(test), len(examples))
    return train, test


def fixed_sample(questions: Sequence[Question], n: int) -> list[Question]:
    """`n` of the questions, or all if there are fewer. Their hashes choose them, so the sample does not depend on the
    order of the file, and is not just its first chapter."""
    return sorted(questions, key=lambda q: question_hash(q.text))[:n]


def check_disjoint(train: Iterable[Example | Question], test: Iterable[Example | Question]) -> None:
    """Raise UserError, quoting the first one, if training questions are test questions too."""
    hashes = {question_hash(text) for text, *_ in train}
    shared = [text for text, *_ in test if question_hash(text) in hashes]
    if shared:
        raise UserError(
            f"{len(shared)} test questions are training questions too, the first {shared[0][:100]!r}; "
            "an accuracy on them would mean nothing: evaluate on another split"
        )


def drop_long(questions: Sequence[Question], max_prompt_tokens: int) -> list[Question]:
    """The questions whose whole prompt has at most `max_prompt_tokens` tokens, in their order. A warning says how many
    were dropped, and how long the longest was. Raises UserError if nothing is left."""
    lengths = [len(q.prompt) for q in questions]
    kept = [q for q, n in zip(questions, lengths) if n <= max_prompt_tokens]
    if questions and not kept:
        raise UserError(
            f"all {len(questions)} questions are longer than {max_prompt_tokens} prompt tokens "
            f"(the shortest has {min(lengths)}); raise --max-prompt-tokens"
        )
    if len(kept) < len(questions):
        logger.warning(
            "dropped %d of %d questions of more than %d prompt tokens (the longest has %d)",
            len(questions) - len(kept),
            len(questions),
            max_prompt_tokens,
            max(lengths),
        )
    return kept


# ------------------------------------------------------------------------------------------------- generated


def arithmetic_examples(
    n: int | None = None, *, digits: int = 1, operations: str = "+", seed: int = 0, split: str = "train"
) -> list[Example]:
    """`n` distinct questions such as "What is 3+4?"; the same arguments give the same questions.

    digits: maximum number of digits of an operand. operations: some of "+-*/"; quotients are whole, and no divisor
    is 0. split: "train", or "test" for the held-out fifth. The operands decide the split, in sorted order for + and *:
    "3+4" and "4+3" fall on the same side. n None: every question there is, if that is at most 100,000.

    Raises UserError if there are not that many questions."""
    if not 1 <= digits <= 9:
        raise UserError(f"digits {digits} must lie in 1..9")
    if not operations or set(operations) - set("+-*/"):
        raise UserError(f"operations {operations!r} must be some of + - * /, such as '+-'")
    base = 10**digits
    population = base * base * len(operations)
    if n is None and population > 100_000:
        raise UserError(f"digits={digits} makes {population} questions: say how many you want")
    draws = population if n is None else min(population, 20 * n)
    while True:
        examples: dict[str, Example] = {}
        for index in random.Random(seed).sample(range(population), draws):  # a range takes no memory, however large
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
            raise UserError(
                f"{n} {split} questions asked, but digits={digits} and operations={operations!r} make only "
                f"{len(examples)}; ask for fewer, or for more digits or operations"
            )
        draws = min(population, 4 * draws)


def countdown_examples(
    n: int, *, numbers: int = 4, max_number: int = 99, max_target: int = 100, seed: int = 0, split: str = "train"
) -> list[Example]:
    """`n` different Countdown puzzles. Each has a solution: its target is the value of a random expression of all its
    numbers.

    The ground truth is "target: number number ...", which `grpo.tasks.rewards.countdown` reads; any right expression is
    a solution. numbers: how many numbers a puzzle has, each in 1..max_number. The target lies in 1..max_target. split:
    "train", or "test" for the held-out fifth; the hash of target and sorted numbers decides.

    Raises UserError for settings that make no puzzle, or not that many."""
    if n < 1 or not 2 <= numbers <= 8 or max_number < 1 or max_target < 1:
        raise UserError(
            f"countdown: {n=}, {numbers=}, {max_number=}, {max_target=}: numbers must lie in 2..8, the others above 0"
        )
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
    raise UserError(
        f"countdown: could not find {n} different puzzles of {numbers} numbers up to {max_number}; ask for fewer"
    )


def _random_value(values: Sequence[int], rng: random.Random) -> Fraction | None:
    """The value of a random expression that uses each number once; None if it divides by zero."""
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
