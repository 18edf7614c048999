"""A recipe as a program in the environment of `make test-vllm`, which has no matplotlib, so no curves are drawn. Its
reward is one that random text earns too: the share of digits in it.

python tests/vllm_recipe.py recipes/quickstart_grpo.py --engine vllm ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import load_recipe

import grpo.runs.report
from grpo.runs.cli import parse_args


def digits(texts: Sequence[str], ground_truths: Sequence[str], **_: Any) -> list[float]:
    """In place of `grpo.tasks.rewards.correctness`."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]


grpo.runs.report.write_curves = lambda *_: None
recipe = load_recipe(Path(sys.argv.pop(1)))
recipe.correctness = digits

if __name__ == "__main__":
    recipe.main(parse_args(recipe.Args))
