"""Errors that the user can mend, and the words they are told in."""

from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend. Its message is one line that names the field and the remedy.

    A program shows the message alone (`grpo.runs.cli`): a traceback would only hide it."""


def flag(field: str) -> str:
    """The command-line flag of a field: "group_size" -> "--group-size"."""
    return "--" + field.replace("_", "-")


def looks_like_path(source: str) -> bool:
    """Whether the name of a model or data set can only be a path: names on the hub are "name" or "owner/name"."""
    return Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1
