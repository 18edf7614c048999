"""What --help shows of this file, with its examples:

python tests/test_cli.py --steps 3
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import run_driver
from conftest import ROOT, load_recipe
from run_driver import arguments, train

from grpo.errors import UserError
from grpo.runs.args import flat_args, vllm_installed, with_values
from grpo.runs.cli import check_args, parse_args
from grpo.runs.record import open_record
from grpo.runs.run import RunFlags


@dataclass(frozen=True)
class Rollout:
    group_size: int = 2
    max_completion_tokens: int = 8
    temperature: float = 1.0


@dataclass(frozen=True)
class Objective:
    loss: str = "dapo"

    def check(self, num_iterations: int | None = None) -> None:
        if self.loss == f"wrong at {num_iterations}":
            raise UserError("--loss")


@dataclass(frozen=True)
class Card:
    engine: Literal["auto", "vllm"] = "auto"
    """engine that samples"""
    fused: bool | None = None
    """whether something is fused"""
    dry_run: bool = False
    """whether to stop early"""


@dataclass
class Args:
    steps: int = 1
    """number of steps"""
    prompts_per_step: int = 3
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    overlong_buffer: int = 8
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    card: Card = Card()
    run: RunFlags = RunFlags()


@dataclass
class WithIterations(Args):
    num_iterations: int = 2


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


# ------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (Args(steps=0), "--steps 0 is too small: at least 1"),
        (Args(rollout=Rollout(group_size=1)), "--group-size 1 is too small: at least 2"),
        (Args(learning_rate=float("nan")), "--learning-rate nan must be above 0"),
        (Args(learning_rate=float("inf")), "--learning-rate inf must be above 0, and finite"),
        (Args(rollout=Rollout(temperature=0)), "--temperature 0 must be above 0"),
        (Args(warmup_steps=-1), "--warmup-steps -1 is too small"),
        (Args(run=RunFlags(seed=-1)), "--seed -1 is too small"),
        (Args(overlong_buffer=0), r"--overlong-buffer 0 must lie in 1\.\.8"),
        (Args(overlong_buffer=9), r"--overlong-buffer 9 must lie in 1\.\.8"),
        (Args(objective=Objective("wrong at 1")), "--loss"),
        (WithIterations(objective=Objective("wrong at 2")), "--loss"),
    ],
)
def test_check_args_names_flag_and_least(args, message):
    check_args(Args())
    with pytest.raises(UserError, match=message):
        check_args(args)


def test_check_args_counts_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_args(Args(prompts_per_step=4))
    with pytest.raises(UserError, match="--prompts-per-step 3 must be a multiple of the 2 processes"):
        check_args(Args(prompts_per_step=3))


@pytest.mark.skipif(vllm_installed(), reason="vLLM is installed")
def test_check_args_wants_vllm_before_weights_are_read():
    with pytest.raises(UserError, match="--engine vllm: vLLM is not installed"):
        check_args(Args(card=Card(engine="vllm")))


def test_two_fields_of_one_name_are_refused():
    @dataclass
    class Twice(Args):
        seed: int = 0

    with pytest.raises(TypeError, match="two fields are named seed"):
        check_args(Twice())


# -------------------------------------------------------------------------------------------------------- parse_args


def test_flags_have_no_prefix_and_are_checked():
    words = "--steps 4 --group-size 5 --engine auto --dry-run --fused False --run-dir a/b --temperature 0.5"
    args = parse_args(Args, words.split())
    assert args == Args(
        steps=4,
        rollout=Rollout(group_size=5, temperature=0.5),
        card=Card(dry_run=True, fused=False),
        run=RunFlags(run_dir=Path("a/b")),
    )
    with pytest.raises(UserError, match="--steps 0"):
        parse_args(Args, ["--steps", "0"])


def test_help_begins_with_the_module_s_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Args, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.index("python tests/test_cli.py --steps 3") < shown.index("--steps INT") < shown.index("--resume")
    assert "random seed for the question order" in shown


def test_a_resume_begins_with_the_arguments_of_the_run(tmp_path):
    args = arguments(run_dir=tmp_path / "run", steps=2, seed=4, learning_rate=0.25, save_every=1)
    train(args)
    for words in (["--resume", str(tmp_path / "run")], [f"--resume={tmp_path / 'run'}"]):
        resumed = parse_args(run_driver.Args, words)
        assert resumed == arguments(resume=tmp_path / "run", steps=2, seed=4, learning_rate=0.25, save_every=1)
    # What a resume changes is the run's own from the next checkpoint on; the directory may have moved.
    (tmp_path / "run").rename(tmp_path / "moved")
    again = ["--resume", str(tmp_path / "moved")]
    train(parse_args(run_driver.Args, [*again, "--steps", "3"]))
    assert parse_args(run_driver.Args, [*again, "--seed", "5"]) == arguments(
        resume=tmp_path / "moved", steps=3, seed=5, learning_rate=0.25, save_every=1
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*_grpo.py")))
def test_arguments_of_a_recipe_come_back_from_json(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.py")
    args = parse_args(recipe.Args, ["--run-dir", "a", "--adapter", "b", "--gpu-memory-gib", "12"])
    assert with_values(recipe.Args(), json.loads(json.dumps(flat_args(args)))) == args


def test_every_kind_of_value_comes_back_from_run_json(tmp_path):
    words = "--steps 4 --fused True --dry-run --temperature 0.5 --eval-every 7 --run-dir".split()
    args = parse_args(Args, [*words, str(tmp_path / "run")])
    open_record(args, recipe=__file__).close()
    resumed = parse_args(Args, ["--resume", str(tmp_path / "run"), "--no-dry-run", "--fused", "None"])
    assert resumed == Args(
        steps=4, rollout=Rollout(temperature=0.5), run=RunFlags(resume=tmp_path / "run", eval_every=7)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a holds no run"),
        ("{", r"a/run\.json is not JSON .*; restore it, or start a new run"),
        ("{}", r"a/run\.json is not what a run writes: recipe and args must be in it"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is None:
        Path("a").write_text("a file")
    else:
        Path("a").mkdir()
        Path("a/run.json").write_text(text)
    for directory, expected in (("a", message), ("nowhere", "nowhere holds no run")):
        with pytest.raises(UserError, match=expected):
            parse_args(Args, ["--resume", directory])


# ---------------------------------------------------------------------------------------------------------- programs

PROGRAM = """
import sys
from grpo.errors import UserError
from grpo.runs.cli import parse_args
from grpo.runs.run import Run
from test_program import Args

try:
    args = parse_args(Args)
finally:
    late = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "triton"} & sys.modules.keys()
    assert not late, late
raise {1: UserError("--steps 1: too few"), 2: ValueError("a bug"), 3: KeyboardInterrupt()}[args.steps]
"""


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        ("--steps 1", 2, r"^error: --steps 1: too few$"),
        ("--steps 0", 2, r"^error: --steps 0 is too small: .*$"),
        ("--step 1", 2, r"Perhaps you meant"),
        ("--steps 2", 1, r"(?s)^Traceback.*ValueError: a bug$"),
        ("--steps 3", -2, r"(?s)^Traceback.*KeyboardInterrupt$"),
    ],
)
def test_a_program_shows_a_user_s_error_in_one_line(tmp_path, words, code, error):
    """And says so, as it shows its help, before anything large is imported."""
    (tmp_path / "test_program.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Args:\n    steps: int = 1\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    command = [sys.executable, "-c", PROGRAM, *words.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == code
    assert re.search(error, result.stderr.strip()), result.stderr
