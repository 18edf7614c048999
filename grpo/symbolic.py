"""Equality by algebra, through math-verify. Imported by the workers of a `Sandbox` only: an expression may take any
time and memory, and sympy and antlr have no business in a training process."""

import re

from math_verify import LatexExtractionConfig, parse, verify

from grpo.answers import strip_name

# Only the LaTeX grammar: math-verify's other one goes through sympy's parse_expr, which is an eval.
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]
# math-verify drops text: "18\\text{ or 17}" is 18 to it.
_HEDGE = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*(?:[0-9]|\bor\b|\band\b|\bnot\b)")


def symbolic_equal(answer: str, gold: str) -> bool:
    """Whether math-verify finds the two LaTeX expressions equal."""
    if "=" in answer and "=" not in gold:
        # math-verify compares the right side of any equation, of "1 = 18" too; only a name may stand on the left.
        answer = strip_name(answer)
        if "=" in answer:
            return False
    if _HEDGE.search(answer) and not _HEDGE.search(gold):
        return False
    parsed = [
        parse(rf"\boxed{{{text}}}", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
        for text in (gold, answer)
    ]
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None))


symbolic_equal("x^2+1", r"\frac{1}{2}")  # builds the parser's tables, which must not count as anyone's time
