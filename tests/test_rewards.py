"""Rewards on completions that try to fool them."""

import functools
import json
import os
from pathlib import Path

import pytest
from conftest import FUZZ_EXAMPLES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.tasks.data import countdown_examples, load_examples
from grpo.tasks.rewards import (
    brevity,
    correctness,
    countdown,
    exact,
    format_tags,
    graded_tags,
    language_consistency,
    numeric,
    overlong,
    spelling,
)
from grpo.tasks.scoring import score

GSM8K = Path(os.environ.get("GRPO_GSM8K_DIR", Path(__file__).parents[1] / "../shared/data/gsm8k"))


def wrapped(reasoning: str, answer: str) -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


# ------------------------------------------------------------------------------------------------------ hacks

QUESTION = "Janet's ducks lay 16 eggs; she eats 3 and bakes with 4. At $2 each, is what she makes 18 dollars?"
HACKS = {
    # what the completion tries: (completion, correctness, format_tags, graded_tags), for the ground truth 18
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
    "the ground truth in the reasoning only": (wrapped("It is 18.", "17"), 0, 1, 1),
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
    "an equation of anything to the ground truth": (wrapped("a", "1=18"), 0, 1, 1),
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


def test_hacks():
    texts, correct, formatted, graded = zip(*HACKS.values())
    ground_truths = ["18"] * len(HACKS)
    assert dict(zip(HACKS, correctness(texts, ground_truths))) == dict(zip(HACKS, correct))
    assert dict(zip(HACKS, numeric(texts, ground_truths))) == dict(zip(HACKS, correct))
    assert dict(zip(HACKS, format_tags(texts, ground_truths))) == dict(zip(HACKS, formatted))
    assert dict(zip(HACKS, graded_tags(texts, ground_truths))) == pytest.approx(dict(zip(HACKS, graded)))


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


def test_countdown_hacks():
    rewards = countdown([f"<answer>{expression}</answer>" for expression in COUNTDOWN], ["30: 44 19 35 2"] * 19)
    assert dict(zip(COUNTDOWN, rewards, strict=True)) == COUNTDOWN


def test_countdown_is_exact():
    ground_truth = "24: 3 3 8 8"
    assert countdown([r"\boxed{8/(3-8/3)}"], [ground_truth]) == [1.0]  # 24 only in exact arithmetic
    assert countdown(["<answer>8 ÷ (3 − 8 ÷ 3)</answer>"], [ground_truth]) == [1.0]
    assert countdown(["<answer>(3 × 3) × 8 ÷ 8</answer>"], [ground_truth]) == [0.0]


def test_countdown_scores_the_puzzles_of_countdown_examples():
    example = countdown_examples(1, numbers=2)[0]
    target, numbers = example.ground_truth.split(": ")
    a, b = map(int, numbers.split())
    expressions = [f"<answer>{x}{o}{y}</answer>" for x, y in ((a, b), (b, a)) for o in "+-*/"]
    assert 1.0 in countdown(expressions, [example.ground_truth] * 8)
    assert countdown([f"<answer>{target}</answer>"], [example.ground_truth]) == [0.0]


# --------------------------------------------------------------------------------------------- shipped rewards


@pytest.mark.parametrize(
    ("path", "count"), [(GSM8K / "test.jsonl", 1319), (Path(__file__).parent / "data" / "gsm8k_form.jsonl", 6)]
)
def test_gsm8k_solutions_score_1_and_wrong_numbers_0(path, count):
    """Every solution in the answer format; of the whole test set, and of six rows in its form."""
    if not path.exists():
        pytest.skip(f"no {path}: point GRPO_GSM8K_DIR to a folder with GSM8K's test.jsonl")
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    ground_truths = [e.ground_truth for e in load_examples(str(path))]
    assert len(ground_truths) == len(solutions) == count
    right = [wrapped(*s.rsplit("####")) for s in solutions]
    for reward in correctness, format_tags, numeric:
        assert reward(right, ground_truths) == [1.0] * count
    # Wrong in the nearest ways: the numbers next to it, negative, one digit more; all under the right reasoning.
    values = [int(g.replace(",", "")) for g in ground_truths]
    for wrong in (lambda v: v + 1, lambda v: v - 1, lambda v: -v - 1, lambda v: f"{v}1"):
        completions = [wrapped(s, str(wrong(v))) for s, v in zip(solutions, values)]
        assert correctness(completions, ground_truths) == [0.0] * count


def test_numeric_tolerance():
    completions = [rf"\boxed{{{x}}}" for x in ("3.14", "3.1416", "3.15", "22/7", "pi", "-3.14")]
    assert numeric(completions, ["3.14159"] * 6, absolute=0.002) == [1, 1, 0, 1, 0, 0]
    assert numeric(completions, ["3.14159"] * 6, relative=0.001) == [1, 1, 0, 1, 0, 0]
    assert numeric(completions, ["3.14159"] * 6) == [0] * 6
    assert numeric([r"\boxed{1e99}"], ["1e98"], relative=0.1) == [0]
    with pytest.raises(UserError, match="'seven' is not a number"):
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
    with pytest.raises(UserError, match="buffer 0"):
        overlong([], [], [], max_length=100, buffer=0)


def test_brevity_pays_right_answers_only():
    completions = [r"\boxed{5}", r"\boxed{5}", r"\boxed{6}", "", r"\boxed{5}"]
    assert brevity(completions, ["5"] * 5, [10, 50, 1, 0, 200], max_length=100) == [0.9, 0.5, 0, 0, 0]


def test_language_consistency():
    texts = ["all plain", "3 + 4 = 7!", "half \u043c\u0438\u0440\u044b", "\u7b54\u6848", "", "...", "1\u0668", "naïve"]
    assert language_consistency(texts, [""] * 8) == pytest.approx([1, 1, 0.5, 0, 0, 0, 0.5, 1])
    assert language_consistency(["\u7b54\u6848 ok"], [""], scripts=("CJK",)) == [0.5]


def test_spelling():
    texts = ["The cat SAT", "the qat", "zzz", "7", ""]
    assert spelling(texts, [""] * 5, words={"the", "cat", "sat"}) == [0, -0.5, -1, 0, 0]


# ------------------------------------------------------------------------------------------------------ hostile

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<think>", "</think>"]
PIECES = [
    *TAGS,
    *(r"\boxed{", "}", "####", "answer is", "18", "1,", "-", "/", ".", "%", "$", "\\", "{", "\n", " ", "a", "="),
    *(r"\frac", "٣", "\x00", "\ud800", "²"),
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
