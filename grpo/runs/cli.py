"""The command line that all recipes share: flags from a dataclass, the arguments of a resumed run, one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import tyro

from grpo.errors import UserError
from grpo.runs.args import check_args, check_vllm_installed, vllm_installed, with_values
from grpo.runs.record import read_run

__all__ = ["check_args", "check_vllm_installed", "parse_args", "show_one_line_errors", "vllm_installed"]

T = TypeVar("T")


def parse_args(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """A recipe's arguments from the command line (`argv`, by default the program's), checked by `check_args`.

    Every field becomes a flag, those of the groups too, without the group's name before them. `--resume RUN` begins
    with the arguments of that run, and the flags given beside it override them.
    `--help` begins with the docstring of the module that defines `cls`, which is where a recipe has its examples.
    From here on the program shows a UserError as one line, see `show_one_line_errors`."""
    show_one_line_errors()
    argv = list(sys.argv[1:] if argv is None else argv)
    only_resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_resume.add_argument("--resume", nargs="?")
    resume = only_resume.parse_known_args(argv)[0].resume
    args = tyro.cli(
        cls,
        args=argv,
        description=sys.modules[cls.__module__].__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        default=_args_of_run(cls, Path(resume)) if resume else tyro.MISSING_NONPROP,
    )
    check_args(args)
    return args


def _args_of_run(cls: type[T], directory: Path) -> T:
    """The arguments that a run has in its run.json. Raises UserError where the directory holds no run."""
    values = read_run(directory)["args"]
    values = {name: value for name, value in values.items() if name not in ("run_dir", "resume")}  # it may have moved
    required = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return with_values(cls(**{name: values[name] for name in required if name in values}), values)


def show_one_line_errors() -> None:
    """Have this program show a UserError as one line, `error: ...`, and end with exit code 2. A UserError names the
    flag and the remedy, and a traceback would only hide that. Any other exception keeps its traceback."""
    sys.excepthook = _one_line_hook


def _one_line_hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> Any:
    if not isinstance(error, UserError):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)  # Python takes the exit code of a SystemExit that the hook raises
