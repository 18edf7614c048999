import importlib.util
from dataclasses import dataclass

import pytest
import torch

from grpo.batch import step_counts
from grpo.runs.cli import check_args, user_errors
from grpo.tasks.data import load_examples


@dataclass
class Args:
    steps: int = 1
    group_size: int = 2
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    engine: str = "torch"


def test_check_args_names_flag_and_least():
    check_args(Args())
    with pytest.raises(ValueError, match="--steps 0 is too small: at least 1"):
        check_args(Args(steps=0))
    with pytest.raises(ValueError, match="--group-size 1 is too small: at least 2"):
        check_args(Args(group_size=1))
    with pytest.raises(ValueError, match="--learning-rate nan must be above 0"):
        check_args(Args(learning_rate=float("nan")))
    with pytest.raises(ValueError, match="--learning-rate inf must be above 0, and finite"):
        check_args(Args(learning_rate=float("inf")))
    with pytest.raises(ValueError, match="--warmup-steps -1 is too small"):
        check_args(Args(warmup_steps=-1))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_check_args_wants_vllm_before_weights_are_read():
    check_args(Args(engine="auto"))
    with pytest.raises(ValueError, match="--engine vllm: vLLM is not installed"):
        check_args(Args(engine="vllm"))


@dataclass
class Overlong:
    overlong_buffer: int
    max_completion_tokens: int = 8


def test_check_args_compares_fields():
    check_args(Overlong(8))
    for buffer in (0, 9):
        with pytest.raises(ValueError, match=f"--overlong-buffer {buffer} must lie in 1..8"):
            check_args(Overlong(buffer))


@dataclass
class Prompts:
    prompts_per_step: int


def test_check_args_counts_processes(monkeypatch):
    check_args(Prompts(3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_args(Prompts(4))
    with pytest.raises(ValueError, match="--prompts-per-step 3 must be a multiple of the 2 processes"):
        check_args(Prompts(3))


def test_our_errors_are_one_line(capsys):
    with pytest.raises(SystemExit, match="2"), user_errors():
        load_examples("/no/such/file.jsonl")
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "/no/such/file.jsonl" in error


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"), user_errors():
        int("x")  # raised by a built-in, not by a raise of ours
    with pytest.raises(RuntimeError), user_errors():
        torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(TypeError), user_errors():
        step_counts(3)  # type: ignore[arg-type]
