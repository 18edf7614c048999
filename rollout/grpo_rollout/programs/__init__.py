"""Programs around a trained policy, each a subcommand of `grpo`: evaluate, generate, export, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from grpo.runs.cli import show_one_line_errors

T = TypeVar("T")


def run_program(args_class: type[T], run: Callable[[T], object], argv: Sequence[str] | None = None) -> None:
    """Call `run` with the program's arguments, and show its UserErrors as one line.

    args_class: dataclass whose fields become flags. `--help` begins with the docstring of the module that defines it.
    argv: the words after the program's name; None: those of the command line."""
    show_one_line_errors()
    module = sys.modules[args_class.__module__]
    name = module.__spec__.name.rpartition(".")[2] if module.__spec__ else args_class.__module__
    run(tyro.cli(args_class, args=argv, prog=f"grpo {name}", description=module.__doc__))
