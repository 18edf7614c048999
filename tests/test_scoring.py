"""`score` on rewards that misbehave, its time limit, and rewards that run in workers."""

import contextlib
import functools
import math
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from grpo.advantages import group_advantages
from grpo.errors import UserError
from grpo.policy.chat import encode_chat
from grpo.sampler import Completion, Question, Samples
from grpo.tasks import rewards, scoring
from grpo.tasks.rewards import numeric, overlong
from grpo.tasks.sandbox import Sandbox
from grpo.tasks.scoring import RewardTimeout, call_within, isolated, score


def length(completions, ground_truths):
    return [float(len(c)) for c in completions]


def test_weights_and_columns():
    def shorter_than_question(outputs, answers, questions):  # any names will do for the first two
        return [float(len(o) < len(q)) for o, q in zip(outputs, questions)]

    def everything(completions, ground_truths, **columns):
        assert sorted(columns) == ["lengths", "questions"]
        return columns["lengths"]

    functions = {"a": length, "b": (shorter_than_question, 10.0), "c": (everything, -1.0)}
    scores = score(functions, ["x", "yyy"], ["", ""], questions=["qq", "qq"], lengths=[5, 7])
    assert scores.total == [1 + 10 - 5, 3 + 0 - 7]
    assert scores.by_function == {"a": [1, 3], "b": [1, 0], "c": [5, 7]}
    assert scores.weights == {"a": 1.0, "b": 10.0, "c": -1.0}
    assert scores.failures == []
    assert score({"r": length}, [], []) == ([], {"r": []}, {"r": 1.0}, [])


def test_one_call_per_batch_if_nothing_fails():
    calls = []

    def counted(completions, ground_truths):
        calls.append(len(completions))
        return [0.0] * len(completions)

    score({"r": counted}, ["x"] * 100, [""] * 100)
    assert calls == [100]


def test_none_means_nothing_to_say():
    scores = score({"a": lambda c, g: [None, 1.0, None], "b": lambda c, g: [2.0, 2.0, None]}, ["x"] * 3, [""] * 3)
    assert scores.total == [2, 3, None]
    assert scores.failures == []


def test_numpy_and_torch_values_are_numbers():
    scores = score({"n": lambda c, g: np.ones(2), "t": lambda c, g: torch.ones(2)}, ["x", "y"], ["", ""])
    assert scores.total == [2.0, 2.0]
    assert type(scores.total[0]) is float


def test_the_examples_of_docs_rewards():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "rewards.md").read_text(), re.MULTILINE | re.DOTALL)
    texts = ["a " * 75, "Why? <answer>5</answer>"]
    completions = [Completion([1, 2], [0.0, 0.0], False)] * 2
    samples = Samples([Question("Why?", "5", [1])], 2, completions, texts, 10)
    with Sandbox(1) as pool:
        names = {**vars(rewards), **vars(scoring), "samples": samples, "Sandbox": Sandbox, "sandbox": pool}
        names |= {"tokenizer": None, "encode_chat": encode_chat, "functools": functools}
        for block in blocks:
            exec(block, names)
    assert len(blocks) == 7
    assert names["few_words"](texts, ["5", "5"]) == [0.5, 1.0]
    assert names["scores"].total == [0.0, -1.0]  # of no_echo


# ---------------------------------------------------------------------------------------------------- failures


def misbehave(completions, ground_truths):
    """Each completion says what happens: an exception, a call that never ends, or a value that is no reward."""
    values = []
    for c in completions:
        match c:
            case "raise":
                raise KeyError("boom")
            case "exit":
                raise SystemExit(1)
            case "hang":
                while True:
                    pass
            case "sleep":
                time.sleep(100)
            case "stubborn":  # swallows the first limit, not the next
                try:
                    time.sleep(100)
                except BaseException:
                    time.sleep(100)
            case "except":
                while True:
                    with contextlib.suppress(Exception):
                        time.sleep(100)
            case "regex":
                re.fullmatch("(a|a)*b", "a" * 64)
        wrong = {"nan": math.nan, "inf": math.inf, "text": "one", "error": ValueError("mine")}
        values.append(wrong.get(c, float(len(c))))
    return values


ENDLESS = ["hang", "sleep", "stubborn", "except", "regex"]  # the first makes the call of the whole batch time out


@pytest.mark.parametrize("bad", [[*ENDLESS, "raise", "exit"], ["raise"], ["nan", "inf", "text", "error"]])
def test_failing_samples_are_lost_alone_and_recorded(bad):
    completions = ["x", "yy", *bad, "zzz"]
    ground_truths = [c.upper() for c in completions]
    scores = score({"fine": length, "r": misbehave}, completions, ground_truths, timeout_s=0.3, max_failed_share=1)
    lost = [None] * len(bad)
    assert scores.by_function["r"] == [1, 2, *lost, 3]
    assert scores.by_function["fine"] == length(completions, ground_truths)
    assert scores.total == [2, 4, *lost, 6]
    for i, (failure, how) in enumerate(zip(scores.failures, bad, strict=True), start=2):
        assert (failure.function, failure.sample, failure.completion) == ("r", i, how)
        assert failure.ground_truth == how.upper()
        if how in ENDLESS:
            assert failure.error == "RewardTimeout: took more than 0.3 s"
        assert "Traceback" in failure.traceback


def test_failing_samples_leave_their_group_unharmed():
    scores = score({"r": misbehave}, ["x", "yyy", "raise", "z", "zz", "zzz"], [""] * 6)
    advantages = group_advantages(scores.total, 3)
    assert advantages[2] == 0
    assert advantages.isfinite().all()
    assert advantages[0] != 0


def test_too_many_failures_stop_with_the_first_traceback():
    completions = ["x", "raise", "raise", "y"]
    score({"r": misbehave}, completions, [""] * 4, max_failed_share=0.5)
    with pytest.raises(RuntimeError, match=r"2 of 4 samples.*share allowed \(0.49\).*'r' on sample 1") as error:
        score({"r": misbehave}, completions, [""] * 4, max_failed_share=0.49)
    assert "KeyError: 'boom'" in str(error.value)
    # A sample that two functions fail on is one sample.
    both = {"r": misbehave, "s": misbehave}
    assert len(score(both, completions, [""] * 4, max_failed_share=0.5).failures) == 4


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "reward 'r' returned 1 values for 3 completions; return one each"),
        ([1.0] * 4, "reward 'r' returned 4 values for 3 completions"),
        (1.0, "reward 'r' returned a float, not a list"),
        (None, "reward 'r' returned a NoneType, not a list"),
    ],
)
def test_a_wrong_count_is_an_error_that_names_the_function_and_the_counts(returned, message):
    with pytest.raises(UserError, match=message):
        score({"r": lambda c, g: returned}, ["x"] * 3, [""] * 3)


def test_wrong_arguments():
    with pytest.raises(UserError, match="3 completions but 2 ground_truths"):
        score({"r": length}, ["x"] * 3, [""] * 2)
    with pytest.raises(UserError, match="3 completions but 1 questions"):
        score({"r": length}, ["x"] * 3, [""] * 3, questions=["q"])
    with pytest.raises(UserError, match="needs the column 'lengths'; call score with lengths="):
        score({"r": functools.partial(overlong, max_length=10, buffer=5)}, ["x"], [""])


# ------------------------------------------------------------------------------------------------- time limits


def test_the_limit_leaves_other_timers_as_they_were():
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    signal.setitimer(signal.ITIMER_REAL, 50, 7)
    try:
        with pytest.raises(RewardTimeout):
            call_within(0.05, time.sleep, 10)
        delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 40 < delay < 50
        assert interval == 7
        signal.raise_signal(signal.SIGALRM)
        assert fired == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_limit_needs_the_main_thread():
    said = []

    def run():
        try:
            score({"r": length}, ["x"], [""])
        except UserError as error:
            said.append(str(error))
        said.append(score({"r": length}, ["x"], [""], timeout_s=None).total)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert said == ["score: a time limit needs the main thread; call it there, or with timeout_s=None", [1.0]]


# ---------------------------------------------------------------------------------------------------- isolated

RECIPE = '''
"""A recipe: its main part must not run in the workers."""

def reward(completions, ground_truths, questions):
    if completions == ["hang"]:
        10**10**10
    if completions == ["raise"]:
        raise KeyError("mine")
    return [len(completions[0]) + len(questions[0])]

def two(completions, ground_truths):
    return [1.0, 2.0]

if __name__ == "__main__":
    raise SystemExit("the main part ran")
'''


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(1, timeout_s=2) as pool:  # patient: on a busy machine a plain call must come to its end
        yield pool


def test_isolated_reward_of_a_recipe(tmp_path, sandbox):
    path = tmp_path / ("long" * 40) / "recipe.py"  # the error must survive a long path in front of it
    path.parent.mkdir()
    path.write_text(RECIPE)
    reward = isolated(f"{path}:reward", sandbox, columns=["questions"])
    scores = score({"r": reward}, ["x", "hang", "raise", "zz"], [""] * 4, questions=["", "", "", "q"])
    assert scores.total == [1, None, None, 3]
    assert [f.sample for f in scores.failures] == [1, 2]
    assert "took more than 2 s" in scores.failures[0].error
    assert "KeyError: 'mine'" in scores.failures[1].error
    with pytest.raises(UserError, match=r"returned \[1.0, 2.0\] for one completion"):
        score({"r": isolated(f"{path}:two", sandbox)}, ["x"], [""])
    with pytest.raises(UserError, match="needs the column 'questions'"):
        score({"r": reward}, ["x"], [""])


def test_isolated_takes_functions_at_the_top_level_only(sandbox):
    assert isolated(numeric, sandbox)([r"\boxed{5}", r"\boxed{6}"], ["5", "5"]) == [1.0, 0.0]
    for function in (lambda c, g: [0.0], functools.partial(numeric)):
        with pytest.raises(UserError, match="not a function at the top level"):
            isolated(function, sandbox)
