"""Answers in untrusted text: where the answer stands, which number it is, and whether it equals the ground truth.

Nothing here evaluates text, and all of it takes time linear in the text's length. Only ASCII digits are digits:
`int("٣")` is 3 in Python, but a policy that answers in another script has not learnt the format it was asked for.
"""

import re
from fractions import Fraction
from typing import NamedTuple

REASONING_TAGS = ("reasoning", "think")
MAX_ANSWER = 1000
"""maximum number of characters of an answer; a longer one equals nothing (MATH's ground truths have under 200)"""

_REPLACEMENTS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-"),  # minus signs, hyphens and the en dash
    **dict.fromkeys("\u00a0\u2009\u202f\u2007", " "),  # no-break, thin and figure spaces
    **dict.fromkeys("\u200b\u2060\ufeff", ""),  # zero width
    "\u2044": "/",
    "\u2215": "/",
}
_CHARACTERS = str.maketrans(_REPLACEMENTS)
# Applied in this order. Spacing and decoration carry no meaning; `{,}` is how LaTeX writes a thousands comma.
_LATEX = [
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!,;:]|\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:[dt])frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])|°"), " degrees"),
    (re.compile(r"\\([%$#&])"), r"\1"),
    (re.compile(r"\\(?:q?quad(?![A-Za-z])| )|~"), " "),
]
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]{0,200})\}")
_WRAPPERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")]

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,30}|[0-9]{1,200})"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]{{0,200}})?|\.[0-9]{{1,200}})"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<currency>[$€£¥]?)\s*(?P<sign2>[+-]?)\s*(?:"
    rf"(?:(?P<whole>{_DIGITS})(?:\s+|\s*(?=\\frac)))?"
    rf"(?:\\frac\s*(?:\{{\s*(?P<n1>-?{_DIGITS})\s*\}}\s*\{{\s*(?P<d1>-?{_DIGITS})\s*\}}|(?P<n2>[0-9])\s*(?P<d2>[0-9]))"
    rf"|(?P<n3>{_DIGITS})\s*/\s*(?P<d3>{_DIGITS}))"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[+-]?[0-9]{{1,2}})(?![A-Za-z0-9]))?"
    r")"
)
_NAME_EQUALS = re.compile(r"\s*\\?[A-Za-z][A-Za-z_]{0,30}(?:\([A-Za-z]\)|_?\{?[0-9A-Za-z]{1,3}\}?)?\s*=(?!=)\s*")
_BRACKETED = re.compile(r"\(([^()]*)\)|\{([^{}]*)\}")
_UNIT_WORD = re.compile("[A-Za-z\u00b5][A-Za-z'\u2019-]*\\.?")
_SHORT_UNIT = re.compile("cm|mm|km|kg|mg|m[lL]|[dc]l|ft|lb|oz|hr|in|yd|mi|[ap]m|AM|PM|Hz|kW")
_LETTER_UNIT = re.compile("[mgshLlJNWKCFV]")
# Words that change the number or begin a second answer: "3 million" is not 3, and "18 or so" hedges.
_NOT_A_UNIT = re.compile(
    "and|or|not|is|if|but|to|plus|minus|times|over|mod|point|pi|sqrt|root|half|halves|quarters?|base|squared|cubed|negative|"
    "factorial|choose|(dozen|ten|hundred|thousand|million|billion|trillion|third|fourth|fifth|sixth|seventh|eighth|ninth)(ths?|s)?",
    re.IGNORECASE,
)
_NUMBER_IN_TEXT = re.compile(
    r"(?:(?<![\w.)\]}])[+-])?(?:[$€£¥][+-]?)?(?<![\w.])"  # the 3 of "16-3" is not -3
    rf"(?:{_DIGITS}(?:\.[0-9]{{1,200}})?|\.[0-9]{{1,200}})(?:/[0-9]{{1,200}})?(?!\d)\s?%?"
)


class Number(NamedTuple):
    value: Fraction
    """exact value; that of "50%" is 50"""
    percent: bool
    """whether a percent sign, or the word, stood behind it"""


# -------------------------------------------------------------------------------------- where the answer stands


def after_reasoning(text: str) -> str:
    """The text after the last closing reasoning tag, or all of it without one: what stands inside the reasoning is a
    thought, and no answer."""
    ends = [(text.rfind(f"</{tag}>"), len(tag) + 3) for tag in REASONING_TAGS]
    start, length = max(ends)
    return text if start < 0 else text[start + length :]


def extract_tag(text: str, tag: str = "answer") -> str | None:
    """The content of the last complete `<tag>...</tag>`, stripped; None if there is none. It may span lines."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if 0 <= start < end else None


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}`; braces may nest to any depth. A box without braces holds
    what precedes the line's next dollar sign, as MATH's authors read it, or the next word: `\boxed 5` gives "5".

    None if there is no box, or if the last one is never closed: a truncated answer is no answer."""
    at = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if at < 0:
        return None
    rest = text[at + (6 if text.startswith(r"\boxed", at) else 5) :].lstrip()
    if not rest.startswith("{"):
        word = re.match(r"([^$<\n]{1,200})(?=\$)", rest) or re.match(r"[^\s$<{}\\]{1,100}", rest)
        return word.group().strip() or None if word else None
    depth, i = 0, 0
    while i < len(rest):
        if rest[i] == "\\":
            i += 1  # skip what is escaped: \{ is a character, not a brace
        elif rest[i] == "{":
            depth += 1
        elif rest[i] == "}":
            depth -= 1
            if depth == 0:
                return rest[1:i].strip()
        i += 1
    return None


def extract_answer(text: str, tag: str = "answer") -> str | None:
    r"""The answer that a completion commits to in the form it was asked for; None if it does not.

    It is the last `<answer>` block after the reasoning, or else the last `\boxed{}` there. A box inside the block is
    opened: `extract_answer(r"<think>4?</think><answer>\boxed{5}</answer>")` is "5"."""
    text = after_reasoning(text)
    block = extract_tag(text, tag)
    if block is None:
        return extract_boxed(text)
    boxed = extract_boxed(block)
    return block if boxed is None else boxed


def extract_lenient(text: str, tag: str = "answer") -> str | None:
    """The answer that a forgiving reader finds: for evaluation, never for a reward.

    First a passage is chosen: the answer of `extract_answer`, if there is one; else what follows the last unclosed
    `<answer>`, "####" or "answer is", up to the end of the first line that holds a number; else the whole text. The
    answer is that passage if it is a number, else the last number in it, else the strict answer as it stands."""
    strict = extract_answer(text, tag)
    candidate = text if strict is None else strict
    if strict is None:
        for mark in (f"<{tag}>", "####", "answer is"):
            at = candidate.rfind(mark)
            if at >= 0:
                rest = candidate[at + len(mark) :]
                candidate = next((line for line in rest.splitlines() if last_number(line) is not None), rest)
                break
    if len(candidate) <= MAX_ANSWER and parse_number(candidate) is not None:
        return candidate.strip()
    found = last_number(candidate)
    return strict if found is None else found


def last_number(text: str) -> str | None:
    """The last number in ASCII digits, with its sign, currency, fraction and percent sign; None if there is none.

    Only the last 2,000 characters are read. `last_number("so 16-3-4=9 eggs, $-1,234.50.")` is "$-1,234.50"."""
    matches = _NUMBER_IN_TEXT.findall(text[-2000:].translate(_CHARACTERS))
    return matches[-1].strip() if matches else None


def final_answer(solution: str) -> str:
    """The final answer of a data set's solution: what follows GSM8K's "####", MATH's last box, or the text itself."""
    if "####" in solution:
        return solution.rsplit("####", 1)[1].strip()
    boxed = extract_boxed(solution)
    return solution.strip() if boxed is None else boxed


# ------------------------------------------------------------------------------------------ what it is equal to


def normalize(answer: str) -> str:
    r"""One spelling for what can be written in many ways: math delimiters, LaTeX spacing, `\text{}`, Unicode's minus
    signs, a final full stop and runs of spaces are removed or replaced. Letters become lower case, unless a LaTeX
    command is left (`\Delta` is not `\delta`)."""
    text = _clean(answer)
    return text if "\\" in text else text.casefold()


def _clean(answer: str) -> str:
    text = answer.translate(_CHARACTERS).strip()
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _TEXT_COMMAND.sub(r" \1 ", text)
    before = None
    while before != text:
        before = text
        text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for opening, closing in _WRAPPERS:
            inside = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inside and opening not in inside:
                text = inside
                break
    text = " ".join(text.split())
    if len(text) == 3 and text[0] == "(" and text[2] == ")":
        text = text[1]  # the "(C)" of a multiple choice
    return text


def parse_number(answer: str) -> Number | None:
    r"""The exact number that an answer is; None if it is anything but one number.

    Read are signs (Unicode's too), thousands commas, decimals, exponents of up to two digits, `3/4`, `\frac{3}{4}`,
    mixed fractions, currencies, percentages, a name in front ("x = 3") and a unit behind ("18 eggs per day", "5 cm^2").
    Lists, expressions, intervals, digits of other scripts, "3 million" and "18 or 19" are not numbers."""
    if len(answer) > MAX_ANSWER:
        return None
    text = strip_name(_clean(answer)).removeprefix("=").lstrip()
    bracketed = _BRACKETED.fullmatch(text)
    if bracketed:
        text = bracketed[bracketed.lastindex or 0].strip()
    match = _NUMBER.match(text)
    if not match or (match["sign"] and match["sign2"]):
        return None
    percent = _unit(text[match.end() :])
    if percent is None:
        return None
    try:
        value = _value(match)
    except (ValueError, ZeroDivisionError):  # more digits than Python's int() takes; a zero denominator
        return None
    return Number(-value if "-" in (match["sign"], match["sign2"]) else value, percent)


def strip_name(text: str) -> str:
    """The text without a name and equals sign at its start: "3" for "x = 3" and for "f(x) = 3"."""
    named = _NAME_EQUALS.match(text)
    return text[named.end() :] if named else text


def _value(match: re.Match[str]) -> Fraction:
    def integer(name: str) -> int:
        return int(match[name].replace(",", ""))

    if match["decimal"] is not None:
        return Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    for numerator, denominator in (("n1", "d1"), ("n2", "d2"), ("n3", "d3")):
        if match[numerator] is not None:
            value = Fraction(integer(numerator), integer(denominator))
            return value + integer("whole") if match["whole"] is not None else value
    raise ValueError("no branch matched")


def _unit(rest: str) -> bool | None:
    """What follows a number: True for a percent sign, False for nothing or a unit, None for anything else."""
    tail = rest.strip()
    if not tail or tail in "$€£¥":
        return False
    if tail.startswith("%"):
        return True if not tail[1:].strip() else None
    words = re.sub(r"\s*\^\s*\{?\s*[23]\s*\}?$|[²³]$", "", tail).replace("/", " ").split()
    if not 1 <= len(words) <= 6 or not all(_UNIT_WORD.fullmatch(w) for w in words):
        return None
    plain = [w.rstrip(".") for w in words]
    if any(_NOT_A_UNIT.fullmatch(w) for w in plain):
        return None
    # "18x" and "18 xy" are algebra; "18cm", "18 m" and "18 dollars" are not.
    first = plain[0]
    if len(first) == 2 and not _SHORT_UNIT.fullmatch(first):
        return None
    if len(first) == 1 and (rest[:1].strip() or not _LETTER_UNIT.fullmatch(first)):
        return None
    return first.casefold() in ("percent", "percentage", "pct")


def is_unit(text: str) -> bool:
    """Whether text that follows a number is nothing, a percent sign or a unit, so that the number stays what it is."""
    return _unit(f" {text.translate(_CHARACTERS)}") is not None


def numbers_equal(answer: Number, ground_truth: Number) -> bool:
    """Exact equality. If only one of the two is a percentage, its hundredth will do as well: data sets write "50%" as
    50 and as 0.5."""
    if answer.value == ground_truth.value:
        return True
    return (answer.percent and not ground_truth.percent and answer.value / 100 == ground_truth.value) or (
        ground_truth.percent and not answer.percent and ground_truth.value / 100 == answer.value
    )


def equal(answer: str | None, ground_truth: str) -> bool | None:
    """Whether an answer equals the ground truth, as a number or as normalized text; None if only algebra could tell."""
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER:
        return False
    number, true_number = parse_number(answer), parse_number(ground_truth)
    if number is not None and true_number is not None:
        return numbers_equal(number, true_number)
    if normalize(answer) == normalize(ground_truth):
        return True
    if true_number is not None and not re.search(r"[0-9\\]", answer):
        return False  # an answer in words is no number
    return None
