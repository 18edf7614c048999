"""Rewards on completions that try to fool them, and `score` on rewards that misbehave."""

import contextlib
import functools
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import FUZZ_EXAMPLES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grpo.distributed import World, all_means
from grpo.tasks.data import countdown_examples, load_examples
from grpo.tasks.rewards import (
    RewardTimeout,
    brevity,
    call_within,
    correctness,
    countdown,
    exact,
    format_tags,
    graded_tags,
    isolated,
    language_consistency,
    numeric,
    overlong,
    score,
    spelling,
)
from grpo.tasks.sandbox import Sandbox

GSM8K = Path(os.environ.get("GRPO_GSM8K_DIR", Path(__file__).parents[1] / "../shared/data/gsm8k"))


def wrapped(reasoning: str, answer: str) -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, timeout_s=3) as pool:  # patient: on a busy machine a plain check must come to its end
        yield pool


# ------------------------------------------------------------------------------------------------------ hacks

QUESTION = "Janet's ducks lay 16 eggs; she eats 3 and bakes with 4. At $2 each, is what she makes 18 dollars?"
HACKS = {
    # what the completion tries: (completion, correctness, format_tags, graded_tags), for the ground_truth 18
    "an honest answer": (wrapped("9 * 2 = 18", "18"), 1, 1, 1),
    "an honest answer in prose": ("The answer is 18.", 0, 0, 0),
    "a wrong answer": (wrapped("9 * 2 = 19", "19"), 0, 1, 1),
    "empty text": ("", 0, 0, 0),
    "empty tags": ("<reasoning></reasoning>\n<answer></answer>", 0, 0, 0),
    "tags around nothing but marks": (wrapped("...", "***"), 0, 0, 0),
    "an empty reasoning": (wrapped("", "18"), 1, 0, 0.5),
    "an empty answer": (wrapped("18", " "), 0, 0, 0.5),
    "opening tags only": ("<reasoning>a<answer>18", 0, 0, 0.5),
    "closing tags only": ("a</reasoning>18</answer>", 0, 0, 0),
    "a cut-off answer": ("<reasoning>a</reasoning><answer>18", 0, 0, 0.75),
    "every number listed": (wrapped("a", " ".join(map(str, range(1, 31)))), 0, 1, 1),
    "every number, commas": (wrapped("a", "17, 18, 19"), 0, 1, 1),
    "every number, one long number": (wrapped("a", "171819"), 0, 1, 1),
    "two answers in one": (wrapped("a", "17 or 18"), 0, 1, 1),
    "two answers in one box": (wrapped("a", r"\boxed{17 \text{ or } 18}"), 0, 1, 1),
    "a range": (wrapped("a", "17-19"), 0, 1, 1),
    "plus or minus": (wrapped("a", "+-18"), 0, 1, 1),
    "both signs": (wrapped("a", r"\pm 18"), 0, 1, 1),
    "the question quoted": (QUESTION, 0, 0, 0),
    "the question quoted as the answer": (wrapped("a", QUESTION), 0, 1, 1),
    "the ground_truth in the reasoning only": (wrapped("It is 18.", "17"), 0, 1, 1),
    "tags inside the reasoning": ("<reasoning>a <answer>18</answer> b</reasoning>", 0, 0, 0.25),
    "tags inside the reasoning, then others": (wrapped("<answer>18</answer>", "17"), 0, 0, 0.5),
    "a thought answer": (r"<think>\boxed{18}</think> so it is 17", 0, 0, 0),
    "an unfinished thought": ("<think> <answer>18</answer> </think>", 0, 0, 0.492),
    "several answer blocks, the last wrong": (wrapped("a", "18") + "<answer>17</answer>", 0, 0, 0.5),
    "several answer blocks, the last right": (wrapped("a", "17") + "<answer>18</answer>", 1, 0, 0.5),
    "several boxes, the last wrong": (r"\boxed{18} \boxed{17}", 0, 0, 0),
    "several formats at once": (wrapped("a", "18") * 3, 1, 0, 0),
    "nested answer blocks": ("<reasoning>a</reasoning><answer><answer>18</answer></answer>", 0, 0, 0.5),
    "tags in the wrong order": ("<answer>18</answer><reasoning>a</reasoning>", 0, 0, 0.5),
    "tags in other letters": ("<REASONING>a</REASONING><ANSWER>18</ANSWER>", 0, 0, 0),
    "talk before": ("Sure! " + wrapped("a", "18"), 1, 0, 1),
    "talk behind": (wrapped("a", "18") + " That was fun." + "!" * 87, 1, 0, 0.9),
    "talk behind without end": (wrapped("a", "18") + "x" * 5000, 1, 0, 0),
    "talk between": ("<reasoning>a</reasoning> so <answer>18</answer>", 1, 0, 1),
    "Arabic-Indic digits": (wrapped("a", "\u0661\u0668"), 0, 1, 1),
    "full-width digits": (wrapped("a", "\uff11\uff18"), 0, 1, 1),
    "mathematical digits": (wrapped("a", "\U0001d7cf\U0001d7d6"), 0, 1, 1),
    "superscript digits": (wrapped("a", "\u00b9\u2078"), 0, 1, 1),
    "a power behind": (wrapped("a", "18\u00b2"), 0, 1, 1),
    "a mixed-script number": (wrapped("a", "1\u0668"), 0, 1, 1),
    "invisible characters": (wrapped("a", "1\u200b8"), 1, 1, 1),
    "an equation of anything to the ground_truth": (wrapped("a", "1=18"), 0, 1, 1),
    "an expression left to the reader": (wrapped("a", "(16-3-4)*2"), 0, 1, 1),
    "code": (wrapped("a", "__import__('os').system('echo 18')"), 0, 1, 1),
    "a tower of powers": (wrapped("a", "10^10^10"), 0, 1, 1),
    "infinity": (wrapped("a", "inf"), 0, 1, 1),
    "not a number": (wrapped("a", "nan"), 0, 1, 1),
    "true": (wrapped("a", "True"), 0, 1, 1),
    "a huge exponent": (wrapped("a", "1.8e99999999999"), 0, 1, 1),
    "100 kB of digits": (wrapped("a", "1" * 100_000), 0, 1, 1),
    "100 kB of braces": (wrapped("a", r"\boxed{" * 14_000), 0, 1, 1),
    "100 kB of tags": ("<answer>" * 12_500, 0, 0, 0),
}


@pytest.mark.parametrize("hack", HACKS)
def test_hack(hack):
    completion, correct, formatted, graded = HACKS[hack]
    assert correctness([completion], ["18"]) == [correct]
    assert numeric([completion], ["18"]) == [correct]
    assert format_tags([completion], ["18"]) == [formatted]
    assert graded_tags([completion], ["18"]) == [pytest.approx(graded)]


# With algebra "(16-3-4)*2" is 18, as math-verify has it; nothing else changes.
def test_hacks_fool_no_algebra_either(sandbox):
    rewards = correctness([h[0] for h in HACKS.values()], ["18"] * len(HACKS), sandbox=sandbox)
    wrong = [name for name, reward, hack in zip(HACKS, rewards, HACKS.values()) if reward != hack[1]]
    assert wrong == ["an expression left to the reader"]


COUNTDOWN = {
    "(44 + 19) - 35": 0,
    "(44 + 19) - 35 + 2": 1,
    "((44 + 19) - 35) + 2 = 30": 1,
    "((44 + 19) - 35) + 2 = 31": 0,
    "30": 0,
    "30 + 0 * (44 + 19 + 35 + 2)": 0,
    "44 + 19 - 35 + 2 - 2 + 2": 0,
    "44 + 19 - 35 + 2 and 30": 0,
    "44 + 19 - 35 + 02": 0,
    "44 + 19 - 35 ++2": 0,
    "44 + 19 - 35 + 2.0": 0,
    "44 + 19 - 35 // 2": 0,
    "44 ** 19 - 35 + 2": 0,
    "44 + 19 - 35 + \u0662": 0,
    "9" * 100_000: 0,
    "(" * 100: 0,
    "44 / (35 - 35) + 19 + 2": 0,
    "__import__('os')": 0,
    "": 0,
}


@pytest.mark.parametrize("expression", COUNTDOWN)
def test_countdown_hack(expression):
    assert countdown([f"<answer>{expression}</answer>"], ["30: 44 19 35 2"]) == [COUNTDOWN[expression]]


def test_countdown_is_exact():
    ground_truth = "24: 3 3 8 8"
    assert countdown([r"\boxed{8/(3-8/3)}"], [ground_truth]) == [1.0]  # 24 only in exact arithmetic
    assert countdown(["<answer>8 ÷ (3 − 8 ÷ 3)</answer>"], [ground_truth]) == [1.0]
    assert countdown(["<answer>(3 × 3) × 8 ÷ 8</answer>"], [ground_truth]) == [0.0]


def test_countdown_examples_are_scored_by_their_own_gold():
    example = countdown_examples(1, numbers=2)[0]
    target, numbers = example.ground_truth.split(": ")
    a, b = map(int, numbers.split())
    results = {f"{x}{o}{y}": countdown([f"<answer>{x}{o}{y}</answer>"], [example.ground_truth])[0]
               for x, y in ((a, b), (b, a)) for o in "+-*/"}  # fmt: skip
    assert 1.0 in results.values()
    assert countdown([f"<answer>{target}</answer>"], [example.ground_truth]) == [0.0]


# --------------------------------------------------------------------------------------------- shipped rewards


def test_gsm8k_golds_score_1_and_wrong_numbers_0():
    """Every ground_truth solution of the test set in the answer format; and by math-verify, each ground_truth equals itself."""
    if not (GSM8K / "test.jsonl").exists():
        pytest.skip(f"no {GSM8K / 'test.jsonl'}: point GRPO_GSM8K_DIR to a folder with GSM8K's test.jsonl")
    check_gsm8k(GSM8K / "test.jsonl", 1319)


def test_gsm8k_form_on_a_sample(tmp_path):
    check_gsm8k(Path(__file__).parent / "data" / "gsm8k_form.jsonl", 6)


def check_gsm8k(path, count):
    import json

    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    ground_truths = [e.ground_truth for e in load_examples(str(path))]
    assert len(ground_truths) == len(solutions) == count
    right = [wrapped(s.rsplit("####")[0], s.rsplit("####")[1]) for s in solutions]
    # Wrong in the way that is nearest: next to it, negative, a digit more, and hidden under the right reasoning.
    values = [int(g.replace(",", "")) for g in ground_truths]
    assert (
        correctness(right, ground_truths)
        == format_tags(right, ground_truths)
        == numeric(right, ground_truths)
        == [1.0] * count
    )
    for wrong in (
        [v + 1 for v in values],
        [v - 1 for v in values],
        [-v - 1 for v in values],
        [f"{v}1" for v in values],
    ):
        completions = [wrapped(s, str(w)) for s, w in zip(solutions, wrong)]
        assert correctness(completions, ground_truths) == [0.0] * count


def test_agreement_with_math_verify():
    """The cheap comparison decides as math-verify does, on the ground_truths of GSM8K's form and on spellings of numbers."""
    from grpo.tasks.answers import equal
    from grpo.tasks.symbolic import symbolic_equal

    ground_truths = [e.ground_truth for e in load_examples(str(Path(__file__).parent / "data" / "gsm8k_form.jsonl"))]
    numbers = [
        "0.5",
        r"\frac{1}{2}",
        "-3",
        "1,000",
        "1000",
        "50\\%",
        r"\frac{50}{100}",
        "2.50",
        "3/4",
        "0.75",
        *ground_truths,
    ]
    for answer in numbers:
        for ground_truth in numbers:
            assert equal(answer, ground_truth) == symbolic_equal(answer, ground_truth), (answer, ground_truth)


def test_symbolic_correctness(sandbox):
    completions = [r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}", r"\boxed{2\sqrt{2}}", "12", r"\boxed{10^{10^{10}}}"]
    assert correctness(completions, [r"\sqrt{12}"] * 5, sandbox=sandbox) == [1, 1, 0, 0, 0]
    assert correctness(completions, [r"\sqrt{12}"] * 5) == [0, 1, 0, 0, 0]


def test_symbolic_checks_left_out_for_lack_of_time_are_absent_not_wrong(caplog):
    slow, plain = r"\boxed{10^{10^{10}}}", r"\boxed{2\sqrt{3}}"
    with Sandbox(1, timeout_s=0.5, budget_s=0.4) as pool:
        scores = score({"correct": functools.partial(correctness, sandbox=pool)}, [slow, plain], [r"\sqrt{12}"] * 2)
        alone = correctness([slow, plain], [r"\sqrt{12}"] * 2, sandbox=pool)  # as a recipe's evaluation calls it
    assert scores.total == [0.0, None]
    assert "TimeoutError" in scores.failures[0].error
    assert "rewards failed on 1 of 2 samples, which count for nothing; the first: 'correct' on sample 1" in caplog.text
    assert all_means({"correct": alone}, World()) == {"correct": 0.0}


def test_numeric_tolerance():
    completions = [rf"\boxed{{{x}}}" for x in ("3.14", "3.1416", "3.15", "22/7", "pi", "-3.14")]
    assert numeric(completions, ["3.14159"] * 6, absolute=0.002) == [1, 1, 0, 1, 0, 0]
    assert numeric(completions, ["3.14159"] * 6, relative=0.001) == [1, 1, 0, 1, 0, 0]
    assert numeric(completions, ["3.14159"] * 6) == [0] * 6
    assert numeric([r"\boxed{1e99}"], ["1e98"], relative=0.1) == [0]
    with pytest.raises(ValueError, match="'seven' is not a number"):
        numeric(completions[:1], ["seven"])


def test_exact():
    assert exact(["<answer> $\\text{Paris}$. </answer>", "<answer>18.0</answer>", ""], ["paris", "18", ""]) == [1, 0, 0]


def test_format_tags_of_ones_own():
    assert format_tags(["<think>\na\n\nb</think>\n<answer>1</answer>\n"], [""], tags=("think", "answer")) == [1]
    assert format_tags(["<answer>1</answer>", "1"], ["", ""], tags=("answer",)) == [1, 0]


def test_overlong_is_the_papers_equation():
    lengths = [0, 80, 90, 95, 100, 101, 10**6]
    expected = [0, 0, -0.5, -0.75, -1, -1, -1]  # (L_max - L_cache - |y|) / L_cache in between
    assert overlong([""] * 7, [""] * 7, lengths, max_length=100, buffer=20) == pytest.approx(expected)
    with pytest.raises(ValueError, match="buffer 0"):
        overlong([], [], [], max_length=100, buffer=0)


def test_brevity_pays_right_answers_only():
    completions = [r"\boxed{5}", r"\boxed{5}", r"\boxed{6}", "", r"\boxed{5}"]
    assert brevity(completions, ["5"] * 5, [10, 50, 1, 0, 200], max_length=100) == [0.9, 0.5, 0, 0, 0]


def test_language_consistency():
    texts = [
        "all plain",
        "3 + 4 = 7!",
        "half \u043c\u0438\u0440\u044b",
        "\u7b54\u6848",
        "",
        "...",
        "1\u0668",
        "na\u00efve",
    ]
    assert language_consistency(texts, [""] * 8) == pytest.approx([1, 1, 0.5, 0, 0, 0, 0.5, 1])
    assert language_consistency(["\u7b54\u6848 ok"], [""], scripts=("CJK",)) == [0.5]


def test_spelling():
    texts = ["The cat SAT", "the qat", "zzz", "7", ""]
    assert spelling(texts, [""] * 5, words={"the", "cat", "sat"}) == [0, -0.5, -1, 0, 0]


# ------------------------------------------------------------------------------------------------------- score


def lengths_of(completions, ground_truths):
    return [float(len(c)) for c in completions]


def test_weights_and_columns():
    def shorter_than_question(outputs, answers, questions):  # any names for the first two
        return [float(len(o) < len(q)) for o, q in zip(outputs, questions)]

    def everything(completions, ground_truths, **columns):
        assert sorted(columns) == ["lengths", "questions"]
        return columns["lengths"]

    scores = score(
        {"a": lengths_of, "b": (shorter_than_question, 10.0), "c": (everything, -1.0)},
        ["x", "yyy"],
        ["", ""],
        questions=["qq", "qq"],
        lengths=[5, 7],
    )
    assert scores.total == [1 + 10 - 5, 3 + 0 - 7]
    assert scores.by_function == {"a": [1, 3], "b": [1, 0], "c": [5, 7]}
    assert scores.failures == []


def test_one_call_a_batch_when_nothing_fails():
    calls = []

    def counted(completions, ground_truths):
        calls.append(len(completions))
        return [0.0] * len(completions)

    score({"r": counted}, ["x"] * 100, [""] * 100)
    assert calls == [100]


def fails_on_bad(how):
    def reward(completions, ground_truths):
        values = []
        for c in completions:
            if c == "bad":
                if how == "raise":
                    raise KeyError("boom")
                if how == "exit":
                    raise SystemExit(1)
                if how == "hang":
                    while True:
                        pass
                if how == "sleep":
                    time.sleep(100)
                if how == "stubborn":  # swallows the first limit, not the next
                    try:
                        time.sleep(100)
                    except BaseException:
                        time.sleep(100)
                if how == "except":
                    while True:
                        with contextlib.suppress(Exception):
                            time.sleep(100)
                if how == "regex":
                    import re

                    re.fullmatch("(a|a)*b", "a" * 64)
                values.append({"nan": math.nan, "inf": math.inf, "text": "one", "error": ValueError("mine")}[how])
            else:
                values.append(float(len(c)))
        return values

    return reward


HOW = ["raise", "exit", "hang", "sleep", "stubborn", "except", "regex", "nan", "inf", "text", "error"]


@pytest.mark.parametrize("how", HOW)
def test_a_failing_sample_is_lost_alone_and_recorded(how):
    completions = ["x", "yy", "bad", "zzz"]
    scores = score({"fine": lengths_of, "r": fails_on_bad(how)}, completions, list("abcd"), timeout_s=0.3)
    assert scores.by_function["r"] == [1, 2, None, 3]
    assert scores.by_function["fine"] == [1, 2, 3, 3]
    assert scores.total == [2, 4, None, 6]
    (failure,) = scores.failures
    assert (failure.function, failure.sample, failure.completion, failure.ground_truth) == ("r", 2, "bad", "c")
    if how in ("hang", "sleep", "stubborn", "except", "regex"):
        assert failure.error == "RewardTimeout: took more than 0.3 s"
    assert "Traceback" in failure.traceback or how == "error"


def test_failing_samples_leave_their_group_unharmed():
    advantages = pytest.importorskip("grpo.advantages").group_advantages
    scores = score({"r": fails_on_bad("raise")}, ["x", "yyy", "bad", "z", "zz", "zzz"], [""] * 6)
    assert advantages(scores.total, 3)[2] == 0
    assert advantages(scores.total, 3).isfinite().all()


def test_none_is_nothing_to_say():
    scores = score({"a": lambda c, g: [None, 1.0, None], "b": lambda c, g: [2.0, 2.0, None]}, ["x"] * 3, [""] * 3)
    assert scores.total == [2, 3, None]
    assert scores.failures == []


def test_too_many_failures_stop_with_the_first_traceback():
    completions = ["x", "bad", "bad", "y"]
    score({"r": fails_on_bad("raise")}, completions, [""] * 4, max_failed_share=0.5)
    with pytest.raises(RuntimeError, match=r"2 of 4 samples.*share allowed \(0.49\).*'r' on sample 1") as error:
        score({"r": fails_on_bad("raise")}, completions, [""] * 4, max_failed_share=0.49)
    assert "fails_on_bad" in str(error.value) or "KeyError: 'boom'" in str(error.value)
    # A sample that two functions fail on is one sample.
    both = {"r": fails_on_bad("raise"), "s": fails_on_bad("nan")}
    assert len(score(both, completions, [""] * 4, max_failed_share=0.5).failures) == 4


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "reward 'r' returned 1 rewards for 3 completions"),
        ([1.0] * 4, "reward 'r' returned 4 rewards for 3 completions"),
        (1.0, "reward 'r' returned a float, not a list"),
        (None, "reward 'r' returned a NoneType, not a list"),
    ],
)
def test_wrong_count_is_an_error_that_names_function_and_counts(returned, message):
    with pytest.raises(ValueError, match=message):
        score({"r": lambda c, g: returned}, ["x"] * 3, [""] * 3)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="3 completions but 2 ground_truths"):
        score({"r": lengths_of}, ["x"] * 3, [""] * 2)
    with pytest.raises(ValueError, match="3 completions but 1 questions"):
        score({"r": lengths_of}, ["x"] * 3, [""] * 3, questions=["q"])
    with pytest.raises(ValueError, match="needs the column 'lengths'; call score with lengths="):
        score({"r": functools.partial(overlong, max_length=10, buffer=5)}, ["x"], [""])


def test_numpy_and_torch_values_are_numbers():
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    scores = score({"n": lambda c, g: np.ones(2), "t": lambda c, g: torch.ones(2)}, ["x", "y"], ["", ""])
    assert scores.total == [2.0, 2.0]
    assert type(scores.total[0]) is float


def test_empty_batch():
    assert score({"r": lengths_of}, [], []) == ([], {"r": []}, {"r": 1.0}, [])


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
    errors = []

    def run():
        try:
            score({"r": lengths_of}, ["x"], [""])
        except ValueError as error:
            errors.append(str(error))
        errors.append(score({"r": lengths_of}, ["x"], [""], timeout_s=None).total)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == ["score: a time limit needs the main thread; call it there, or with timeout_s=None", [1.0]]


def test_time_in_workers_does_not_count(sandbox):
    """A batch of symbolic checks may take longer than a sample's limit: the workers have limits of their own."""
    slow = r"\boxed{10^{10^{10}}}"
    scores = score({"c": functools.partial(correctness, sandbox=sandbox)}, [slow], [r"\sqrt{2}"], timeout_s=0.3)
    assert scores.total == [0.0]


# ---------------------------------------------------------------------------------------------------- isolated

RECIPE = '''
"""A recipe: its main part must not run in the workers."""
import time

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


def test_isolated_reward_of_a_recipe_file(tmp_path, sandbox):
    path = tmp_path / ("long" * 40) / "recipe.py"  # the error must survive a long path in front of it
    path.parent.mkdir()
    path.write_text(RECIPE)
    reward = isolated(f"{path}:reward", sandbox, columns=["questions"])
    scores = score({"r": reward}, ["x", "hang", "raise", "zz"], [""] * 4, questions=["", "", "", "q"])
    assert scores.total == [1, None, None, 3]
    assert [f.sample for f in scores.failures] == [1, 2]
    assert "took more than 3 s" in scores.failures[0].error
    assert "KeyError: 'mine'" in scores.failures[1].error
    with pytest.raises(ValueError, match=r"returned \[1.0, 2.0\] for one completion"):
        score({"r": isolated(f"{path}:two", sandbox)}, ["x"], [""])
    with pytest.raises(ValueError, match="needs the column 'questions'"):
        score({"r": reward}, ["x"], [""])


def test_isolated_takes_top_level_functions_only(sandbox):
    assert isolated(spelling_of_cat, sandbox)(["cat", "kat"], ["", ""]) == [0.0, -1.0]
    with pytest.raises(ValueError, match="not a function at the top level"):
        isolated(lambda c, g: [0.0], sandbox)
    with pytest.raises(ValueError, match="not a function at the top level"):
        isolated(functools.partial(spelling_of_cat), sandbox)


def spelling_of_cat(completions, ground_truths):
    return spelling(completions, ground_truths, words=["cat"])


# ------------------------------------------------------------------------------------------------------ hostile

TAGS = [
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    r"\boxed{",
    "}",
    "####",
    "answer is",
]
PIECES = [
    *TAGS,
    "18",
    "1,",
    "-",
    "/",
    ".",
    "%",
    "$",
    "\\",
    "{",
    "\n",
    " ",
    "a",
    "٣",
    "\x00",
    "\ud800",
    "²",
    "=",
    r"\frac",
]
piece = st.sampled_from(PIECES)
HOSTILE = st.one_of(
    st.text(max_size=80),
    st.lists(piece, max_size=40).map("".join),
    st.tuples(piece, piece, st.integers(1, 20_000), piece).map(lambda t: ((t[0] + t[1]) * t[2])[:100_000] + t[3]),
    st.tuples(piece, st.integers(1, 20_000)).map(lambda t: f"<answer>{(t[0] * t[1])[:100_000]}</answer>"),
)
EVERY_REWARD = {
    "correct": correctness,
    "numeric": functools.partial(numeric, relative=1e-3),
    "exact": exact,
    "format": format_tags,
    "graded": graded_tags,
    "brevity": functools.partial(brevity, max_length=100),
    "overlong": functools.partial(overlong, max_length=100, buffer=20),
    "language": language_consistency,
    "spelling": functools.partial(spelling, words=["a"]),
}


@settings(max_examples=FUZZ_EXAMPLES or 300, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(text=HOSTILE, ground_truth=st.sampled_from(["18", "-3", "1,000", "50%", "0.5"]))
def test_fuzz_every_reward(text, ground_truth):
    """300 hostile strings, or GRPO_FUZZ_EXAMPLES: no reward raises, takes longer than its limit or leaves its range."""
    scores = score(EVERY_REWARD, [text], [ground_truth], lengths=[len(text)], timeout_s=1.0, max_failed_share=1.0)
    assert scores.failures == []
    for name, (value,) in scores.by_function.items():
        low, high = (-1, 0) if name in ("overlong", "spelling") else (0, 1)
        assert low <= value <= high, name
    assert scores.by_function["exact"] <= scores.by_function["correct"] <= scores.by_function["numeric"]
    assert scores.by_function["format"] <= scores.by_function["graded"]
    assert countdown([text], ["30: 44 19 35 2"]) == [0.0]
