"""A run that is killed, interrupted or signalled and resumed is, times aside, the run that never was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_model
from run_driver import arguments, train

from grpo.runs.record import read_metrics, strip_times


def outcome(directory: Path) -> tuple[list[dict], bytes, dict[str, bytes]]:
    """What must be equal: metrics without times, the adapter's bytes, the completions kept."""
    lines = [strip_times(line) for line in read_metrics(directory / "metrics.jsonl")]
    completions = {p.name: p.read_bytes() for p in (directory / "completions").iterdir()}
    return lines, (directory / "adapter/adapter_model.safetensors").read_bytes(), completions


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    train(arguments(run_dir=directory))
    return outcome(directory)


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(uninterrupted, tmp_path):
    train(arguments(run_dir=tmp_path / "again"))
    train(arguments(run_dir=tmp_path / "other", seed=1))
    assert outcome(tmp_path / "again") == uninterrupted
    assert outcome(tmp_path / "other")[:2] != uninterrupted[:2]


def drive(what: str, directory: Path, *numbers: int) -> str:
    """Run tests/run_driver.py as a program."""
    words = [what, str(directory), *map(str, numbers)]
    command = [sys.executable, str(Path(__file__).with_name("run_driver.py")), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(("what", "kills"), [("stub", 12), ("recipe", 6)])
def test_sigkills_at_random_moments(what, kills, tmp_path):
    if what == "recipe":
        write_model(tmp_path / "model")
        drive(what, tmp_path / "whole", 0)
    else:
        train(arguments(run_dir=tmp_path / "whole", steps=90, save_every=3))
    assert f"killed {kills} times" in drive(what, tmp_path / "killed", kills)
    lines, adapter, completions = outcome(tmp_path / "killed")
    assert (lines, adapter, completions) == outcome(tmp_path / "whole")
    assert len({line["reward"] for line in lines if "reward" in line}) > 1
    assert not list((tmp_path / "killed").rglob("*tmp*"))


def test_a_kill_before_a_file_operation(tmp_path):
    """Before every 7th; GRPO_FUZZ_EXAMPLES kills before each one."""
    every = 1 if int(os.environ.get("GRPO_FUZZ_EXAMPLES", "0")) else 7
    drive("operations", tmp_path / "runs", every, 3 % every)
    train(arguments(steps=3, save_every=1, run_dir=tmp_path / "whole"))
    expected = outcome(tmp_path / "whole")
    directories = [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".tmp")]  # never a run
    assert len(directories) > 60 // every
    for directory in directories:
        assert outcome(directory) == expected, directory
        assert not list(directory.rglob("*tmp*")), directory


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves(number, uninterrupted, tmp_path):
    before = signal.getsignal(number)
    directory = tmp_path / "stopped"

    def interrupt(run, step):
        if step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stop:
        train(arguments(run_dir=directory), at_step=interrupt)
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert read_metrics(directory / "metrics.jsonl")[-1]["step"] == 3  # the step ended
    assert (directory / "checkpoints/step-000003").is_dir()  # though save_every is 2
    run = train(arguments(resume=directory))
    assert run.start_step == 3
    assert outcome(directory) == uninterrupted


def test_a_second_interrupt_stops_at_once(tmp_path):
    def interrupt(run, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(arguments(run_dir=tmp_path / "run"), at_step=interrupt)
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_exception_between_checkpoints_and_a_corrupt_one(uninterrupted, tmp_path, capsys):
    directory = tmp_path / "run"

    def fail(run, step):
        if step == 6:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(arguments(run_dir=directory), at_step=fail)
    newest = directory / "checkpoints/step-000004/training.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    run = train(arguments(resume=directory))
    assert run.start_step == 2
    assert f"checkpoint {newest.parent} is torn or corrupt: training.pt" in capsys.readouterr().out
    assert outcome(directory) == uninterrupted


def test_a_finished_run_resumed_changes_nothing_and_can_be_extended(uninterrupted, tmp_path, capsys):
    directory = tmp_path / "run"
    train(arguments(run_dir=directory, steps=4))
    capsys.readouterr()
    assert train(arguments(resume=directory, steps=4)).start_step == 4
    run = train(arguments(resume=directory, steps=6))
    assert "with another steps: 4 until now, 6 from step 5" in capsys.readouterr().out
    assert run.start_step == 4
    assert outcome(directory) == uninterrupted
