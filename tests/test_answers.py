"""Where the answer stands, which number it is, and what it equals."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from grpo.tasks.answers import (
    MAX_ANSWER,
    after_reasoning,
    equal,
    extract_answer,
    extract_boxed,
    extract_lenient,
    extract_tag,
    final_answer,
    last_number,
    normalize,
    parse_number,
)

NUMBERS = [
    ("18", 18),
    ("(18)", 18),
    ("(-5)", -5),
    ("{18}", 18),
    ("= 18", 18),
    ("18 €", 18),
    ("18\\$", 18),
    (r"\frac{-36}{-2}", 18),
    ("-3", -3),
    ("+7", 7),
    ("\u22123", -3),  # Unicode minus
    ("1,000", 1000),
    ("12,345,678", 12345678),
    (r"10{,}000", 10000),
    (r"10\,000", 10000),
    ("2.5", Fraction(5, 2)),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("5.", 5),
    ("18.", 18),
    ("0.1", Fraction(1, 10)),
    ("$1,234.50", Fraction(2469, 2)),
    (r"\$18", 18),
    ("-$5", -5),
    ("$-5", -5),
    ("£5", 5),
    ("3/4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"\dfrac34", Fraction(3, 4)),
    (r"-\frac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{4}", Fraction(-3, 4)),
    ("1 1/2", Fraction(3, 2)),
    (r"1\frac12", Fraction(3, 2)),
    (r"-1\frac{1}{2}", Fraction(-3, 2)),
    ("1e3", 1000),
    ("2.5e-1", Fraction(1, 4)),
    ("$18$", 18),
    (r"\(18\)", 18),
    ("**18**", 18),
    ("x = 18", 18),
    ("f(x)=18", 18),
    ("x_1 = 18", 18),
    ("18 eggs per day", 18),
    ("18 Dollars", 18),
    ("18cm", 18),
    ("18 m", 18),
    ("5 cm^2", 5),
    (r"5\text{ cm}^2", 5),
    (r"90^\circ", 90),
    ("9 a.m.", None),
]
NOT_NUMBERS = [
    *("", " ", "-", ".", "$", "%", "abc", "+-18", "--5", "1/0", "\u00b2", "18\u00b2", "12:30", "18,", "18/", "18 -"),
    *("1,2,3", "1 2 3 18", "100,00", "1.000.000", "17, 18", "18 or 19", "18 and 19", "18 1", "18%%", "1 000"),
    *("9*2", "16-3", "18!", "10^10", "1=18", "18=18", "x=y=18", "18x", "18 xy", "18 pi", r"18\pi", r"\sqrt{18}"),
    *("18 dozen", "18 base eight", "18 squared", "3 fifths", "18 negative", "(17, 18)", "(18", "((18))", "{18", "=="),
    *("3 million", "18 or so", "2 hours 30 minutes", "Answer: 18", "the answer is 18", "1e999", "1e9999999999"),
    *("\u0663", "\uff11\uff18", "\u0967\u096e", "\u2460", "1\u0668", "1" * (MAX_ANSWER + 1), "[17,19]", "(17, 18)"),
]


def test_numbers():
    assert {text: number and number.value for text, _ in NUMBERS for number in [parse_number(text)]} == dict(NUMBERS)
    assert [text for text in NOT_NUMBERS if parse_number(text) is not None] == []
    for text in "50%", r"50\%", "50 %", "50 percent", r"$50\%$", "50%.":
        assert parse_number(text) == (50, True)


@given(
    st.fractions(max_denominator=10**6),
    st.sampled_from(["{}", " {} ", "${}$", r"\({}\)", "**{}**", "x = {}", "{}.", r"\$ {}", "{} eggs", "\u200b{}"]),
)
def test_every_spelling_of_a_fraction_is_that_fraction(value, pattern):
    assert parse_number(pattern.format(value)).value == value
    latex = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert parse_number(pattern.format(latex)).value == value


@given(st.integers(-(10**15), 10**15), st.integers(0, 6))
def test_every_spelling_of_a_decimal_is_that_decimal(scaled, places):
    value = Fraction(scaled, 10**places)
    sign, whole, rest = ("-" if scaled < 0 else ""), abs(scaled) // 10**places, abs(scaled) % 10**places
    digits = f".{rest:0{places}d}" if places else ""
    for text in (f"{sign}{whole}{digits}", f"{sign}{whole:,}{digits}", f"{sign}${whole:,}{digits}"):
        assert parse_number(text).value == value
        assert parse_number(text.replace("-", "\u2212")).value == value
        assert parse_number(last_number(f"It was 7. So it is {text}.")).value == value


EQUAL = [
    ("18", "18", True),
    ("18.0", "18", True),
    ("18.00000000000000001", "18", False),  # exact: no rounding by floats
    ("0.3333", "1/3", False),
    ("0.5", r"\frac{1}{2}", True),
    ("1,000", "1000", True),
    ("-18", "18", False),
    ("50%", "50", True),
    ("50%", "0.5", True),
    ("0.5", r"50\%", True),
    ("50", r"50\%", True),
    ("5000%", "50%", False),
    ("50%", "5000", False),
    ("18 eggs", "18 dollars", True),  # units are not read
    (r"\text{East}", "east", True),
    ("(C)", "C", True),
    ("B", "C", None),
    ("eighteen", "18", False),
    (r"2\sqrt{3}", r"\sqrt{12}", None),
    (r"\Delta", r"\delta", None),
    ("9*2", "18", None),
    ("", "", False),
    (None, "18", False),
    ("x" * (MAX_ANSWER + 1), "x" * (MAX_ANSWER + 1), False),
]


def test_equal():
    assert [(answer, ground_truth, equal(answer, ground_truth)) for answer, ground_truth, _ in EQUAL] == EQUAL


BOXED = [
    (r"\boxed{5}", "5"),
    (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    (r"\boxed{\text{a {nested {deep}} b}}", r"\text{a {nested {deep}} b}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # escaped braces do not balance
    (r"\boxed{1} or \boxed{2}", "2"),
    (r"\boxed 5", "5"),
    (r"so it is \boxed 5 apples, not 6", "5"),
    (r"$\boxed 2\sqrt{2}$ in all", r"2\sqrt{2}"),
    (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
    (r"\fbox{7}", "7"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{}", ""),
    (r"\boxed{1} then \boxed{2", None),  # the last one was cut off
    (r"\boxed", None),
    ("boxed{5}", None),
    (r"\boxed{" * 50_000, None),
]


def test_boxed():
    assert [(text, extract_boxed(text)) for text, _ in BOXED] == BOXED


ANSWERS = [
    ("<answer>18</answer>", "18", "18"),
    ("<reasoning>\na\n</reasoning>\n<answer>\n18\n</answer>\n", "18", "18"),
    ("<answer>17</answer><answer>18</answer>", "18", "18"),
    (r"<answer>\boxed{18}</answer>", "18", "18"),
    (r"\boxed{17} <answer>18</answer>", "18", "18"),
    (r"<think>\boxed{17}</think> \boxed{18}", "18", "18"),
    ("<reasoning><answer>18</answer></reasoning>", None, "18"),
    ("a <answer>17</answer> b</think> 18", None, "18"),
    ("<answer>18", None, "18"),
    ("<answer>It is 18 eggs.</answer>", "It is 18 eggs.", "18"),
    ("<answer>yes</answer>", "yes", "yes"),
    ("<answer></answer> 18", "", ""),
    ("The answer is 18, not 17", None, "17"),
    ("#### 1,000\n", None, "1,000"),
    # What comes after the line that answers is about something else.
    ("The answer is 24 * 5 = 120 minutes.\n\nSo he drives 120 minutes of his 4 hours.", None, "120"),
    ("The answer is:\n\n18\n(in 3 steps)", None, "18"),
    ("<answer>18\nStep 2 of 3", None, "18"),
    ("The answer is 18 eggs", None, "18 eggs"),
    ("so 16-3-4=9 eggs, $-1,234.50.", None, "$-1,234.50"),
    ("no number", None, None),
    ("</answer>18<answer>", None, None),
    ("<ANSWER>18</ANSWER>", None, "18"),
]


def test_extraction():
    assert [(text, extract_answer(text), extract_lenient(text)) for text, *_ in ANSWERS] == ANSWERS


LAST_NUMBERS = [
    ("10-3", "3"),
    ("(3)-4", "4"),
    ("-5 -6", "-6"),
    ("1,2,3", "3"),
    ("3/4 of", "3/4"),
    ("50%", "50%"),
    ("3.5.", "3.5"),
    ("1\u0668", None),  # an Arabic-Indic digit makes it another number
    ("\u0661\u0668", None),
    ("1" * 100_000, None),  # longer than any number
    ("1," * 50_000, "1"),
    ("7 " + "x" * 2000, None),  # further back than an answer stands
]


def test_last_number():
    assert [(text, last_number(text)) for text, _ in LAST_NUMBERS] == LAST_NUMBERS


def test_final_answer():
    assert final_answer("2 * 3 = <<2*3=6>>6\n#### 1,000 ") == "1,000"
    assert final_answer(r"Thus $x=\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert final_answer(" 42\n") == "42"


def test_after_reasoning_takes_the_last_closing_tag():
    assert after_reasoning("<think>a</think> b </reasoning> c") == " c"
    assert after_reasoning("<think>never closed") == "<think>never closed"


def test_extract_tag_spans_lines_and_takes_the_last():
    assert extract_tag("<a>1</a>\n<a>\n2\n3 </a>", "a") == "2\n3"
    assert extract_tag("<a>1", "a") is None


def test_normalize():
    assert normalize(r"\left( 1,\! 2 \right)") == "( 1, 2 )"
    assert normalize(r"  $\text{Two  Words}$. ") == "two words"
    assert normalize(r"\tfrac{1}{2}") == r"\frac{1}{2}"
