"""Scoring: call the reward functions of a recipe, add them up by weight, and survive those that fail.

A reward is `(completions: list[str], ground_truths: list[str], ...) -> list[float]`, one number per completion. Its
further arguments are columns by name (`questions`, `lengths`, ...), which `score` passes on. It rewards each completion
by itself: after an error, `score` calls it again with one completion at a time. docs/rewards.md has examples.
"""

import inspect
import logging
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grpo.advantages import Scores
from grpo.errors import UserError
from grpo.tasks.sandbox import Outcome, Sandbox

logger = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float | Exception | None]]


class Failure(NamedTuple):
    """A sample that a reward function failed on."""

    function: str
    """name of the reward function"""
    sample: int
    """index of the completion in the batch"""
    error: str
    """type and message of the exception"""
    traceback: str
    """end of the traceback, at most 5,000 characters"""
    completion: str
    """the text that was to be rewarded"""
    ground_truth: str
    """the ground truth it was compared with"""


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
    """Call every reward function and add up the values by weight.

    rewards: name -> function, or (function, weight); the weight is 1 by default. columns: further lists with one entry
    per completion (`questions=`, `lengths=`, ...); a function gets those it names, or all of them if it takes
    `**kwargs`.

    Each function is called once, with the whole batch. If that call raises or takes longer than `timeout_s` seconds,
    the function is called once per sample, each call within `timeout_s`: the samples that fail get None and a
    `Failure`, the others keep their reward. A function may return None for a sample it has nothing to say on (the sum
    of the other functions then stands), and an exception in place of a number for a sample it failed on. NaN and
    infinity count as failures.

    The limit is the signal of an interval timer, so with a limit `score` must run in the main thread. The signal ends
    Python code, regular expressions and sleeps, but not a single long call in C such as 10**10**10: wrap a function
    that may get there in `isolated`. timeout_s None means no limit.

    Raises UserError if a function returns more or fewer values than there are completions, or if the lists differ in
    length; RuntimeError, with the first traceback, once more than `max_failed_share` of the samples have failed."""
    columns = {"completions": completions, "ground_truths": ground_truths, **columns}
    for name, column in columns.items():
        if len(column) != len(completions):
            raise UserError(f"score: {len(completions)} completions but {len(column)} {name}: give one per completion")
    if timeout_s is not None and threading.current_thread() is not threading.main_thread():
        raise UserError("score: a time limit needs the main thread; call it there, or with timeout_s=None")

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
            "rewards failed on %d of %d samples, which therefore have no reward; the first: %r on sample %d: %s",
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
    """[samples] The values of one reward function, None where it failed or had nothing to say.

    Appends to `failures`, and raises RuntimeError once they are too many."""
    passed = _further_columns(function, columns)
    n = len(columns["completions"])

    def fail(index: int, error: BaseException) -> None:
        completion, ground_truth = columns["completions"][index], columns["ground_truths"][index]
        trace = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}".strip()
        if len(message) > 500:  # keep both ends: where the error began, and the last line of a worker's traceback
            message = f"{message[:150]} [...] {message[-340:]}"
        failures.append(Failure(name, index, message, trace[-5000:], completion, ground_truth))
        failed = len({f.sample for f in failures})
        if failed > max_failed_share * n:
            raise RuntimeError(
                f"rewards failed on {failed} of {n} samples, more than the share allowed ({max_failed_share:g}); "
                f"the first was {failures[0].function!r} on sample {failures[0].sample}:\n{failures[0].traceback}"
            )

    def call(rows: slice) -> list[Any]:
        further = {key: columns[key][rows] for key in passed}
        returned = call_within(
            timeout_s, function, columns["completions"][rows], columns["ground_truths"][rows], **further
        )
        count = len(range(n)[rows])
        try:
            returned = list(returned)
        except TypeError:
            raise _Misuse(f"reward {name!r} returned a {type(returned).__name__}, not a list of numbers") from None
        if len(returned) != count:
            raise _Misuse(f"reward {name!r} returned {len(returned)} values for {count} completions; return one each")
        return returned

    try:
        raw = call(slice(0, n))
    except _Misuse as error:
        raise UserError(str(error)) from None
    except (Exception, SystemExit, RewardTimeout):
        raw = []
        for i in range(n):
            try:
                raw += call(slice(i, i + 1))
            except _Misuse as error:
                raise UserError(str(error)) from None
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
    """A mistake in the reward function itself, which does not depend on the sample: scoring stops at once."""


def _further_columns(function: Reward, columns: Mapping[str, Any]) -> list[str]:
    """The columns that a function takes by name, beside its first two arguments (completions and ground truths)."""
    names = [name for name in columns if name not in ("completions", "ground_truths")]
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return names
    for p in parameters[2:]:
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in names:
            raise UserError(f"reward {function!r} needs the column {p.name!r}; call score with {p.name}=...")
    return [name for name in names if any(p.name == name for p in parameters[2:])]


# ---------------------------------------------------------------------------------------------------- time limits


def call_within(seconds: float | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), interrupted by RewardTimeout after `seconds`; None means no limit.

    Must be called in the main thread. A timer that was running, and its handler, are restored afterwards."""
    if seconds is None:
        return function(*args, **kwargs)
    running = True

    def expire(signum: int, frame: Any) -> None:
        if running:
            raise RewardTimeout(f"took more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, expire)
    started = time.monotonic()
    # The timer fires again every 50 ms, because a bare `except` in the function could swallow a single shot.
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.05)
    try:
        try:
            return function(*args, **kwargs)
        finally:
            running = False
    finally:
        running = False  # again: the inner `finally` may itself have been interrupted
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-3), interval)


def isolated(function: Callable[..., Any] | str, sandbox: Sandbox, *, columns: Sequence[str] = ()) -> Reward:
    """The same reward, called with one completion at a time in the workers of `sandbox`, which can end any call.

    function: a function at the top level of a file, or "module:name", or "path/to/file.py:name". The workers import
    its file (a recipe's without running its main part), so a function in a small file of its own starts fastest.
    columns: names of the columns to pass by position, after completions and ground truths. Whatever is passed must be
    JSON. Raises UserError for a function that workers could not find."""
    if isinstance(function, str):
        target = function
    elif inspect.isfunction(function) and "<" not in function.__qualname__:
        target = f"{function.__code__.co_filename}:{function.__name__}"
    else:
        raise UserError(f"isolated: {function!r} is not a function at the top level of a file; workers cannot find it")

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
