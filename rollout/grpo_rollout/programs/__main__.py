"""The command `grpo`: one subcommand per program, and only the program that is asked for is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from grpo.errors import UserError
from grpo.runs.cli import show_one_line_errors
from grpo_rollout.programs import run_program

PROGRAMS = {
    "evaluate": "Measure pass@k and maj@k of a model and an adapter over a whole test set, with standard errors.",
    "generate": "Answer questions with the base model and with a trained adapter, side by side.",
    "export": "Merge a run's adapter into 16-bit weights, measure what that changes, and write a model folder.",
    "report": "Draw report.html and rewards.png of a run again from what the run has logged.",
}
"""subcommand, which is also the module's name -> what it does"""
USAGE = "usage: grpo PROGRAM [arguments]\n\n{}\n\n`grpo PROGRAM --help` shows the arguments and examples.".format(
    "\n".join(f"    grpo {name:10}{sentence}" for name, sentence in PROGRAMS.items())
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that the first word names. argv: the words after `grpo`; None: those of the command line."""
    show_one_line_errors()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in PROGRAMS:
        raise UserError(f"grpo {argv[0]}: there is no such program; choose one of {', '.join(PROGRAMS)}")
    program = importlib.import_module(f"grpo_rollout.programs.{argv[0]}")
    run_program(program.Args, program.main, argv[1:])


if __name__ == "__main__":
    main()
