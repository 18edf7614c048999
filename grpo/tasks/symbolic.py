"""Equality by algebra, through math-verify. Imported by the workers of a `Sandbox` only: an expression may take any
time and memory, and sympy and antlr have no business in a training process."""

import re

from math_verify import LatexExtractionConfig, parse, verify

from grpo.tasks.answers import is_unit, strip_name

# Only the LaTeX grammar: math-verify's other one goes through sympy's parse_expr, which is an eval.
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
# Between two answers, of which math-verify takes one.
_RELATION = re.compile(
    r"\\(?:approx|equiv|simeq|sim|cong|neq?|[bp]?mod|to|(?:long)?(?:left)?rightarrow|(?:Left)?Rightarrow|iff|implies|vee|lor)"
    r"(?![A-Za-z])"
)
_BASE = re.compile(r"[0-9]\s*_\s*\{?\s*([0-9A-Za-z]*)")
_LETTERS = re.compile(r"[A-Z](?:\s*,?\s*[A-Z])*")


def symbolic_equal(answer: str, ground_truth: str) -> bool:
    """Whether math-verify finds the two LaTeX expressions equal, and the answer is one answer."""
    value = answer if "=" in ground_truth else strip_name(answer)
    if "=" in value and "=" not in ground_truth:
        # math-verify compares the right side of any equation, of "1 = 18" too; only a name may stand on the left.
        return False
    if not _is_one_answer(answer, ground_truth):
        return False
    parsed = [
        parse(rf"\boxed{{{text}}}", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
        for text in (ground_truth, value)
    ]
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None))


def _is_one_answer(answer: str, ground_truth: str) -> bool:
    """False where math-verify would pass over what makes the answer another one, or two."""
    if set(_RELATION.findall(answer)) - set(_RELATION.findall(ground_truth)):
        return False
    if not _balanced(answer):
        return False  # a closing brace would end the box, and what follows be dropped
    texts = _TEXT.findall(answer)
    if texts and not _TEXT.search(ground_truth) and not all(is_unit(text) for text in texts):
        return False  # it drops text: "18\\text{ or 17}" is 18 to it
    bases, right = ([b for b in _BASE.findall(text) if b != "10"] for text in (answer, ground_truth))
    if bases and bases != right:
        return False  # it drops subscripts: 2516_9 is 2516_8 to it
    return not _LETTERS.fullmatch(ground_truth.strip())  # ABC is no product, so text decides, and has found it another


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


symbolic_equal("x^2+1", r"\frac{1}{2}")  # builds the parser's tables, which must not count as anyone's time
