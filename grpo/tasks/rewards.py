"""The rewards that ship: plain functions `(completions, ground_truths, ...) -> list[float]`, one number per completion.

`grpo.tasks.scoring.score` calls them. docs/rewards.md says how to write one's own.
"""

import ast
import functools
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

from grpo.errors import UserError
from grpo.tasks.answers import equal, extract_answer, normalize, parse_number
from grpo.tasks.sandbox import Sandbox
from grpo.tasks.scoring import Reward

# ----------------------------------------------------------------------------------------------- correctness


def correctness(
    completions: Sequence[str],
    ground_truths: Sequence[str],
    *,
    extract: Callable[[str], str | None] = extract_answer,
    sandbox: Sandbox | None = None,
) -> list[float | Exception]:
    r"""1 if the extracted answer equals the ground truth, else 0.

    Numbers are compared exactly, other text after normalization (`grpo.tasks.answers.equal`). What that cannot decide
    goes to math-verify in the workers of `sandbox` ("\sqrt{12}" equals "2\sqrt{3}"). An expression that runs out of
    time or memory there earns 0; one that was never checked, because the batch's time was used up, is returned as an
    exception. Without a sandbox, undecided answers earn 0, which is enough for data whose ground truths are numbers."""
    answers = [extract(c) for c in completions]
    decided = [equal(a, g) for a, g in zip(answers, ground_truths)]
    rewards: list[float | Exception] = [float(d or False) for d in decided]
    if sandbox is None:
        return rewards
    # The answers of a group often agree, so each pair of answer and ground truth is checked only once.
    undecided = dict.fromkeys((a, g) for a, g, d in zip(answers, ground_truths, decided) if d is None)
    outcomes = dict(zip(undecided, sandbox.map("grpo.tasks.symbolic:symbolic_equal", list(undecided))))
    for i, known in enumerate(decided):
        if known is None:
            outcome = outcomes[answers[i], ground_truths[i]]
            rewards[i] = TimeoutError(outcome.error) if outcome.skipped else float(outcome.value is True)
    return rewards


def numeric(
    completions: Sequence[str],
    ground_truths: Sequence[str],
    *,
    relative: float = 0.0,
    absolute: float = 0.0,
    extract: Callable[[str], str | None] = extract_answer,
) -> list[float]:
    """1 if the answer is a number within `max(relative * |ground truth|, absolute)` of the ground truth, else 0."""
    rewards = []
    for completion, ground_truth in zip(completions, ground_truths):
        answer, number = parse_number(extract(completion) or ""), parse_number(ground_truth)
        if number is None:
            raise UserError(f"the ground truth {ground_truth!r} is not a number; use `correctness` for such data")
        # Fractions, because a number of 310 digits is infinite as a float.
        tolerance = max(Fraction(relative) * abs(number.value), Fraction(absolute))
        rewards.append(float(answer is not None and abs(answer.value - number.value) <= tolerance))
    return rewards


def exact(
    completions: Sequence[str], ground_truths: Sequence[str], *, extract: Callable[[str], str | None] = extract_answer
) -> list[float]:
    """1 if answer and ground truth are the same text after `grpo.tasks.answers.normalize`, else 0."""
    answers = [extract(c) for c in completions]
    return [float(bool(a) and normalize(a or "") == normalize(g)) for a, g in zip(answers, ground_truths)]


_SIGNS = str.maketrans("×÷−", "*/-")
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(
    completions: Sequence[str], ground_truths: Sequence[str], *, extract: Callable[[str], str | None] = extract_answer
) -> list[float]:
    """1 if the answer is an expression of + - * / and parentheses that uses each given number exactly once and equals
    the target, else 0.

    ground_truths: "target: number number ...", as `grpo.tasks.data.countdown_examples` makes them. The expression may
    end in "= target", and × ÷ − are read as * / -."""
    rewards = []
    for completion, ground_truth in zip(completions, ground_truths):
        target, _, numbers = ground_truth.partition(":")
        expression, equals, right = (extract(completion) or "").translate(_SIGNS).partition("=")
        if equals and right.strip() != target:
            rewards.append(0.0)
            continue
        try:
            value, used = _evaluate(expression)
        except (ValueError, ZeroDivisionError):
            rewards.append(0.0)
            continue
        rewards.append(float(value == int(target) and Counter(used) == Counter(map(int, numbers.split()))))
    return rewards


def _evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an arithmetic expression, and the integers in it, read off Python's syntax tree: no code is
    run. Raises ValueError for anything but + - * / over non-negative integers of at most 9 digits."""
    if len(expression) > 200 or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        raise ValueError("not an arithmetic expression")
    if re.search(r"[0-9]{10}|\*\*|//", expression):
        raise ValueError("numbers too long, or operations other than + - * /")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not an arithmetic expression") from error
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError("operations other than + - * /")

    return value(tree.body), used


# ---------------------------------------------------------------------------------------------------- format


def format_tags(
    completions: Sequence[str], ground_truths: Sequence[str], *, tags: Sequence[str] = ("reasoning", "answer")
) -> list[float]:
    """1 if a completion is exactly `<reasoning>...</reasoning> <answer>...</answer>`, else 0.

    Each tag must occur exactly once and in order, each block must hold a letter or digit, and around and between the
    blocks there may only be white space. Blocks may span lines."""
    return [float(_well_formed(c, tags)) for c in completions]


def _well_formed(text: str, tags: Sequence[str]) -> bool:
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(text.count(mark) != 1 for mark in marks):
        return False
    pieces, rest = [], text
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:  # the mark stands before an earlier one
            return False
        pieces.append(piece)
    outside, inside = [*pieces[0::2], rest], pieces[1::2]
    return not any(p.strip() for p in outside) and all(map(_says_something, inside))


def _says_something(text: str) -> bool:
    return any(c.isalnum() for c in text)


def graded_tags(
    completions: Sequence[str],
    ground_truths: Sequence[str],
    *,
    tags: Sequence[str] = ("reasoning", "answer"),
    trailing: float = 0.001,
) -> list[float]:
    """The fraction of opening and closing tags that are in their place, in [0, 1]: a slope that leads to `format_tags`.

    A tag counts if it occurs exactly once, after the tags before it, and if its block holds a letter or digit. Each
    character after the last tag costs `trailing`; the reward never falls below 0."""
    rewards = []
    for text in completions:
        places = [text.find(m) if text.count(m) == 1 else -1 for tag in tags for m in (f"<{tag}>", f"</{tag}>")]
        marks, at, behind = 0, 0, 0
        for i, tag in enumerate(tags):
            start, end = places[2 * i], places[2 * i + 1]
            if start < at:
                continue
            at = max(at, end + len(tag) + 3 if end > start else at)  # so that a tag nested in this one does not count
            stop = min((p for p in places if p > start), default=len(text))
            if _says_something(text[start + len(tag) + 2 : stop]):
                marks += 2 if end == stop else 1
                behind = len(text[at:].strip()) if end == stop and tag == tags[-1] else 0
        rewards.append(max(0.0, marks / len(places) - trailing * behind))
    return rewards


# --------------------------------------------------------------------------------------- length and language


def overlong(
    completions: Sequence[str], ground_truths: Sequence[str], lengths: Sequence[int], *, max_length: int, buffer: int
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to `max_length - buffer` tokens, then linearly
    down to -1 at `max_length`, and -1 beyond. lengths: number of tokens per completion (a column of `score`)."""
    if not 0 < buffer <= max_length:
        raise UserError(f"overlong: buffer {buffer} must lie in 1..max_length ({max_length})")
    return [-min(max((n - (max_length - buffer)) / buffer, 0.0), 1.0) for n in lengths]


def brevity(
    completions: Sequence[str],
    ground_truths: Sequence[str],
    lengths: Sequence[int],
    *,
    max_length: int,
    correct: Reward = correctness,
) -> list[float]:
    """`1 - length / max_length`, at least 0, for a correct completion; 0 for a wrong one, so that an empty answer earns
    nothing. lengths: number of tokens per completion. correct: a reward that is positive for right answers."""
    right = [isinstance(r, (int, float)) and r > 0 for r in correct(completions, ground_truths)]
    return [max(0.0, 1 - n / max_length) if ok else 0.0 for ok, n in zip(right, lengths)]


def language_consistency(
    completions: Sequence[str], ground_truths: Sequence[str], *, scripts: Collection[str] = ("LATIN",)
) -> list[float]:
    """The fraction of a completion's letters and digits that are ASCII digits or of the given scripts, in [0, 1].

    scripts: first words of Unicode character names, such as LATIN, CYRILLIC, GREEK, CJK, HIRAGANA. Languages that share
    a script cannot be told apart. A completion without letters or digits earns 0."""
    rewards = []
    for text in completions:
        letters = Counter(c for c in text if c.isalnum())
        kept = sum(n for c, n in letters.items() if _script(c) in scripts or c in "0123456789")
        rewards.append(kept / letters.total() if letters else 0.0)
    return rewards


@functools.lru_cache(maxsize=65_536)
def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0]


def spelling(completions: Sequence[str], ground_truths: Sequence[str], *, words: Collection[str]) -> list[float]:
    """Minus the fraction of words (runs of ASCII letters) that are not in `words`, in [-1, 0]. words: lower case."""
    rewards = []
    for text in completions:
        found = re.findall(r"[a-z]+", text.lower())
        rewards.append(-sum(w not in words for w in found) / len(found) if found else 0.0)
    return rewards
