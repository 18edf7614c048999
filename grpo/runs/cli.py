"""What every recipe's command line has in common: checks before anything expensive, and errors in one line."""

import contextlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.errors import flag

_AT_LEAST = {
    "steps": (1, "optimizer steps to do"),
    "group_size": (2, "an answer is compared with its group's mean, so a group needs two"),
    "prompts_per_step": (1, "questions a step"),
    "num_iterations": (1, "optimizer steps on one batch"),
    "max_prompt_tokens": (1, "tokens of the longest prompt"),
    "max_completion_tokens": (1, "tokens an answer may take"),
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


def check_args(args: Any) -> None:
    """Raise ValueError for a number that cannot work, naming the flag and the least that does. Only the fields that
    the recipe has are looked at."""
    for field, (least, why) in _AT_LEAST.items():
        value = getattr(args, field, least)
        if value is not None and value < least:
            raise ValueError(f"{flag(field)} {value} is too small: at least {least} ({why})")
    buffer, limit = getattr(args, "overlong_buffer", None), getattr(args, "max_completion_tokens", None)
    if buffer is not None and limit is not None and not 1 <= buffer <= limit:
        raise ValueError(f"--overlong-buffer {buffer} must lie in 1..{limit}, the --max-completion-tokens")
    if (prompts := getattr(args, "prompts_per_step", None)) is not None:
        check_prompts_per_step(prompts, int(os.environ.get("WORLD_SIZE", 1)))  # torchrun's
    for field in _ABOVE_ZERO:
        value = getattr(args, field, 1.0)
        if not 0 < value < math.inf:
            raise ValueError(f"{flag(field)} {value} must be above 0, and finite")
    if getattr(args, "engine", None) == "vllm":
        check_vllm_installed()


def check_prompts_per_step(prompts_per_step: int, processes: int) -> None:
    """Raise ValueError where the questions of a step cannot be shared among the processes."""
    if prompts_per_step < 1 or prompts_per_step % processes:
        raise ValueError(
            f"--prompts-per-step {prompts_per_step} must be a multiple of the {processes} processes, and above 0"
        )


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def check_vllm_installed() -> None:
    """Raise ValueError, naming the flag, where --engine vllm cannot be had."""
    if not vllm_installed():
        raise ValueError("--engine vllm: vLLM is not installed; pip install -e '.[vllm]', or take --engine torch")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the program with one line for a ValueError, or a full disk, that this project raised on purpose: it names
    the field and the remedy, and a traceback would only hide that. Whatever another library raises, and whatever
    else goes wrong, keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(frame.filename)
        ours = file.is_relative_to(Path(__file__).parent.parent.parent) and not {"site-packages", ".venv"} & {
            *file.parts
        }
        if not (ours and (frame.line or "").startswith("raise ")):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
