"""A recipe's arguments as data: a dataclass whose fields are values or groups, which are frozen dataclasses themselves.
A field's name is unique over all groups, so that it names one flag."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import UserError, flag
from grpo.sampler import check_prompts_per_step

T = TypeVar("T")

_AT_LEAST = {
    "steps": (1, "optimizer steps to do"),
    "group_size": (2, "an answer is compared with its group's mean, so a group needs two"),
    "prompts_per_step": (1, "questions per step"),
    "num_iterations": (1, "optimizer steps per batch"),
    "max_prompt_tokens": (1, "tokens of the longest prompt"),
    "max_completion_tokens": (1, "tokens of the longest answer"),
    "micro_batch_tokens": (1, "padded tokens of one forward pass"),
    "warmup_steps": (0, "0 begins at the full learning rate"),
    "lora_rank": (1, "rank of the adapter"),
    "lora_alpha": (1, "the adapter's scaling is alpha / rank"),
    "eval_every": (0, "0 evaluates only before and after"),
    "eval_questions": (1, "held-out questions"),
    "save_every": (0, "0 saves only at the end"),
    "seed": (0, "a seed is not negative"),
}
_ABOVE_ZERO = ("learning_rate", "temperature", "max_grad_norm")


def flatten(args: Any) -> dict[str, Any]:
    """The values of all fields by name, those of the groups beside the others."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        found = flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
        for name in found.keys() & values.keys():
            raise TypeError(f"{type(args).__name__}: two fields are named {name}; flags have no prefix, so rename one")
        values |= found
    return values


def flat_args(args: Any) -> dict[str, Any]:
    """`flatten` as JSON: what is neither a number, a text, a list nor None is stored as text."""

    def as_json(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [as_json(v) for v in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    return {name: as_json(value) for name, value in flatten(args).items()}


def with_values(default: T, values: Mapping[str, Any]) -> T:
    """A copy of a recipe's arguments with the values of `flat_args`. Names that are unknown here are ignored."""
    hints = typing.get_type_hints(type(default))
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(default):  # type: ignore[arg-type]
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_values(value, values)
        elif field.name in values:
            changed[field.name] = _from_json(values[field.name], hints[field.name])
    return dataclasses.replace(default, **changed)  # type: ignore[type-var]


def _from_json(value: Any, hint: Any) -> Any:
    """A value of JSON as a field of this type: texts may stand for paths, and lists for tuples."""
    kinds = {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    return value


def check_args(args: Any) -> None:
    """Raise UserError for arguments that cannot work, naming the flag and what would. No model and no data are read.

    Only the fields that `args` has are looked at, in every group; a group with a method `check` is asked too."""
    values = flatten(args)
    for name, (least, why) in _AT_LEAST.items():
        value = values.get(name)
        if value is not None and value < least:
            raise UserError(f"{flag(name)} {value} is too small: at least {least} ({why})")
    buffer, limit = values.get("overlong_buffer"), values.get("max_completion_tokens")
    if buffer is not None and limit is not None and not 1 <= buffer <= limit:
        raise UserError(f"--overlong-buffer {buffer} must lie in 1..{limit}, the --max-completion-tokens")
    if "prompts_per_step" in values:
        check_prompts_per_step(values["prompts_per_step"], int(os.environ.get("WORLD_SIZE", 1)))  # set by torchrun
    for name in _ABOVE_ZERO:
        value = values.get(name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} {value} must be above 0, and finite")
    for field in dataclasses.fields(args):
        group = getattr(args, field.name)
        if dataclasses.is_dataclass(group) and hasattr(group, "check"):
            takes_iterations = "num_iterations" in inspect.signature(group.check).parameters
            group.check(**({"num_iterations": values.get("num_iterations", 1)} if takes_iterations else {}))
    if values.get("engine") == "vllm":
        check_vllm_installed()


def vllm_installed() -> bool:
    """Whether vLLM can be imported; it is not imported here."""
    return importlib.util.find_spec("vllm") is not None


def check_vllm_installed() -> None:
    """Raise UserError, naming the flag, where vLLM is not installed."""
    if not vllm_installed():
        raise UserError("--engine vllm: vLLM is not installed; pip install -e '.[vllm]', or take --engine torch")
