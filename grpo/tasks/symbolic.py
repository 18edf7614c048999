"""Equality by algebra, through math-verify.

Only the workers of a `Sandbox` import this module: an expression may take any amount of time and memory, and a training
process has no need of sympy and antlr.
"""

import re

from math_verify import LatexExtractionConfig, parse, verify

from grpo.tasks.answers import is_unit, strip_name

# We allow the LaTeX grammar alone, since math-verify's other grammar calls sympy's parse_expr, which is an eval.
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
# Relations may join two answers, and math-verify would pick one of them.
_RELATION = re.compile(
    r"\\(?:approx|equiv|simeq|sim|cong|neq?|[bp]?mod|to|(?:long)?(?:left)?rightarrow|(?:Left)?Rightarrow|iff|implies|vee|lor)"
    r"(?![A-Za-z])"
)
_BASE = re.compile(r"[0-9]\s*_\s*\{?\s*([0-9A-Za-z]*)")
_LETTERS = re.compile(r"[A-Z](?:\s*,?\s*[A-Z])*")


def symbolic_equal(answer: str, ground_truth: str) -> bool:
    """Whether math-verify finds the two LaTeX expressions equal, and the answer is a single one."""
    value = answer if "=" in ground_truth else strip_name(answer)
    if "=" in value and "=" not in ground_truth:
        # math-verify compares the right side of any equation, so "1 = 18" would be 18. Only a name may stand left.
        return False
    if not _is_one_answer(answer, ground_truth):
        return False
    parsed = [
        parse(rf"\boxed{{{text}}}", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
        for text in (ground_truth, value)
    ]
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None))


def _is_one_answer(answer: str, ground_truth: str) -> bool:
    """False if math-verify would ignore the part of the text that makes it another answer, or two answers."""
    if set(_RELATION.findall(answer)) - set(_RELATION.findall(ground_truth)):
        return False
    if not _balanced(answer):
        return False  # a stray closing brace would end the box, and math-verify would drop the rest
    texts = _TEXT.findall(answer)
    if texts and not _TEXT.search(ground_truth) and not all(is_unit(text) for text in texts):
        return False  # math-verify drops text: it reads "18\\text{ or 17}" as 18
    bases, right = ([b for b in _BASE.findall(text) if b != "10"] for text in (answer, ground_truth))
    if bases and bases != right:
        return False  # math-verify drops subscripts: to it 2516_9 and 2516_8 are equal
    # Letters such as ABC are names, not a product, and as text the answer was already found to be different.
    return not _LETTERS.fullmatch(ground_truth.strip())


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


symbolic_equal("x^2+1", r"\frac{1}{2}")  # builds the parser's tables at import, so that no call pays for them
