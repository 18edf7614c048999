"""Rewards: plain functions of completions and ground_truths, and `score`, which composes them and survives them.

A reward is `(completions: list[str], ground_truths: list[str], ...) -> list[float]`, one number a completion. It may name any
column that `score` is given (`questions`, `lengths`, ...) as a further argument. Each completion is rewarded by
itself: after an error, `score` calls the function with one completion at a time.
"""

import ast
import functools
import inspect
import logging
import math
import operator
import re
import signal
import threading
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from grpo.tasks.answers import equal, extract_answer, normalize, parse_number
from grpo.tasks.sandbox import Outcome, Sandbox

logger = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float | Exception | None]]


# ----------------------------------------------------------------------------------------------- correctness


def correctness(
    completions: Sequence[str],
    ground_truths: Sequence[str],
    *,
    extract: Callable[[str], str | None] = extract_answer,
    sandbox: Sandbox | None = None,
) -> list[float | Exception]:
    """1 where the extracted answer equals the ground_truth one, else 0.

    Numbers are compared exactly and other text after normalisation (`grpo.tasks.answers.equal`). With a `sandbox`, what
    that cannot decide goes to math-verify in its workers ("\\\\sqrt{12}" is "2\\\\sqrt{3}"); an expression that
    runs out of time or memory there earns 0. Without one it is 0: enough for data whose ground_truths are numbers."""
    answers = [extract(c) for c in completions]
    decided = [equal(a, g) for a, g in zip(answers, ground_truths)]
    rewards: list[float | Exception] = [float(d or False) for d in decided]
    if sandbox is None:
        return rewards
    # A group often agrees, so each pair is checked once.
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
    """1 where the answer is a number within `max(relative * |ground_truth|, absolute)` of the ground_truth one, else 0."""
    rewards = []
    for completion, ground_truth in zip(completions, ground_truths):
        answer, number = parse_number(extract(completion) or ""), parse_number(ground_truth)
        if number is None:
            raise ValueError(
                f"the ground_truth answer {ground_truth!r} is not a number; use `correctness` for such data"
            )
        # Compared as fractions: floats of 300 digits are infinite.
        tolerance = max(Fraction(relative) * abs(number.value), Fraction(absolute))
        rewards.append(float(answer is not None and abs(answer.value - number.value) <= tolerance))
    return rewards


def exact(
    completions: Sequence[str], ground_truths: Sequence[str], *, extract: Callable[[str], str | None] = extract_answer
) -> list[float]:
    """1 where the answer is the ground_truth text after `grpo.tasks.answers.normalize`, else 0."""
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
    """1 where the answer is an expression of + - * / and parentheses that uses each of the ground_truth's numbers exactly
    once and equals its target, else 0. ground_truths: "target: number number ...", of `grpo.tasks.data.countdown_examples`.
    One "= target" at the end is allowed, and × ÷ − are what they look like."""
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
    """The exact value of an arithmetic expression and the integers in it, read from Python's syntax tree without
    running anything. Raises ValueError for anything but + - * / over short non-negative integers."""
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
    """1 where a completion is exactly `<reasoning>...</reasoning> <answer>...</answer>`, else 0.

    Each tag stands exactly once, in order, with some letter or digit in each block and only white space around
    and between the blocks. The blocks may span lines."""
    return [float(_well_formed(c, tags)) for c in completions]


def _well_formed(text: str, tags: Sequence[str]) -> bool:
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(text.count(mark) != 1 for mark in marks):
        return False
    pieces, rest = [], text
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:  # it stands before an earlier one
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
    """The share of the tags' opening and closing marks that stand in their place, in [0, 1]: a slope to `format_tags`.

    A mark counts where it stands exactly once, behind the marks before it, and some letter or digit stands between
    the two of a tag. Each character behind the last tag costs `trailing`, down to 0."""
    rewards = []
    for text in completions:
        places = [text.find(m) if text.count(m) == 1 else -1 for tag in tags for m in (f"<{tag}>", f"</{tag}>")]
        marks, at, behind = 0, 0, 0
        for i, tag in enumerate(tags):
            start, end = places[2 * i], places[2 * i + 1]
            if start < at:
                continue
            at = max(at, end + len(tag) + 3 if end > start else at)  # the next tag inside this one would not count
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
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to `max_length - buffer` tokens, from there
    linearly down to -1 at `max_length`, and -1 beyond. lengths: tokens of each completion (a column of `score`)."""
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong: buffer {buffer} must lie in 1..max_length ({max_length})")
    return [-min(max((n - (max_length - buffer)) / buffer, 0.0), 1.0) for n in lengths]


def brevity(
    completions: Sequence[str],
    ground_truths: Sequence[str],
    lengths: Sequence[int],
    *,
    max_length: int,
    correct: Reward = correctness,
) -> list[float]:
    """`1 - length / max_length` for a correct completion, at least 0; 0 for a wrong one, so that saying nothing
    earns nothing. lengths: tokens of each completion. correct: any reward, positive where the answer is right."""
    right = [isinstance(r, (int, float)) and r > 0 for r in correct(completions, ground_truths)]
    return [max(0.0, 1 - n / max_length) if ok else 0.0 for ok, n in zip(right, lengths)]


def language_consistency(
    completions: Sequence[str], ground_truths: Sequence[str], *, scripts: Collection[str] = ("LATIN",)
) -> list[float]:
    """The share of a completion's letters and digits that are ASCII digits or of these scripts, in [0, 1].

    scripts: first words of Unicode names, such as LATIN, CYRILLIC, GREEK, CJK, HIRAGANA. It cannot tell languages
    of one script apart. A completion without letters or digits gets 0."""
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
    """Minus the share of words (runs of ASCII letters) that are not among `words`, which are in lower case."""
    rewards = []
    for text in completions:
        found = re.findall(r"[a-z]+", text.lower())
        rewards.append(-sum(w not in words for w in found) / len(found) if found else 0.0)
    return rewards


# --------------------------------------------------------------------------------------------------- scoring


class Failure(NamedTuple):
    """A sample whose reward could not be had."""

    function: str
    sample: int
    """index of the completion in the batch"""
    error: str
    traceback: str
    completion: str
    ground_truth: str


class Scores(NamedTuple):
    total: list[float | None]
    """weighted sum a completion; None where a function failed on it, or none had anything to say"""
    by_function: dict[str, list[float | None]]
    """the functions' own values, without weights"""
    weights: dict[str, float]
    """theirs in the total"""
    failures: list[Failure]


class RewardTimeout(BaseException):
    """Raised inside a reward that runs too long. Not an Exception, so that an `except Exception` lets it through."""


def score(
    rewards: Mapping[str, Reward | tuple[Reward, float]],
    completions: Sequence[str],
    ground_truths: Sequence[str],
    *,
    timeout_s: float | None = 1.0,
    max_failed_share: float = 0.5,
    **columns: Sequence[Any],
) -> Scores:
    """Call every reward and add them up by weight.

    rewards: name -> function, or (function, weight); a weight is 1 unless told. columns: further lists, one entry
    a completion (`questions=`, `lengths=`, ...); a function gets those it names, or all if it takes `**kwargs`.

    A function is called once with the whole batch. When that raises, or takes more than `timeout_s` seconds, it is
    called once a sample, each within `timeout_s`: the samples that fail get None and a `Failure`, the others
    their reward. A function may return None for a sample it has nothing to say on (the other functions' sum then
    stands), and an exception in place of a number for one it failed on. NaN and infinity are failures.

    The limit is an interval timer's signal, so `score` with a limit needs the main thread. It ends Python code,
    regular expressions and sleeps; it cannot end one long call in C, such as 10**10**10: give a function that may
    get there to `isolated`. timeout_s None: no limit.

    Raises ValueError where a function returns another number of rewards than it got completions, or lists differ in
    length; RuntimeError with the first traceback once more than `max_failed_share` of the samples have failed."""
    columns = {"completions": completions, "ground_truths": ground_truths, **columns}
    for name, column in columns.items():
        if len(column) != len(completions):
            raise ValueError(f"{len(completions)} completions but {len(column)} {name}: one of each is needed")
    if timeout_s is not None and threading.current_thread() is not threading.main_thread():
        raise ValueError("score: a time limit needs the main thread; call it there, or with timeout_s=None")

    failures: list[Failure] = []
    by_function: dict[str, list[float | None]] = {}
    weights: dict[str, float] = {}
    total: list[float | None] = [None] * len(completions)
    for name, entry in rewards.items():
        function, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
        values = _values(name, function, columns, timeout_s, failures, max_failed_share)
        by_function[name], weights[name] = values, weight
        for i, value in enumerate(values):
            if value is not None:
                total[i] = (total[i] or 0.0) + weight * value
    for failure in failures:
        total[failure.sample] = None
    if failures:
        logger.warning(
            "rewards failed on %d of %d samples, which count for nothing; the first: %r on sample %d: %s",
            len({f.sample for f in failures}),
            len(completions),
            failures[0].function,
            failures[0].sample,
            failures[0].error,
        )
    return Scores(total, by_function, weights, failures)


def _values(
    name: str,
    function: Reward,
    columns: Mapping[str, Sequence[Any]],
    timeout_s: float | None,
    failures: list[Failure],
    max_failed_share: float,
) -> list[float | None]:
    """One function's rewards. Appends to `failures`, and raises RuntimeError when they are too many."""
    taken = _further_columns(function, columns)
    n = len(columns["completions"])

    def fail(index: int, error: BaseException) -> None:
        completion, ground_truth = columns["completions"][index], columns["ground_truths"][index]
        trace = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}".strip()
        if len(message) > 500:  # both ends tell: where it began, and the last line of a worker's traceback
            message = f"{message[:150]} [...] {message[-340:]}"
        failures.append(Failure(name, index, message, trace[-5000:], completion, ground_truth))
        failed = len({f.sample for f in failures})
        if failed > max_failed_share * n:
            raise RuntimeError(
                f"rewards failed on {failed} of {n} samples, more than the share allowed ({max_failed_share:g}); "
                f"the first was {failures[0].function!r} on sample {failures[0].sample}:\n{failures[0].traceback}"
            )

    def call(rows: slice) -> list[Any]:
        further = {key: columns[key][rows] for key in taken}
        returned = call_within(
            timeout_s, function, columns["completions"][rows], columns["ground_truths"][rows], **further
        )
        count = len(range(n)[rows])
        try:
            returned = list(returned)
        except TypeError:
            raise _Misuse(f"reward {name!r} returned a {type(returned).__name__}, not a list of numbers") from None
        if len(returned) != count:
            raise _Misuse(f"reward {name!r} returned {len(returned)} rewards for {count} completions")
        return returned

    try:
        raw = call(slice(0, n))
    except _Misuse as error:
        raise ValueError(str(error)) from None
    except (Exception, SystemExit, RewardTimeout):
        raw = []
        for i in range(n):
            try:
                raw += call(slice(i, i + 1))
            except _Misuse as error:
                raise ValueError(str(error)) from None
            except (Exception, SystemExit, RewardTimeout) as error:
                fail(i, error)
                raw.append(None)

    values: list[float | None] = []
    for i, value in enumerate(raw):
        try:
            if isinstance(value, Exception):
                raise value
            number = None if value is None else float(value)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"returned {number}")
        except Exception as error:
            fail(i, error)
            number = None
        values.append(number)
    return values


class _Misuse(Exception):
    """A mistake in the function itself, whatever the sample."""


def _further_columns(function: Reward, columns: Mapping[str, Any]) -> list[str]:
    """Which columns beside completions and ground_truths (its first two arguments) a function takes, by their names."""
    names = [name for name in columns if name not in ("completions", "ground_truths")]
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return names
    for p in parameters[2:]:
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in names:
            raise ValueError(f"reward {function!r} needs the column {p.name!r}; call score with {p.name}=...")
    return [name for name in names if any(p.name == name for p in parameters[2:])]


def call_within(seconds: float | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), or RewardTimeout after `seconds`. Main thread only; None: no limit.

    A running timer and its handler are put back afterwards."""
    if seconds is None:
        return function(*args, **kwargs)
    running = True

    def expire(signum: int, frame: Any) -> None:
        if running:
            raise RewardTimeout(f"took more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, expire)
    started = time.monotonic()
    # It fires again every 50 ms: one shot alone could be caught by a bare except.
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.05)
    try:
        try:
            return function(*args, **kwargs)
        finally:
            running = False
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-3), interval)


def isolated(function: Callable[..., Any] | str, sandbox: Sandbox, *, columns: Sequence[str] = ()) -> Reward:
    """The same reward, called one completion at a time in the workers of `sandbox`, which end anything.

    function: one of a file's top level, or "module:name", or "path/to/file.py:name". The workers import its file (of
    a recipe, without running its main part), so a file with heavy imports starts slowly: a small file of its own
    is best. columns: those to pass, by position, after completions and ground_truths; everything passed must be JSON."""
    if isinstance(function, str):
        target = function
    elif inspect.isfunction(function) and "<" not in function.__qualname__:
        target = f"{function.__code__.co_filename}:{function.__name__}"
    else:
        raise ValueError(f"isolated: {function!r} is not a function at the top level of a file; workers cannot find it")

    def reward(completions: Sequence[str], ground_truths: Sequence[str], **given: Sequence[Any]) -> list[Any]:
        if missing := [name for name in columns if name not in given]:
            raise _Misuse(f"reward {target!r} needs the column {missing[0]!r}; call score with {missing[0]}=...")
        passed = [completions, ground_truths, *(given[name] for name in columns)]
        calls = [[[column[i]] for column in passed] for i in range(len(completions))]
        return [_one_reward(target, outcome) for outcome in sandbox.map(target, calls)]

    return reward


def _one_reward(target: str, outcome: Outcome) -> Any:
    if outcome.error:
        return RuntimeError(f"{target}: {outcome.error}")
    if not isinstance(outcome.value, list) or len(outcome.value) != 1:
        raise _Misuse(f"reward {target!r} returned {outcome.value!r} for one completion, not a list of one number")
    return outcome.value[0]
