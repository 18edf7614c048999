"""What a run leaves behind: its directory with run.json, metrics.jsonl and completions/, and who may write it.

    record = open_record(args, recipe=__file__, world=world, inputs={"model": args.policy.source, "train": train})

`grpo.runs.run.Run` writes through the record; `read_run` and `read_metrics` read a run again.   docs/runs.md
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from grpo.distributed import World
from grpo.errors import UserError, flag
from grpo.lazy import torch
from grpo.runs.args import check_args, flat_args
from grpo.runs.checkpoint import Checkpoint, newest_checkpoint, write_text
from grpo.runs.track import Tracker, check_tracker, open_tracker

SCHEMA = 1
"""version of the lines in metrics.jsonl; see docs/runs.md"""

_FIXED = ("lora_rank", "lora_alpha", "lora_targets", "load_in_4bit")
"""arguments that the weights of a checkpoint depend on; a resume cannot change them"""
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "vllm", "numpy", "safetensors", "grpo-recipes")


@dataclass
class Record:
    """The directory of a run, made or reopened by `open_record`. Only rank 0 writes; the record of another rank has no
    open files."""

    directory: Path
    args: Any
    """the recipe's arguments"""
    world: World
    checkpoint: Checkpoint | None = None
    """checkpoint that a resumed run goes on from; None: the run begins at step 0"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """lines of metrics.jsonl"""

    _lock: IO[str] | None = None
    _metrics: IO[bytes] | None = None
    _tracker: Tracker | None = None
    _resumed: dict[str, Any] | None = None
    """entry of this resume for run.json, until the resume is certain to take place"""
    _adopt: bool = False
    """whether the arguments of run.json are to be replaced by this resume's at the next checkpoint"""

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes (rank 0)."""
        return self.world.rank == 0

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.writes:
            print(text, flush=True)

    def cut_back(self) -> None:
        """On a resume, drop what was written after the checkpoint: it will be made again. `Run` calls this when nothing
        can be refused any more, so that a resume that fails has lost nothing."""
        if self._resumed is None:
            return
        assert self._metrics is not None
        kept_bytes = self.checkpoint.state["metrics_bytes"] if self.checkpoint else 0
        self._metrics.truncate(kept_bytes)
        self._metrics.seek(kept_bytes)
        for path in (self.directory / "completions").glob("*-*.jsonl"):
            if int(path.stem.rsplit("-", 1)[1]) > self._resumed["step"]:
                path.unlink()
        record = read_run(self.directory)
        for name in ("finished", "results", "best_checkpoint"):
            record.pop(name, None)  # they describe an end that the run has now gone beyond
        record.setdefault("resumed", []).append(self._resumed)
        self._resumed = None
        _write_run(self.directory, record)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, whole or not at all. Raises UserError with a remedy when the disk is full."""
        if not self.writes:
            return
        assert self._metrics is not None
        if self._metrics.closed:
            raise RuntimeError(f"{self.directory}: the run has ended; log within the loop over run.steps()")
        offset = self._metrics.tell()
        try:
            with self.must_fit("metrics.jsonl"):
                self._metrics.write((json.dumps(line, allow_nan=False) + "\n").encode())
                self._metrics.flush()
        except UserError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._metrics.fileno(), offset)  # no half line
            raise
        self.history.append(line)
        if self._tracker:
            self._tracker.log(flat_metrics(line))

    def sync(self) -> int:
        """Wait until the disk holds metrics.jsonl; returns its length in bytes."""
        assert self._metrics is not None
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def write_completions(self, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write completions/<name>.jsonl. A full disk is reported, and the run goes on."""
        text = "".join(json.dumps(sample) + "\n" for sample in samples)  # ASCII: some readers end a line at U+2028
        with self.may_be_missed(f"completions/{name}.jsonl"):
            folder = self.directory / "completions"
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{name}.jsonl", text)

    def update(self, **values: Any) -> None:
        """Set entries of run.json."""
        _write_run(self.directory, read_run(self.directory) | values)

    def adopt_args(self) -> None:
        """Put the arguments that a resume has changed into run.json, so that a later resume goes on with them. Called
        after a checkpoint: a resume that fails before it has one (out of memory, say) leaves the old ones."""
        if self._adopt:
            self.update(args=flat_args(self.args))
            self._adopt = False

    @contextlib.contextmanager
    def must_fit(self, what: str) -> Iterator[None]:
        """Turn a failure to write a file that the run cannot do without into a UserError that says how to go on."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.directory / what}: {error.strerror or error}: free some space, then continue with "
                f"--resume {self.directory}"
            ) from error

    @contextlib.contextmanager
    def may_be_missed(self, what: str) -> Iterator[None]:
        """Report a full disk and go on: the run can do without what is written here."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.say(f"warning: not written: {what}: {error.strerror} in {self.directory}; free some space")

    def close(self) -> None:
        """End the tracker, and release the directory for other processes."""
        if self._tracker:
            self._tracker.close()
            self._tracker = None
        for file in (self._metrics, self._lock):
            if file:
                file.close()


# ---------------------------------------------------------------------------------------------- making and reopening


def open_record(
    args: Any, *, recipe: str | Path, world: World | None = None, inputs: Mapping[str, Any] | None = None
) -> Record:
    """Make or reopen the run directory, lock it, write run.json, and seed the generators of Python, NumPy and torch.
    Call it before anything large is loaded. The files of a resumed run are not cut back here: see `Record.cut_back`.

    args: the recipe's arguments, with `steps` and the group `run` (`grpo.runs.run.RunFlags`).
    recipe: the recipe's file. Without --run-dir the directory is runs/<recipe>-<date>-<seed>, numbered if it exists.
    inputs: what the run is made of, by name, see `fingerprint`. A resume is refused where one has changed.
    Raises UserError, on every rank, for arguments that cannot work, a directory that exists, and a run that cannot be
    resumed or that another process is writing."""
    world = world or World()
    flags = args.run
    check_args(args)
    check_tracker(flags.track)
    if flags.resume and flags.run_dir and Path(flags.resume).resolve() != Path(flags.run_dir).resolve():
        raise UserError(f"--resume {flags.resume} and --run-dir {flags.run_dir} name two runs; give one of them")
    record: Record | None = None
    problem: str | None = None
    if world.rank == 0:
        try:
            record = (_reopen if flags.resume else _create)(args, Path(recipe), world, inputs or {})
        except UserError as error:  # told to every rank, because the others wait
            problem = str(error)
        except OSError as error:
            where = f"--resume {flags.resume}" if flags.resume else f"--run-dir {flags.run_dir or 'runs'}"
            problem = f"{where}: {error}"
    shared: list[Any] = [problem, record.directory if record else None, record.checkpoint if record else None]
    if world.size > 1:
        torch.distributed.broadcast_object_list(shared, src=0, device=world.device)
    problem, directory, checkpoint = shared
    if problem is not None:
        raise UserError(problem)
    _seed(flags.seed)
    return record or Record(directory, args, world, checkpoint)


def _seed(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _create(args: Any, recipe: Path, world: World, inputs: Mapping[str, Any]) -> Record:
    flags = args.run
    if flags.run_dir is not None:
        wanted = [Path(flags.run_dir)]
    else:
        name = f"{recipe.stem}-{datetime.date.today()}-{flags.seed}"
        wanted = [Path("runs") / (f"{name}-{n}" if n > 1 else name) for n in range(1, 1000)]
    # The directory is made under another name and then renamed: one that exists always has its run.json, and two
    # processes cannot take the same name.
    parent = wanted[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".tmp-{wanted[0].name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        lock = _lock(temporary)
        git, diff = _git_state(recipe.resolve().parent)
        if diff:
            write_text(temporary / "git.diff", diff)
        run = {
            "schema": SCHEMA,
            "id": secrets.token_hex(8),  # for the tracker: two machines may give a directory the same name
            "recipe": recipe.name,
            "command": " ".join(["python", *sys.argv]),
            "args": flat_args(args),
            "seed": flags.seed,
            "started": now(),
            "git": git,
            **_machine(world),
            "inputs": {name: fingerprint(value) for name, value in inputs.items()},
        }
        _write_run(temporary, run)
        metrics = open(temporary / "metrics.jsonl", "ab")  # noqa: SIM115 (closed by Record.close)
        for directory in wanted:
            if directory.exists():
                continue
            try:
                temporary.rename(directory)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                continue
            record = Record(directory, args, world, _lock=lock, _metrics=metrics)
            try:
                record._tracker = open_tracker(flags.track, directory, run["args"], run_id=run["id"])
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)  # nothing has run in it, so its name is free again
                raise
            record.say(f"run directory: {directory}")
            return record
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
    remedy = f", or continue it with --resume {wanted[0]}" if wanted[0].is_dir() else ""
    raise UserError(f"--run-dir {wanted[0]} exists, and nothing is overwritten: choose another name{remedy}")


def _reopen(args: Any, recipe: Path, world: World, inputs: Mapping[str, Any]) -> Record:
    directory = Path(args.run.resume)
    run = read_run(directory)
    if run["recipe"] != recipe.name:
        raise UserError(f"--resume {directory}: that is a run of {run['recipe']}, this is {recipe.name}")
    lock = _lock(directory)
    try:
        _check_inputs(directory, run.get("inputs", {}), inputs)
        changed = _changed_args(run["args"], flat_args(args))
        folder = directory / "checkpoints"
        for leftover in folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoint, refused = newest_checkpoint(folder)
        step, kept_bytes = (checkpoint.step, checkpoint.state["metrics_bytes"]) if checkpoint else (0, 0)
        if args.steps < step:
            raise UserError(f"--steps {args.steps}: the run has done {step} already; give as many or more")
        metrics = open(directory / "metrics.jsonl", "ab")  # noqa: SIM115 (closed by Record.close)
        if metrics.tell() < kept_bytes:
            raise UserError(
                f"--resume {directory}: metrics.jsonl is shorter than at the checkpoint of step {step}: it was edited "
                "or lost; restore it, or start a new run"
            )
        record = Record(directory, args, world, checkpoint, _lock=lock, _metrics=metrics, _adopt=bool(changed))
        record._resumed = {"step": step, "at": now(), "changed": changed, **_machine(world)}
        record.history = read_metrics(directory / "metrics.jsonl", kept_bytes)
        record._tracker = open_tracker(args.run.track, directory, run["args"], run_id=run["id"], start_step=step)
    except BaseException:
        lock.close()
        raise
    for message in refused:
        record.say(f"warning: {message}; the one before is used")
    for name, (old, new) in changed.items():
        record.say(f"warning: --resume with another {name}: {old} until now, {new} from step {step + 1}")
    record.say(f"resuming {directory} after step {step}{'' if checkpoint else ' (no checkpoint yet: from the start)'}")
    return record


def _check_inputs(directory: Path, known: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raise UserError, naming the input, where one is no longer what the run was begun with. It may have moved."""
    for name in known.keys() & inputs.keys():
        before, now = known[name]["sha256"], fingerprint(inputs[name])["sha256"]
        if before != now:
            raise UserError(
                f"--resume {directory}: {name} has changed since the run began ({before[:12]} then, {now[:12]} now); "
                "restore it, or start a new run"
            )


def _changed_args(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{name: [before, now]} of the arguments that a resume gives another value. Raises UserError, naming the flag, for
    one that the adapter depends on."""
    changed = {
        name: [before.get(name), value]
        for name, value in now.items()
        if name not in ("resume", "run_dir") and before.get(name) != value
    }
    for name in _FIXED:
        if name in changed:
            raise UserError(
                f"{flag(name)} {changed[name][1]}: the run was begun with {changed[name][0]}, and its adapter means "
                "nothing with another; leave the flag out, or start a new run"
            )
    return changed


def _lock(directory: Path) -> IO[str]:
    """Hold the directory's lock until the file is closed or the process ends, however it ends."""
    file = open(directory / ".lock", "a+")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(f"--resume {directory}: process {holder} is writing this run; stop it first") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


# -------------------------------------------------------------------------------------------- what a run was made of


def _git_state(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """({"commit", "dirty"}, diff of the working tree) of the repository around a recipe; (None, "") without one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        status = git("status", "--porcelain").splitlines()
        return {"commit": commit, "dirty": status}, git("diff", "HEAD") if status else ""
    except (OSError, subprocess.CalledProcessError):
        return None, ""


def _machine(world: World) -> dict[str, Any]:
    """Versions, device and number of processes."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"{platform.machine()}, {os.cpu_count()} CPUs"
    return {"versions": versions, "device": device, "processes": world.size}


def now() -> str:
    """The local time, as ISO 8601 with its offset."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def fingerprint(value: Any) -> dict[str, Any]:
    """{"sha256": ..., ...} of a file or folder (Path), a text, or a sequence of examples (tuples, dicts, texts). The
    SHA-256 of None is "none", so that a resume can neither add nor remove an optional input.

    Of a file above 64 MiB (weights) only the size, the first and the last MiB count: a safetensors header with names
    and shapes, and the end of the data. That tells two models apart without reading 30 GB."""
    if value is None:
        return {"sha256": "none"}
    digest = hashlib.sha256()
    if not isinstance(value, Path):
        items = [value] if isinstance(value, str) else list(value)
        for item in items:
            digest.update(json.dumps(item, ensure_ascii=False, default=str).encode() + b"\n")
        return {"sha256": digest.hexdigest(), "items": len(items)}
    if not value.exists():
        raise UserError(f"{value}: no such file or folder")
    files = [value] if value.is_file() else sorted(p for p in value.rglob("*") if p.is_file())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= 64 * 2**20:
                digest.update(file.read())
            else:
                digest.update(file.read(2**20))
                file.seek(-(2**20), os.SEEK_END)
                digest.update(file.read())
    return {"sha256": digest.hexdigest(), "files": len(files), "path": str(value)}


# ------------------------------------------------------------------------------------------------ metrics and reading


def number(name: str, value: Any) -> float | int | None:
    """A metric's value as JSON: integers as they are; NaN, infinity, None and the exception of a reward as null.

    Raises ValueError, naming the metric, for anything else that is not one number."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Exception):
        return None
    try:
        as_float = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"metric {name!r} is not a number: {value!r}") from None
    return as_float if math.isfinite(as_float) else None


def flat_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with its times as times/<name> beside the metrics: the form that trackers take."""
    times = {f"times/{name}": value for name, value in line["times"].items()}
    return {name: value for name, value in {**line, **times}.items() if name not in ("schema", "times")}


def strip_times(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line without what depends on clock and machine: equal between two runs with one seed on one CPU."""
    return {name: value for name, value in line.items() if name != "times"}


def last_values(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of every metric. Null, which stands for NaN, is no value."""
    values: dict[str, Any] = {}
    for line in history:
        values.update({name: value for name, value in strip_times(line).items() if value is not None})
    return values


def read_metrics(path: Path, length: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of its first `length` bytes.

    Raises UserError, naming the file, for a schema that this version does not know."""
    lines = [json.loads(text) for text in path.read_bytes()[:length].decode().splitlines()]
    for line in lines:
        if line.get("schema") != SCHEMA:
            raise UserError(f"{path}: schema {line.get('schema')} is not {SCHEMA}: another version wrote it")
    return lines


def read_run(directory: Path) -> dict[str, Any]:
    """The run.json of a run directory. Raises UserError, naming the directory, where there is none or it is damaged."""
    path = Path(directory) / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} holds no run (no run.json); give a run's directory, or start one") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or start a new run") from None
    if not isinstance(run, dict) or not {"recipe", "args"} <= run.keys():
        raise UserError(f"{path} is not what a run writes: recipe and args must be in it; restore it")
    return run


def _write_run(directory: Path, run: Mapping[str, Any]) -> None:
    write_text(directory / "run.json", json.dumps(run, indent=2) + "\n")
