"""A recipe as a program in the environment of `make test-vllm`, which has no matplotlib: no curves are drawn. The
reward is one that random text gets too, the share of digits (a small word among them) in it.

python tests/vllm_recipe.py recipes/quickstart_grpo.py --engine vllm ..."""

import sys
from pathlib import Path

import tyro
from conftest import load_recipe

import grpo.runs.run
from grpo.runs.cli import user_errors

grpo.runs.run.write_curves = lambda *_: None
recipe = load_recipe(Path(sys.argv.pop(1)))
recipe.correct = lambda texts, ground_truths: [sum(map(str.isdigit, t)) / max(len(t), 1) for t in texts]

if __name__ == "__main__":
    with user_errors():
        recipe.main(tyro.cli(recipe.Args, args=grpo.runs.run.command_line()))
