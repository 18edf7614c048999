"""Equality by algebra, in workers: what math-verify finds equal, what it must not, and what would take for ever."""

import functools
from pathlib import Path

import pytest
from conftest import FUZZ_EXAMPLES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_rewards import HACKS

from grpo.distributed import World, all_means
from grpo.tasks.answers import MAX_ANSWER, equal
from grpo.tasks.data import load_examples
from grpo.tasks.rewards import correctness
from grpo.tasks.sandbox import Sandbox
from grpo.tasks.scoring import score

SYMBOLIC_EQUAL = "grpo.tasks.symbolic:symbolic_equal"
SLOW = r"\boxed{10^{10^{10}}}"


@pytest.fixture(scope="module")
def sandbox():
    """Patient: on a busy machine a plain check must come to its end. Tests of limits set lower ones."""
    with Sandbox(2, timeout_s=20) as pool:
        yield pool


EQUAL = [
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("1, -2", "-2, 1"),
    ("2x+1", "y=2x+1"),
    ("y = 2x+1", "2x+1"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1 & 2\end{pmatrix}"),
    ("2^{10}", "1024"),
    (r"\sqrt{12}\text{ cm}", r"2\sqrt{3}"),
    (r"\left\{1,2\right\}", r"\{2,1\}"),
    ("2516_{8}", "2516_8"),
    (r"\log_2 8", r"\log_2 8 + 0"),
]
DIFFERENT = [
    (r"2\sqrt{2}", r"\sqrt{12}"),
    ("x^2+2x+2", "(x+1)^2"),
    # several answers at once, and equations of anything to the ground truth
    (r"17\text{ or }18", "18"),
    (r"18\text{ (or 17)}", "18"),
    (r"\{17,18\}", "18"),
    ("17,18", "18"),
    (r"\pm 18", "18"),
    ("[17,19]", "18"),
    (r"x \ge 18", "18"),
    (r"17 \lor 18", "18"),
    ("1=18", "18"),
    ("x=17=18", "18"),
    ("1,2,3,4", "1,2"),
    (r"x \in \mathbb{R}", "(1,2)"),
    (r"18 \approx 17", "18"),
    (r"17 \equiv 18", "18"),
    (r"5 \equiv \sqrt{12}", r"2\sqrt{3}"),
    (r"\sqrt{12}\mod 17", r"2\sqrt{3}"),
    (r"18 } 17", "18"),
    (r"\sqrt{12} } or 17 or 19", r"2\sqrt{3}"),
    (r"\sqrt{12}\text{ (wrong; really five)}", r"2\sqrt{3}"),
    # what math-verify drops, or takes for a product
    ("2516_9", "2516_8"),
    ("18_8", "18"),
    ("18 _ 17", "18"),
    ("BCA", "ABC"),
    ("C, A, B", "A, B, C"),
]


def test_symbolic_equality(sandbox):
    outcomes = dict(zip(EQUAL + DIFFERENT, sandbox.map(SYMBOLIC_EQUAL, EQUAL + DIFFERENT)))
    assert {pair: o.error for pair, o in outcomes.items() if o.error} == {}
    assert [pair for pair in EQUAL if outcomes[pair].value is not True] == []
    assert [pair for pair in DIFFERENT if outcomes[pair].value is not False] == []


def test_agreement_with_the_cheap_comparison(sandbox):
    """`equal` decides as math-verify does, on ground truths of GSM8K's form and on many spellings of numbers."""
    examples = load_examples(str(Path(__file__).parent / "data" / "gsm8k_form.jsonl"))
    numbers = ["0.5", r"\frac{1}{2}", "-3", "1,000", "1000", "50\\%", r"\frac{50}{100}", "2.50", "3/4", "0.75"]
    numbers += [e.ground_truth for e in examples]
    pairs = [(a, b) for a in numbers for b in numbers]
    outcomes = sandbox.map(SYMBOLIC_EQUAL, pairs)
    assert [pair for pair, outcome in zip(pairs, outcomes) if equal(*pair) is not outcome.value] == []


def test_correctness_by_algebra(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "timeout_s", 3)
    completions = [r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}", r"\boxed{2\sqrt{2}}", "12", SLOW]
    assert correctness(completions, [r"\sqrt{12}"] * 5, sandbox=sandbox) == [1, 1, 0, 0, 0]
    assert correctness(completions, [r"\sqrt{12}"] * 5) == [0, 1, 0, 0, 0]


def test_completions_that_try_to_fool_rewards_fool_no_algebra(sandbox, monkeypatch):
    """Algebra takes "(16-3-4)*2" for 18, as math-verify means it; nothing else changes."""
    monkeypatch.setattr(sandbox, "timeout_s", 3)
    rewards = correctness([h[0] for h in HACKS.values()], ["18"] * len(HACKS), sandbox=sandbox)
    wrong = [name for name, reward, hack in zip(HACKS, rewards, HACKS.values()) if reward != hack[1]]
    assert wrong == ["an expression left to the reader"]


def test_checks_that_never_began_are_absent_not_wrong(sandbox, monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "timeout_s", 0.5)
    monkeypatch.setattr(sandbox, "budget_s", 0.4)
    completions = [SLOW, r"\boxed{9^{10^{10}}}", r"\boxed{2\sqrt{3}}"]  # the first two keep both workers busy
    # The time that workers take does not count towards the limit of `score`: they have limits of their own.
    reward = functools.partial(correctness, sandbox=sandbox)
    scores = score({"correct": reward}, completions, [r"\sqrt{12}"] * 3, timeout_s=0.3)
    alone = reward(completions, [r"\sqrt{12}"] * 3)  # as the evaluation of a recipe calls it
    assert scores.total == [0.0, 0.0, None]
    assert "TimeoutError" in scores.failures[0].error
    assert "rewards failed on 1 of 3 samples, which therefore have no reward" in caplog.text
    assert "the first: 'correct' on sample 2" in caplog.text
    assert all_means({"correct": alone}, World()) == {"correct": 0.0}


# ------------------------------------------------------------------------------------------------------ hostile

TOO_MUCH = [
    ("10^10^10", "18"),
    ("10^{10^{10}}", "18"),
    ("1000000!", "18"),
    (r"\binom{10^9}{10^8}", r"\sqrt{2}"),
    (r"\int_0^{\infty} e^{-x^{x^x}} dx", r"\sqrt{2}"),
    ("(" * 400, "18"),
    (r"\frac{1}{" * 100 + "0" + "}" * 100, "18"),
    ("__import__('os').system('true')", "18"),
]
PIECES = [
    *"^{}_\\()!+-*/=,.%$&<>|'019xynei \n\x00\ud800²٣−∞🙂",
    *("10", "99999", "1e9"),
    *(r"\frac{", r"\sqrt{", r"\sqrt[9]{", r"\boxed{", r"\text{", r"\left(", r"\right)", r"\int_0^{", r"\sum_{n=1}^{"),
    *(r"\lim_{x\to", r"\prod_{n=1}^{", r"\binom{", r"\pi", r"\infty", r"\cdot", r"\pm", r"\in", r"\cup", r"\\"),
    *(r"\sin", r"\begin{pmatrix}", r"\end{pmatrix}", r"\log_", r"\%"),
    *("</answer>", "<answer>", "</reasoning>", "__import__"),
]


def hostile_text() -> st.SearchStrategy[str]:
    """Any text; LaTeX in pieces; the same piece over and over, up to 100 kB; towers, braces and factorials."""
    piece = st.sampled_from(PIECES)
    light = [
        st.text(max_size=60),
        st.lists(piece, max_size=20).map("".join),
        st.tuples(piece, piece, st.integers(1, 20_000)).map(lambda t: ((t[0] + t[1]) * t[2])[:100_000]),
    ]
    heavy = st.one_of(
        st.lists(st.sampled_from(["9", "10", "99", "x", "2"]), min_size=2, max_size=8).map("^".join),
        st.tuples(st.sampled_from([r"\frac{1}{", r"\sqrt{", "2^{", "(", r"\left("]), st.integers(1, 300)).map(
            lambda t: t[0] * t[1] + "9" + "}" * t[1]
        ),
        st.integers(1, 10**12).map(lambda n: f"{n}!"),
    )
    return st.one_of(*light * 4, heavy)


@pytest.fixture
def strict_sandbox(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "timeout_s", 0.25)
    monkeypatch.setattr(sandbox, "budget_s", 600)
    return sandbox


def test_what_takes_too_much_is_not_equal(strict_sandbox):
    outcomes = strict_sandbox.map(SYMBOLIC_EQUAL, TOO_MUCH)
    assert [pair for pair, outcome in zip(TOO_MUCH, outcomes) if outcome.value is True] == []


@settings(max_examples=max(FUZZ_EXAMPLES // 25, 3), phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(hostile_text(), min_size=25, max_size=25),
    ground_truth=st.sampled_from(["18", r"\sqrt{12}", "x^2+1"]),
)
def test_fuzz_symbolic_checks(strict_sandbox, texts, ground_truth):
    """75 strings in batches of 25, or GRPO_FUZZ_EXAMPLES of them. None may end, hang or fail the pool: each outcome is
    True, False, or an error within the call's limit."""
    texts = [t[:MAX_ANSWER] for t in texts]  # nothing longer gets this far
    outcomes = strict_sandbox.map(SYMBOLIC_EQUAL, [[t, ground_truth] for t in texts])
    assert all(o.value in (True, False) if not o.error else o.value is None for o in outcomes)
    assert not any(o.skipped for o in outcomes)
