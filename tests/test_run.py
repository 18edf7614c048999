"""The run: its directory, schema, refusals, guard, alarms, views, mirrors, and several ranks."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console
from run_driver import RECIPE, arguments, begin, make_samples, parts, train

from grpo.distributed import init_distributed
from grpo.errors import UserError
from grpo.runs.record import fingerprint, last_values, open_record, read_metrics, read_run, strip_times
from grpo.runs.run import Run
from grpo.runs.watch import View, alarms, format_line


def start(directory: Path, **options):
    return begin(arguments(run_dir=directory), **options)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------- metrics.jsonl


def test_a_line_is_the_schema(tmp_path):
    run = start(tmp_path / "run")
    with run.phase("generate"):
        time.sleep(0.02)
    with run.phase("generate"):
        time.sleep(0.02)
    run.log(1, {"reward": torch.tensor(0.5, requires_grad=True), "kl": float("nan"), "x": float("inf"), "tokens": 80})
    run.log(2, {"reward": 1, "none": None})
    first, second = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    times = first.pop("times")
    assert first == {"schema": 1, "step": 1, "reward": 0.5, "kl": None, "x": None, "tokens": 80, "skipped_steps": 0}
    assert set(times) == {"seconds", "seconds/generate", "tokens_per_second", "memory_gib", "clock"}
    assert 0.04 <= times["seconds/generate"] <= times["seconds"]
    assert 0.05 < times["memory_gib"] < 100
    assert times["tokens_per_second"] == pytest.approx(80 / times["seconds"], rel=0.01)
    assert set(second["times"]) == {"seconds", "memory_gib", "clock"}  # phases belong to one line
    assert strip_times(second) == {"schema": 1, "step": 2, "reward": 1, "none": None, "skipped_steps": 0}
    assert run.history == read_metrics(tmp_path / "run/metrics.jsonl")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"times": 1.0}, "'times': the name is reserved"),
        ({"step": 1.0}, "'step': the name is reserved"),
        ({"a": "text"}, "metric 'a' is not a number"),
        ({"a": torch.zeros(2)}, "metric 'a' is not a number"),
    ],
)
def test_a_metric_that_cannot_be_written_is_named(tmp_path, metrics, message):
    run = start(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run.log(1, metrics)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == b""


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"schema": 2, "step": 1}\n')
    with pytest.raises(UserError, match=r"m\.jsonl: schema 2 is not 1"):
        read_metrics(tmp_path / "m.jsonl")


def test_a_line_after_the_end_is_refused(tmp_path):
    run = train(arguments(run_dir=tmp_path / "run", steps=1))
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="the run has ended; log within the loop"):
        run.log(1, {"late": 1.0})
    assert contents(tmp_path) == before


def test_the_last_value_of_a_metric_is_a_number():
    history = [{"schema": 1, "step": 1, "kl": 0.5, "loss": None}, {"schema": 1, "step": 2, "kl": None, "loss": None}]
    assert last_values(history) == {"schema": 1, "step": 2, "kl": 0.5}


# ------------------------------------------------------------------------------------------------- the directory


@pytest.mark.parametrize("empty", [True, False])
def test_a_directory_that_exists_is_never_touched(tmp_path, empty):
    target = tmp_path / "run"
    target.mkdir()
    if not empty:
        (target / "thesis.tex").write_text("all of it")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"--run-dir {target} exists.*choose another name.*--resume {target}"):
        start(target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(UserError, match=rf"--run-dir {file} exists, and nothing is overwritten: choose another name$"):
        start(file)
    with pytest.raises(UserError, match=rf"--run-dir {file}/run: .*File exists"):
        start(file / "run")
    assert file.read_text() == "mine"


def test_default_names_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [begin(arguments(seed=3)).directory.as_posix() for _ in range(3)]
    assert names[0].startswith("runs/run_driver-20")
    assert names[0].endswith("-3")
    assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"save_every": -1}, "--save-every -1"),
        ({"track": "paper"}, "--track paper: no such tracker"),
        ({"resume": Path("a"), "run_dir": Path("b")}, "--resume a and --run-dir b name two runs"),
        ({"resume": Path("nowhere"), "run_dir": None}, "nowhere holds no run"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_made(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        begin(arguments(**{"run_dir": Path("run"), **change}))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_cannot_write_one_run(tmp_path):
    run = start(tmp_path / "run")
    with pytest.raises(UserError, match=rf"process {os.getpid()} is writing this run; stop it first"):
        begin(arguments(resume=tmp_path / "run"))
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, str(tmp_path / "run/.lock")]
    assert b"BlockingIOError" in subprocess.run(command, capture_output=True, check=False).stderr
    run.record.close()
    assert subprocess.run(command, check=False).returncode == 0
    begin(arguments(resume=tmp_path / "run"))  # a dead process holds nothing


def test_run_json_says_what_the_run_was_made_of(tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", str(repository), *who, *words], check=True, capture_output=True, text=True)

    recipe = repository / "recipe.py"
    recipe.write_text("first = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    open_record(arguments(run_dir=tmp_path / "clean", learning_rate=0.25), recipe=recipe)
    run = read_run(tmp_path / "clean")
    assert run["git"] == {"commit": git("rev-parse", "HEAD").stdout.strip(), "dirty": []}
    assert not (tmp_path / "clean/git.diff").exists()
    assert run["args"] == {
        "steps": 6, "learning_rate": 0.25, "lora_alpha": 32, "seed": 0, "run_dir": str(tmp_path / "clean"),
        "resume": None, "eval_every": 50, "save_every": 2, "track": "none",
    }  # fmt: skip
    assert run["versions"]["torch"] == torch.__version__
    assert run["recipe"] == "recipe.py"
    assert run.keys() == {
        "schema", "id", "recipe", "command", "args", "seed", "started", "git", "versions", "device", "processes",
        "inputs",
    }  # fmt: skip
    recipe.write_text("second = 2\n")
    open_record(arguments(run_dir=tmp_path / "dirty"), recipe=str(recipe))
    assert read_run(tmp_path / "dirty")["git"]["dirty"] == [" M recipe.py"]
    assert "-first = 1\n+second = 2\n" in (tmp_path / "dirty/git.diff").read_text()


class Pair(NamedTuple):
    question: str
    ground_truth: str


def test_inputs_are_fingerprinted_and_must_not_change(tmp_path):
    examples = [Pair("q", "1"), Pair("r", "2")]
    data, moved = tmp_path / "data.jsonl", tmp_path / "elsewhere" / "data.jsonl"
    moved.parent.mkdir()
    for path in (data, moved):
        path.write_text("a\n")
    start(tmp_path / "run", inputs={"train": examples, "file": data, "adapter": None}).record.close()
    inputs = read_run(tmp_path / "run")["inputs"]
    assert inputs["train"]["items"] == 2
    assert inputs["adapter"] == {"sha256": "none"}
    assert fingerprint(examples) != fingerprint([*examples[:1], Pair("r", "3")])

    def resume(**changed):
        given = {"train": examples, "file": moved, "adapter": None, **changed}
        begin(arguments(resume=tmp_path / "run"), inputs=given).record.close()

    resume()
    before = contents(tmp_path / "run")
    data.write_text("b\n")
    for changed, message in (
        ({"file": data}, r"file has changed since the run began \(\w{12} then, \w{12} now"),
        ({"adapter": data}, r"adapter has changed since the run began \(none then, \w{12} now"),
        ({"file": None}, r"file has changed since the run began \(\w{12} then, none now"),
    ):
        with pytest.raises(UserError, match=message):
            resume(**changed)
    assert contents(tmp_path / "run") == before
    resume()  # the lock is free


def test_an_input_that_is_not_there_leaves_no_directory(tmp_path):
    with pytest.raises(UserError, match=r"weights: no such file or folder"):
        start(tmp_path / "run", inputs={"model": tmp_path / "weights"})
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_is_told_by_its_size_its_beginning_and_its_end(tmp_path):
    found = []
    for place, value in ((None, 0), (0, 1), (65 * 2**20 - 1, 1)):
        with open(tmp_path / "weights", "wb") as file:
            file.truncate(65 * 2**20)
            if place is not None:
                file.seek(place)
                file.write(bytes([value]))
        found.append(fingerprint(tmp_path / "weights")["sha256"])
    assert len(set(found)) == 3


# -------------------------------------------------------------------------------------------------------- resuming


def test_resuming_with_other_arguments_is_noted_and_another_recipe_refused(tmp_path, capsys):
    train(arguments(run_dir=tmp_path / "run", steps=2))
    args = arguments(resume=tmp_path / "run", steps=2, learning_rate=0.5)
    record = open_record(args, recipe=RECIPE)
    assert "with another learning_rate: 0.1 until now, 0.5 from step 3" in capsys.readouterr().out
    assert "resumed" not in read_run(tmp_path / "run")
    Run(record, *parts(args))
    assert read_run(tmp_path / "run")["resumed"][0]["changed"] == {"learning_rate": [0.1, 0.5]}
    record.close()
    with pytest.raises(UserError, match=r"that is a run of run_driver\.py, this is other\.py"):
        open_record(arguments(resume=tmp_path / "run"), recipe="other.py")


def test_a_resume_that_fails_before_it_restores_has_lost_nothing(tmp_path):
    directory = tmp_path / "run"
    train(arguments(run_dir=directory, steps=5))  # the last checkpoint is that of step 5
    shutil.rmtree(directory / "checkpoints" / "step-000005")
    before = contents(directory)
    args = arguments(resume=directory, steps=7)
    record = open_record(args, recipe=RECIPE)
    assert [line["step"] for line in record.history] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"weight is \[2, 4\], the model's is \[2, 3\]; take the model"):
        Run(record, torch.nn.Linear(3, 2), *parts(args)[1:])
    record.close()
    assert contents(directory) == before
    assert train(args).start_step == 4
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_finished_run_that_goes_on_is_no_longer_finished(tmp_path):
    train(arguments(run_dir=tmp_path / "run", steps=2))
    ends = {"finished", "results", "best_checkpoint"}
    assert ends <= read_run(tmp_path / "run").keys()
    args = arguments(resume=tmp_path / "run", steps=4)
    record = open_record(args, recipe=RECIPE)
    assert ends <= read_run(tmp_path / "run").keys()  # nothing is lost before the resume is sure to take place
    Run(record, *parts(args))
    assert not ends & read_run(tmp_path / "run").keys()
    record.close()
    train(args)
    assert read_run(tmp_path / "run")["results"]["step"] == 4


def test_what_the_adapter_was_trained_with_cannot_change(tmp_path):
    train(arguments(run_dir=tmp_path / "run", steps=2))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"--lora-alpha 640: the run was begun with 32.*start a new run"):
        begin(arguments(resume=tmp_path / "run", steps=3, lora_alpha=640))
    assert contents(tmp_path) == before
    train(arguments(resume=tmp_path / "run", steps=3))  # and the lock is free


def test_changed_arguments_are_the_run_s_own_from_the_next_checkpoint_on(tmp_path):
    directory = tmp_path / "run"
    train(arguments(run_dir=directory, steps=2))
    begin(arguments(resume=directory, steps=9)).record.close()  # comes to no checkpoint
    assert read_run(directory)["args"]["steps"] == 2
    train(arguments(resume=directory, steps=3, learning_rate=0.5))
    assert [read_run(directory)["args"][name] for name in ("steps", "learning_rate")] == [3, 0.5]


def test_fewer_steps_than_are_done_and_lost_metrics_are_refused(tmp_path):
    train(arguments(run_dir=tmp_path / "run", steps=2))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--steps 1: the run has done 2 already"):
        begin(arguments(resume=tmp_path / "run", steps=1))
    assert contents(tmp_path) == before
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than at the checkpoint of step 2"):
        begin(arguments(resume=tmp_path / "run"))


def test_lines_and_completions_after_the_checkpoint_go(tmp_path):
    train(arguments(run_dir=tmp_path / "run", steps=3), completions_every=1)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000003")
    begin(arguments(resume=tmp_path / "run", steps=3))
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]
    names = sorted(p.name for p in (tmp_path / "run/completions").iterdir())
    assert names == ["train-000001.jsonl", "train-000002.jsonl"]


@pytest.mark.parametrize(("every", "evaluated", "saved"), [(2, [2, 4, 5], [2, 4, 5]), (0, [5], [5])])
def test_evaluations_and_checkpoints_come_when_they_are_due(tmp_path, every, evaluated, saved):
    asked = []
    args = arguments(run_dir=tmp_path / "run", steps=5, eval_every=every, save_every=every)
    train(args, at_step=lambda run, step: asked.append(run.evaluates(step)))
    assert [step for step, due in enumerate(asked, 1) if due] == evaluated
    assert sorted(int(p.name[-6:]) for p in (tmp_path / "run/checkpoints").iterdir()) == saved


def test_a_checkpoint_is_scored_by_the_evaluation_of_its_own_step(tmp_path):
    """Not by an older one, which would pass a policy off as the best that was never evaluated."""
    run = begin(arguments(run_dir=tmp_path / "run", save_every=1), keep=1)
    for step in run.steps(4):
        run.log(step, {"reward": 0.0, "eval/pass_at_1": 0.5} if step == 2 else {"reward": 0.0})
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert read_run(tmp_path / "run")["best_checkpoint"] == "step-000002"


# ------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_while_logging_says_how_to_go_on(tmp_path):
    run = start(tmp_path / "run")
    run.record._metrics = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (every write to it fails)
    with pytest.raises(UserError, match=rf"No space left.*free some space, then continue with --resume {tmp_path}/run"):
        run.log(1, {"reward": 1.0})
    assert run.history == []


@pytest.fixture
def full_disk(monkeypatch):
    """A function: from now on files whose path contains the text do not fit."""
    genuine = Path.write_bytes

    def fill(text: str) -> None:
        def write_bytes(path: Path, data: bytes) -> int:
            if text in str(path):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return genuine(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return fill


def test_a_full_disk_while_saving_is_reported_and_the_run_goes_on(tmp_path, full_disk, capsys):
    full_disk("step-000004")
    train(arguments(run_dir=tmp_path / "run", steps=5))
    assert "not written: checkpoint of step 4" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000002", "step-000005"]


def test_a_full_disk_at_the_end_says_how_to_go_on(tmp_path, full_disk, monkeypatch):
    full_disk("tmp-adapter")
    with pytest.raises(UserError, match=rf"adapter: No space left.*continue with --resume {tmp_path}/run"):
        train(arguments(run_dir=tmp_path / "run", steps=2))
    monkeypatch.undo()
    # As a new process would find it: the failed run's lock went with its process.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert train(arguments(resume=tmp_path / "copy", steps=2)).start_step == 2
    assert (tmp_path / "copy/adapter/adapter_model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------- guard


class Batch(NamedTuple):
    ids: torch.Tensor
    parts: list[tuple[torch.Tensor, str, None]]
    scale: np.float64
    function: type


def test_nan_and_infinity_skip_the_step_keep_the_batch_and_stop_in_the_end(tmp_path):
    run = start(tmp_path / "run", max_nonfinite=3)
    batch = Batch(torch.arange(3), [(torch.ones(2, requires_grad=True), "text", None)], np.float64(0.5), dict)
    assert run.guard_finite(1, torch.tensor(1.0), 2.0, batch)
    assert not run.guard_finite(2, torch.tensor(float("nan")), 2.0, batch)
    assert not run.guard_finite(3, 1.0, torch.tensor(float("inf")), batch)
    assert run.guard_finite(4, 1.0, 1.0, batch)  # in a row: counted anew
    assert not run.guard_finite(5, 1.0, float("-inf"), batch)
    assert not run.guard_finite(6, 1.0, float("nan"))
    run.log(6, {})
    assert run.history[-1]["skipped_steps"] == 4
    with pytest.raises(RuntimeError, match=r"in 3 steps in a row; the batches are in .*nonfinite"):
        run.guard_finite(7, 1.0, float("nan"), batch)
    names = sorted(p.name for p in (tmp_path / "run/nonfinite").iterdir())
    assert names == [f"step-{step:06d}-rank-0.pt" for step in (2, 3, 5, 6, 7)]
    kept = torch.load(tmp_path / "run/nonfinite/step-000003-rank-0.pt", weights_only=True)
    assert (kept["loss"], kept["grad_norm"]) == (1.0, float("inf"))
    assert kept["batch"].pop("ids").tolist() == [0, 1, 2]
    assert kept["batch"]["parts"][0].pop(0).tolist() == [1, 1]
    assert kept["batch"] == {"parts": [["text", None]], "scale": 0.5, "function": "type"}


def test_skips_survive_a_resume(tmp_path):
    def fail(run, step):
        run.guard_finite(step, float("nan"), 1.0)
        run.guard_finite(step, float("nan"), 1.0)

    train(arguments(run_dir=tmp_path / "run", steps=1), at_step=fail, max_nonfinite=3)
    run = begin(arguments(resume=tmp_path / "run"), max_nonfinite=3)
    assert run.skipped_steps == 2
    with pytest.raises(RuntimeError, match="in 3 steps in a row"):
        run.guard_finite(2, float("nan"), 1.0)


# ----------------------------------------------------------------------------------------------------- completions


class Tokenizer:
    def decode(self, ids):
        return f"<user>{bytes(ids).decode()}"


def test_completions_are_kept_with_rewards_and_advantages(tmp_path):
    run = start(tmp_path / "run", completions_every=4)
    run.tokenizer = Tokenizer()
    samples = make_samples(["p", "q"], ["a", "b", "c", "é\n"])
    rewards = {"correct": [1.0, 0.0, None, float("nan")], "format": [1, 1, TimeoutError("left out"), 0]}
    for step in (1, 2, 4):
        run.save_completions(step, samples, rewards, torch.tensor([[1.0, -1.0], [0.0, 0.5]]))
    run.tokenizer = None
    run.save_completions(2, make_samples(["p"], ["z"]), {"correct": [1.0]}, split="eval")
    folder = tmp_path / "run/completions"
    found = {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in folder.iterdir()}
    assert found.keys() == {"eval-000002.jsonl", "train-000001.jsonl", "train-000004.jsonl"}
    assert found["eval-000002.jsonl"] == [
        {"prompt": "p", "completion": "z", "rewards": {"correct": 1.0}, "advantage": None}
    ]
    lines = found["train-000004.jsonl"]
    assert [line["advantage"] for line in lines] == [1.0, -1.0, 0.0, 0.5]
    assert lines[1] == {
        "prompt": "<user>p", "completion": "b", "rewards": {"correct": 0.0, "format": 1}, "advantage": -1.0,
    }  # fmt: skip
    assert lines[2]["rewards"] == {"correct": None, "format": None}
    assert lines[3] == {
        "prompt": "<user>q", "completion": "é\n", "rewards": {"correct": None, "format": 0}, "advantage": 0.5,
    }  # fmt: skip


def test_columns_that_do_not_fit_the_completions_are_refused(tmp_path):
    run, samples = start(tmp_path / "run"), make_samples(["p"], ["a", "b"])
    with pytest.raises(ValueError, match="correct has 1 entries for 2 completions"):
        run.save_completions(1, samples, {"correct": [1.0]})
    with pytest.raises(ValueError, match="advantages has 3 entries for 2 completions"):
        run.save_completions(1, samples, {}, torch.zeros(3))


# ---------------------------------------------------------------------------------------------------------- alarms


def history(count: int, **metrics):
    """`count` lines; a metric is a number or a function of the step."""
    return [
        {"step": s, "skipped_steps": 0, **{n: v(s) if callable(v) else v for n, v in metrics.items()}}
        for s in range(count)
    ]


def test_a_healthy_run_raises_no_alarm():
    lines = history(
        100, reward=lambda s: s / 100, kl=lambda s: s / 1000, length=lambda s: 100 + s, truncated=0.1,
        zero_variance=0.4, entropy=0.3, mismatch_mean=0.01,
    )  # fmt: skip
    assert alarms(lines) == {}
    assert alarms([]) == {}


@pytest.mark.parametrize(
    ("name", "bad", "good", "says"),
    [
        ("zero_variance", 0.95, 0.85, "raise --group-size"),
        ("kl", 0.6, 0.4, "lower --learning-rate or raise --beta"),
        ("truncated", 0.6, 0.4, "raise --max-completion-tokens"),
        ("entropy", 0.005, 0.02, "raise --epsilon-high"),
        ("mismatch_mean", 0.2, 0.05, "the engine has the newest adapter"),
        ("length", lambda s: 90.0 - 3 * s, lambda s: 90.0 - s, "earned without reasoning"),
        ("length", lambda s: 10.0 + 5 * s, lambda s: 40.0 + 2 * s, "dr_grpo or dapo"),
        ("reward", lambda s: min(s, 30 - s) / 15, lambda s: min(s, 10) / 15, "go back to the best checkpoint"),
    ],
)
def test_each_alarm_names_its_observation_and_a_remedy(name, bad, good, says):
    found = alarms(history(30, **{name: bad}))
    assert list(found) == [name]
    assert says in found[name]
    assert alarms(history(30, **{name: good})) == {}
    if not callable(bad):
        assert alarms(history(9, **{name: bad})) == {}  # too early to tell
        assert alarms(history(30, **{name: lambda s: bad if s == 29 else good})) == {}  # one odd step


def test_an_alarm_is_said_once_until_it_is_over(tmp_path, capsys):
    run = start(tmp_path / "run")
    for step in range(1, 41):
        run.log(step, {"kl": 0.0 if 15 < step <= 28 else 0.7})
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1] for line in said] == [" step 10", " step 36"]


# ----------------------------------------------------------------------------------------------------------- views

LINE = {
    "step": 3, "reward": 0.25, "pass_at_1": 0.5, "kl": None, "skipped_steps": 0, "unknown": 1.0,
    "times": {"seconds": 2.5, "seconds/generate": 1.5, "tokens_per_second": 1234.4, "memory_gib": 7.25, "clock": 1.0},
}  # fmt: skip


def test_without_a_terminal_the_view_is_plain_lines(tmp_path, capsys):
    train(arguments(run_dir=tmp_path / "run", steps=2))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "step 2/2  reward -" in out


def test_the_cells_of_a_line():
    assert format_line(LINE) == {
        "reward": "0.250", "pass@1": "0.500", "tok/s": "1234", "seconds": "2.5 (generate 1.5)", "GiB": "7.2",
    }  # fmt: skip
    assert format_line({**LINE, "skipped_steps": 2})["skipped"] == "2"


def test_on_a_terminal_the_view_is_live():
    console = Console(file=StringIO(), force_terminal=True, width=100)
    with View("name", 10, 0, console) as view:
        view.show(LINE)
        view.show({**LINE, "step": 4, "reward": 0.75})
    out = console.file.getvalue()
    assert "\x1b[" in out  # redrawn in place
    last = out[out.rindex("reward") :]
    assert "0.750" in last
    assert "1234" in last
    assert "4/10" in last


# --------------------------------------------------------------------------------------------------------- mirrors


def test_tensorboard_gets_every_number(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(arguments(run_dir=tmp_path / "run", steps=2, track="tensorboard"))
    events = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    for name in ("reward", "lr"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in lines if name in line
        ]
    assert "times/seconds" in events.Tags()["scalars"]


def test_tensorboard_has_the_steps_of_a_resumed_run_once(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(arguments(run_dir=tmp_path / "run", steps=5, track="tensorboard"))
    shutil.rmtree(tmp_path / "run/checkpoints/step-000005")
    train(arguments(resume=tmp_path / "run", steps=6, track="tensorboard"))
    events = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("reward")] == [1, 2, 3, 4, 5, 6]


def test_wandb_gets_every_number_and_continues_one_run_after_a_resume(tmp_path, monkeypatch):
    """Against a recording of the calls; `WANDB_MODE=offline` was run by hand, see docs/runs.md."""
    calls: list[tuple] = []

    class Wandb:
        def init(self, **settings):
            calls.append(("init", settings["id"], settings["resume"], settings["config"]["steps"]))
            return self

        def define_metric(self, name, step_metric):
            calls.append(("define", name, step_metric))

        def log(self, metrics):
            calls.append(("log", metrics))

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    run = begin(arguments(run_dir=tmp_path / "run", track="wandb"))
    run.log(1, {"reward": 0.5, "kl": float("nan")})
    run.record.close()
    run = begin(arguments(resume=tmp_path / "run", track="wandb"))
    run_id = calls[0][1]
    assert calls[:2] == [("init", run_id, "allow", 6), ("define", "*", "step")]
    logged = calls[2][1]
    assert {name: value for name, value in logged.items() if not name.startswith("times/")} == {
        "step": 1, "reward": 0.5, "skipped_steps": 0,
    }  # fmt: skip
    assert "times/seconds" in logged
    assert calls[3:] == [("finish",), ("init", run_id, "allow", 6), ("define", "*", "step")]
    run.record.close()
    begin(arguments(run_dir=tmp_path / "other/run", track="wandb"))  # as on another machine
    assert calls[-2][1] != run_id


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--track wandb needs a package: pip install wandb"):
        begin(arguments(run_dir=tmp_path / "run", track="wandb"))


def test_wandb_s_refusal_is_an_error_of_ours(tmp_path, monkeypatch):
    class Wandb:
        Error = OSError

        def init(self, **_):
            raise self.Error("Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"--track wandb: Use `wandb login` to log in\. Or set WANDB_MODE=offline"):
        begin(arguments(run_dir=tmp_path / "run", track="wandb"))


def test_a_tracker_that_cannot_begin_leaves_the_directory_s_name_free(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no API key")

    monkeypatch.setattr("grpo.runs.record.open_tracker", refuse)
    with pytest.raises(RuntimeError, match="no API key"):
        start(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- several ranks


def thread_names(*parts: str) -> list[str]:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it ended meanwhile
            names.append(path.read_text().strip())
    return [name for name in names if any(part in name for part in parts)]


def rank_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    world = init_distributed()
    directory = Path(folder, "run")

    def signal_one_rank(run, step):
        if step == 3 and rank == 1:
            run._signal = 15  # a scheduler's SIGTERM that reached one process only

    with pytest.raises(SystemExit):
        train(arguments(run_dir=directory), world=world, at_step=signal_one_rank)
    run = train(arguments(resume=directory), world=world)
    assert run.start_step == 3
    assert run.directory == directory
    assert run.record.writes == (rank == 0)
    with pytest.raises(ValueError, match="exists"):  # told to both ranks, so that neither waits
        begin(arguments(run_dir=directory), world=world)
    assert not run.guard_finite(1, float("nan") if rank == 1 else 0.0, 1.0)  # agreed on
    torch.distributed.destroy_process_group()  # as at exit: what holds the group keeps threads that can abort the exit
    deadline = time.monotonic() + 20  # a thread that has been joined stays in /proc a moment longer
    while names := thread_names("gloo", "store"):
        assert time.monotonic() < deadline, names
    Path(folder, f"done-{rank}").touch()


def test_two_ranks_write_one_run_and_stop_together(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_of_two, args=(port, str(tmp_path)), nprocs=2)
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(7))
    assert [p.name for p in (tmp_path / "run/nonfinite").iterdir()] == ["step-000001-rank-1.pt"]
