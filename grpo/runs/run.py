"""A run one can watch, trust, stop and resume: its directory, metrics, progress and checkpoints.   docs/runs.md

    args = tyro.cli(Args, args=command_line())          # on --resume, the run's own arguments come first
    run = start_run(args, recipe=Path(__file__), world=world)
    ...
    run.restore(model, optimizer, scheduler)            # no-op on a fresh run
    for step in run.steps(args.steps):                  # 1, 2, ..., args.steps
        with run.phase("generate"):
            ...
        run.log(step, {"reward": reward, "tokens": tokens, ...})
        if run.due(step):                               # the last lines of the loop's body
            run.save(step, model, optimizer, scheduler)
    run.finish(model, tokenizer)

`step` is the number of optimizer steps done once the body has run: step 0 is the model before training.
"""

import contextlib
import dataclasses
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
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from grpo.distributed import World, all_gather, all_sum
from grpo.errors import flag
from grpo.runs.checkpoint import (
    Checkpoint,
    best_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    restore_checkpoint,
    rng_state,
    save_adapter,
    save_checkpoint,
    split_tensors,
    write_text,
)
from grpo.runs.cli import check_args
from grpo.runs.report import write_curves, write_report
from grpo.runs.track import Tracker, check_tracker, open_tracker
from grpo.runs.watch import View, alarms

SCHEMA = 1
"""version of metrics.jsonl's lines; see docs/runs.md"""

_RESERVED = ("schema", "step", "times")
_FOR_GOOD = ("lora_rank", "lora_alpha", "lora_targets", "load_in_4bit")
"""arguments that a checkpoint's weights were trained with"""
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "vllm", "numpy", "safetensors", "grpo-recipes")


@dataclass
class Run:
    """Made by `start_run`. On every rank but 0 the same calls are made and nothing is written."""

    directory: Path
    args: Any
    world: World
    keep: int
    best: str
    completions_every: int
    refresh_seconds: float
    max_nonfinite: int

    start_step: int = 0
    """optimizer steps done before this process began: 0, or the step of the checkpoint resumed from"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """the lines of metrics.jsonl"""
    skipped_steps: int = 0
    """steps not taken because loss or gradients were NaN or infinite"""

    _checkpoint: Checkpoint | None = None
    _lock: IO[str] | None = None
    _metrics: IO[bytes] | None = None
    _tracker: Tracker | None = None
    _view: View | None = None
    _phases: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)
    _refresh_at: float = math.inf
    _nonfinite_in_a_row: int = 0
    _raised: set[str] = field(default_factory=set)
    _total: int = 0
    _signal: int = 0
    _stopping: bool = False
    _saved: int = -1
    _restored: bool = False
    _resumed: dict[str, Any] | None = None
    """what run.json will say of this resume, until it is sure to take place"""
    _argv: list[str] | None = None
    """the command line as a resume has changed it, until a checkpoint goes by it"""

    @property
    def writes(self) -> bool:
        """whether this process is the one that writes (rank 0)"""
        return self.world.rank == 0

    # -------------------------------------------------------------------------------------------------- the loop

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
        """On a resumed run, bring everything to the checkpoint's state; on a fresh one do nothing."""
        self._restored = True
        if self._checkpoint is not None:
            restore_checkpoint(
                self._checkpoint.path, model, optimizer, scheduler, rank=self.world.rank, device=self.world.device
            )
        if self._resumed is not None:
            self._cut_back(self._resumed)
            self._resumed = None

    def _cut_back(self, resumed: dict[str, Any]) -> None:
        """Drop what was written after the checkpoint: it will be made again. Not before nothing can be refused any
        more, so that a resume that fails has lost nothing."""
        assert self._metrics is not None
        kept_bytes = self._checkpoint.state["metrics_bytes"] if self._checkpoint else 0
        self._metrics.truncate(kept_bytes)
        self._metrics.seek(kept_bytes)
        for path in (self.directory / "completions").glob("*-*.jsonl"):
            if int(path.stem.rsplit("-", 1)[1]) > resumed["step"]:
                path.unlink()
        record = read_run(self.directory)
        for name in ("finished", "results", "best_checkpoint"):
            record.pop(name, None)  # they tell of an earlier end, as adapter/ is of one until the run ends again
        record.setdefault("resumed", []).append(resumed)
        _write_record(self.directory, record)

    def steps(self, total: int) -> Iterator[int]:
        """The steps still to do, `start_step` + 1 to `total`, under the live view.

        Ctrl-C or SIGTERM lets the step end; `due` is then true, and once it has been saved the process exits with
        128 + the signal's number. A second Ctrl-C interrupts at once."""
        if (self._checkpoint is not None or self._resumed is not None) and not self._restored:
            raise RuntimeError("a resumed run must call run.restore(model, optimizer, scheduler) before run.steps()")
        self._total = total
        with self._signals(), self._watch(total):
            for step in range(self.start_step + 1, total + 1):
                self._reset_clock()
                yield step
                if self._stopping and self._saved == step:
                    self._close()
                    self.say(f"stopped after step {step}; continue with --resume {self.directory}")
                    raise SystemExit(128 + (self._signal or signal.SIGTERM))
                self._saved = -1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds within towards times["seconds/<name>"] of the next line logged."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # kernels still running belong to this phase
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - begin

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, refresh the view, and now and then the curves and the report.

        metrics: names as in docs/runs.md; numbers or one-element tensors; NaN and infinity are stored as null.
        Everything that depends on the clock or the machine is put into the line's `times`, and nothing else is.
        Raises ValueError for a reserved name, or when called after the step's checkpoint was saved (on a resume
        the line would be missing), OSError with a remedy when the disk is full."""
        if step == self._saved and self._view is not None:
            raise ValueError(f"step {step}: log before save: a resumed run would lack the line")
        if not self.writes:
            return self._reset_clock()
        for name in _RESERVED:
            if name in metrics:
                raise ValueError(f"metric {name!r}: the name is reserved; choose another")
        values = {name: _number(name, value) for name, value in metrics.items()}
        line: dict[str, Any] = {"schema": SCHEMA, "step": step, **values, "skipped_steps": self.skipped_steps}
        line["times"] = self._times(values.get("tokens"))
        self._append(json.dumps(line, allow_nan=False) + "\n")
        self.history.append(line)
        if self._tracker:
            self._tracker.log(flat_metrics(line))
        if self._view:
            self._view.show(line)
        current = alarms(self.history)
        for name in current.keys() - self._raised:
            self.say(f"warning: step {step}: {current[name]}")
        self._raised = set(current)
        if time.perf_counter() > self._refresh_at:
            self.refresh()
        self._reset_clock()

    def save_completions(
        self,
        step: int,
        prompts: Sequence[str],
        completions: Sequence[str],
        rewards: Mapping[str, Sequence[float | Exception | None]],
        advantages: Sequence[float] | torch.Tensor | None = None,
        *,
        split: str = "train",
    ) -> None:
        """Write completions/<split>-NNNNNN.jsonl: prompt, completion, rewards by function, advantage.

        prompts: one a group, as the model saw them, template included: `grpo_rollout.programs.export` compares models on them.
        completions, each list of rewards, advantages: prompt-major, so completion i answers prompt i // group_size.
        Training samples are kept of step 1 and each `completions_every` steps, samples of
        any other split ("eval") always. Only rank 0's are kept."""
        if not self.writes or (split == "train" and step != 1 and step % self.completions_every):
            return
        n = len(completions)
        columns = {**rewards, "advantages": [None] * n if advantages is None else advantages}
        for name, column in columns.items():
            if len(column) != n:
                raise ValueError(f"save_completions: {name} has {len(column)} entries for {n} completions")
        if not prompts or n % len(prompts):
            raise ValueError(f"save_completions: {n} completions do not divide among {len(prompts)} prompts")
        records = (
            {
                "prompt": prompts[i // (n // len(prompts))],
                "completion": completions[i],
                "rewards": {name: _number(name, column[i]) for name, column in rewards.items()},
                "advantage": _number("advantages", columns["advantages"][i]),
            }
            for i in range(n)
        )
        # Escaped: a completion's U+2028 ends a line to some readers.
        text = "".join(json.dumps(record) + "\n" for record in records)
        with self._disk_may_be_full(f"completions of step {step}"):
            folder = self.directory / "completions"
            folder.mkdir(exist_ok=True)
            write_text(folder / f"{split}-{step:06d}.jsonl", text)

    def guard_finite(self, step: int, loss: Any, grad_norm: Any, batch: Any = None) -> bool:
        """Whether the optimizer may step: False if the loss or the gradient norm is NaN or infinite on any rank.

        Then the batch (nested tuples, lists, dicts of tensors, numbers, text) is kept under nonfinite/ for a
        post-mortem, `skipped_steps` counts up, and after `max_nonfinite` such steps in a row RuntimeError ends
        the run. The caller skips optimizer.step() and clears the gradients."""
        loss, grad_norm = float(torch.as_tensor(loss).detach()), float(torch.as_tensor(grad_norm).detach())
        bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not self._any_rank(bad):
            self._nonfinite_in_a_row = 0
            return True
        self.skipped_steps += 1
        self._nonfinite_in_a_row += 1
        folder = self.directory / "nonfinite" / f"step-{step:06d}-rank-{self.world.rank}"
        if bad:
            _save_batch(folder, {"loss": loss, "grad_norm": grad_norm, "batch": batch})
        self.say(f"warning: step {step} skipped: loss {loss}, gradient norm {grad_norm}; see {folder.parent}")
        if self._nonfinite_in_a_row >= self.max_nonfinite:
            raise RuntimeError(
                f"loss or gradients were NaN or infinite in {self._nonfinite_in_a_row} steps in a row; the batches are "
                f"in {folder.parent}: lower the learning rate, or look there for extreme log-probabilities"
            )
        return False

    def due(self, step: int) -> bool:
        """Whether to save now: each `save_every` steps (0: never for that reason), after the last step, and when a
        signal asked to stop. Every rank must ask: they agree on stopping here."""
        self._stopping = self._any_rank(bool(self._signal))
        every = self.args.save_every
        return self._stopping or step == self._total or (every > 0 and step % every == 0)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
        """Write a checkpoint of the state after `step`, then drop all but the newest `keep` and the best.

        A full disk does not end the run: it is reported, and the last good checkpoint stays."""
        rng = all_gather(rng_state(self.world.device), self.world)
        self._saved = step
        if not self.writes:
            return
        assert self._metrics is not None
        scores = [line[self.best] for line in self.history if line["step"] == step and line.get(self.best) is not None]
        state = {
            "metrics_bytes": self._metrics.tell(),
            "skipped_steps": self.skipped_steps,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
        }
        folder = self.directory / "checkpoints"
        score = scores[-1] if scores else None
        with self._disk_may_be_full(f"checkpoint of step {step}, the one before is kept"):
            os.fsync(self._metrics.fileno())
            save_checkpoint(folder, step, model, optimizer, scheduler, rng=rng, state=state, score=score)
            prune_checkpoints(folder, self.keep)
            if self._argv is not None:  # a later resume goes on as this one did
                record = read_run(self.directory)
                record |= {"argv": self._argv, "args": _json(self.args)}
                _write_record(self.directory, record)
                self._argv = None

    def finish(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Write adapter/ (loads in peft, transformers and vLLM), the curves, the report, and close the run."""
        if not self.writes:
            return
        adapter = self.directory / "adapter"
        temporary = self.directory / ".tmp-adapter"
        shutil.rmtree(temporary, ignore_errors=True)
        save_adapter(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        shutil.rmtree(adapter, ignore_errors=True)
        temporary.rename(adapter)
        record = read_run(self.directory)
        record["finished"] = _now()
        record["results"] = last_values(self.history)
        best = best_checkpoint(self.directory / "checkpoints")
        record["best_checkpoint"] = best.name if best else None
        _write_record(self.directory, record)
        self.refresh()
        self._close()
        self.say(f"run: {self.directory}  (report.html, rewards.png, metrics.jsonl, adapter/)")

    # ------------------------------------------------------------------------------------------ what it was made of

    def record_inputs(self, **inputs: Any) -> None:
        """Note in run.json the fingerprints of what the run is made of, by name: a model folder or data file
        (Path), the examples themselves (a sequence of tuples, dicts or strings), or None: a resume cannot add one.

        Raises ValueError, naming the input, where a resumed run's is no longer what it was."""
        if not self.writes:
            return
        record = read_run(self.directory)
        known = record.setdefault("inputs", {})
        for name, value in inputs.items():
            found = fingerprint(value)
            if known.setdefault(name, found)["sha256"] != found["sha256"]:  # it may have moved
                raise ValueError(
                    f"--resume {self.directory}: {name} has changed since the run began ({known[name]['sha256'][:12]} "
                    f"then, {found['sha256'][:12]} now); restore it, or start a new run"
                )
        _write_record(self.directory, record)

    def say(self, text: str) -> None:
        """Print above the live view, on rank 0 only."""
        if self.writes:
            print(text, flush=True)

    def refresh(self) -> None:
        """Redraw rewards.png and report.html."""
        if not self.writes or not self.history:
            return
        begin = time.perf_counter()
        with self._disk_may_be_full("rewards.png and report.html"):
            write_curves(self.directory / "rewards.png", self.history)
            write_report(self.directory, self.history, list(alarms(self.history).values()))
        end = time.perf_counter()
        self._refresh_at = end + max(self.refresh_seconds, 50 * (end - begin))  # at most 2% of the run's time

    # ---------------------------------------------------------------------------------------------------- within

    def _times(self, tokens: float | None) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        times = {"seconds": seconds, **{f"seconds/{name}": value for name, value in self._phases.items()}}
        if tokens:
            times["tokens_per_second"] = tokens / seconds
        if self.world.device.type == "cuda":
            times["memory_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.world.device)
        else:
            times["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB
        times["clock"] = time.time()
        return {name: round(value, 4) for name, value in times.items()}

    def _reset_clock(self) -> None:
        self._phases.clear()
        self._since = time.perf_counter()

    def _append(self, text: str) -> None:
        assert self._metrics is not None
        offset = self._metrics.tell()
        try:
            self._metrics.write(text.encode())
            self._metrics.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._metrics.fileno(), offset)  # no half line
            remedy = f"{error.strerror}: free some space, then continue with --resume {self.directory}"
            raise OSError(error.errno, remedy, str(self.directory / "metrics.jsonl")) from error

    @contextlib.contextmanager
    def _disk_may_be_full(self, what: str) -> Iterator[None]:
        """Report a full disk and go on: what is written within can be missed, the run cannot."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.say(f"warning: not written: {what}: {error.strerror} in {self.directory}; free some space")

    def _any_rank(self, flag: bool) -> bool:
        if self.world.size == 1:
            return flag  # no tensor, and no waiting for the device, in every step
        return bool(all_sum(torch.tensor(int(flag), device=self.world.device), self.world))

    @contextlib.contextmanager
    def _watch(self, total: int) -> Iterator[None]:
        if not self.writes:
            yield
            return
        with View(self.directory.name, total, self.start_step) as self._view:
            try:
                yield
            finally:
                self._view = None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def ask_to_stop(number: int, frame: Any) -> None:
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            self.say(f"{signal.Signals(number).name}: stopping after this step; Ctrl-C again to stop at once")

        try:
            before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs us handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _close(self) -> None:
        if self._tracker:
            self._tracker.close()
            self._tracker = None
        for file in (self._metrics, self._lock):
            if file:
                file.close()


# ------------------------------------------------------------------------------------------------------ beginnings


def command_line(argv: Sequence[str] | None = None) -> list[str]:
    """The command-line arguments for tyro; on `--resume RUN_DIR`, those of the run first, so that they need not be
    repeated, and what is given now overrides them.

    Raises ValueError, naming the flag, where RUN_DIR holds no run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag == "--resume" and (value or i + 1 < len(argv)):
            return [*_without_directories(read_run(Path(value or argv[i + 1]))["argv"]), *argv]
    return argv


def _without_directories(argv: Sequence[str]) -> list[str]:
    """Without --run-dir and --resume: the directory may have been moved since."""
    words = iter(argv)
    kept = []
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag not in ("--run-dir", "--resume"):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def start_run(
    args: Any,
    *,
    recipe: Path,
    world: World | None = None,
    keep: int = 3,
    best: str = "eval/pass_at_1",
    completions_every: int = 10,
    refresh_seconds: float = 30.0,
    max_nonfinite: int = 5,
) -> Run:
    """Make or reopen the run directory, seed every generator, and write run.json. Call it before loading anything.

    args: a recipe's arguments; read are steps, seed, run_dir, resume, save_every, track. run_dir None is
    runs/<recipe>-<date>-<seed>, numbered where that exists. keep: checkpoints kept besides the best. best: the
    metric whose value at its step scores a checkpoint, higher is better. completions_every, max_nonfinite: see
    `Run.save_completions`, `Run.guard_finite`. refresh_seconds: between redrawings of the curves and the report.
    Raises ValueError, naming the flag, for a directory that exists, one that cannot be resumed or is in use."""
    world = world or World()
    options: dict[str, Any] = {
        "keep": keep,
        "best": best,
        "completions_every": completions_every,
        "refresh_seconds": refresh_seconds,
        "max_nonfinite": max_nonfinite,
    }
    run: Run | None = None
    problem = None
    if world.rank == 0:
        try:
            check_args(args)
            check_tracker(args.track)
            if args.resume and args.run_dir and Path(args.resume).resolve() != Path(args.run_dir).resolve():
                raise ValueError(f"--resume {args.resume} and --run-dir {args.run_dir} name two runs; give one of them")
            run = (_reopen if args.resume else _create)(args, recipe, world, options)
        except ValueError as error:  # told to every rank: the others wait
            problem = str(error)
        except OSError as error:
            where = f"--resume {args.resume}" if args.resume else f"--run-dir {args.run_dir or 'runs'}"
            problem = f"{where}: {error}"
    shared: list[Any] = [problem, run.directory if run else None, run._checkpoint if run else None]
    if world.size > 1:
        dist.broadcast_object_list(shared, src=0, device=world.device)
    problem, directory, checkpoint = shared
    if problem is not None:
        raise ValueError(problem)
    if run is None:
        run = Run(directory, args, world, **options)
    if checkpoint is not None:
        run._checkpoint = checkpoint
        run.start_step = checkpoint.step
        run.skipped_steps = checkpoint.state["skipped_steps"]
        run._nonfinite_in_a_row = checkpoint.state["nonfinite_in_a_row"]
    run._refresh_at = time.perf_counter() + refresh_seconds
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    return run


def _create(args: Any, recipe: Path, world: World, options: dict[str, Any]) -> Run:
    now = datetime.datetime.now()
    if args.run_dir is not None:
        wanted = [Path(args.run_dir)]
    else:
        name = f"{recipe.stem}-{now:%Y-%m-%d}-{args.seed}"
        wanted = [Path("runs") / (f"{name}-{n}" if n > 1 else name) for n in range(1, 1000)]
    # Made aside and renamed: a directory that exists has its run.json, and two processes cannot take one name.
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
        record = {
            "schema": SCHEMA,
            "id": secrets.token_hex(8),  # directories of two machines, or of one day, may share a name
            "recipe": recipe.name,
            "command": " ".join(["python", *sys.argv]),
            "argv": sys.argv[1:],
            "args": _json(args),
            "seed": args.seed,
            "started": _now(),
            "git": git,
            **_machine(world),
        }
        _write_record(temporary, record)
        metrics = open(temporary / "metrics.jsonl", "ab")  # noqa: SIM115 (closed by Run.finish)
        for directory in wanted:
            if directory.exists():
                continue
            try:
                temporary.rename(directory)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                continue
            run = Run(directory, args, world, **options, _lock=lock, _metrics=metrics)
            try:
                run._tracker = open_tracker(args.track, directory, record["args"], run_id=record["id"])
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)  # nothing has run in it: its name is free again
                raise
            run.say(f"run directory: {directory}")
            return run
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
    remedy = f", or continue it with --resume {wanted[0]}" if wanted[0].is_dir() else ""
    raise ValueError(f"--run-dir {wanted[0]} exists, and nothing is overwritten: choose another name{remedy}")


def _reopen(args: Any, recipe: Path, world: World, options: dict[str, Any]) -> Run:
    directory = Path(args.resume)
    record = read_run(directory)
    if record["recipe"] != recipe.name:
        raise ValueError(f"--resume {directory}: that is a run of {record['recipe']}, this is {recipe.name}")
    lock = _lock(directory)
    folder = directory / "checkpoints"
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    checkpoint, refused = newest_checkpoint(folder)
    step, kept_bytes = (checkpoint.step, checkpoint.state["metrics_bytes"]) if checkpoint else (0, 0)
    if args.steps < step:
        raise ValueError(f"--steps {args.steps}: the run has done {step} already; give as many or more")
    changed = {
        name: [record["args"].get(name), value]
        for name, value in _json(args).items()
        if name not in ("resume", "run_dir") and record["args"].get(name) != value
    }
    for name in set(changed) & set(_FOR_GOOD):
        raise ValueError(
            f"{flag(name)} {changed[name][1]}: the run was begun with {changed[name][0]}, and its adapter means "
            "nothing with another; leave the flag out, or start a new run"
        )
    metrics = open(directory / "metrics.jsonl", "ab")  # noqa: SIM115 (closed by Run.finish)
    if metrics.tell() < kept_bytes:
        raise ValueError(
            f"--resume {directory}: metrics.jsonl is shorter than at the checkpoint of step {step}: it was edited or "
            "lost; restore it, or start a new run"
        )
    run = Run(directory, args, world, **options, _lock=lock, _metrics=metrics, _checkpoint=checkpoint)
    run._resumed = {"step": step, "at": _now(), "changed": changed, **_machine(world)}
    if changed:
        run._argv = [*record["argv"], *_without_directories(sys.argv[1:])]
    run.history = read_metrics(directory / "metrics.jsonl", kept_bytes)
    run_id = record.get("id", directory.resolve().name)  # runs begun before ids were
    run._tracker = open_tracker(args.track, directory, record["args"], run_id=run_id, start_step=step)
    for message in refused:
        run.say(f"warning: {message}; the one before is used")
    for name, (old, new) in changed.items():
        run.say(f"warning: --resume with another {name}: {old} until now, {new} from step {step + 1}")
    run.say(f"resuming {directory} after step {step}{'' if checkpoint else ' (no checkpoint yet: from the start)'}")
    return run


def _lock(directory: Path) -> IO[str]:
    """Hold the directory's lock until the file is closed or the process ends, however it ends."""
    file = open(directory / ".lock", "a+")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(f"--resume {directory}: process {holder} is writing this run; stop it first") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _git_state(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """({"commit", "dirty"}, the diff against it) of the repository a recipe lies in; (None, "") outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        status = git("status", "--porcelain").splitlines()
        return {"commit": commit, "dirty": status}, git("diff", "HEAD") if status else ""
    except (OSError, subprocess.CalledProcessError):
        return None, ""


def _machine(world: World) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"{platform.machine()}, {os.cpu_count()} CPUs"
    return {"versions": versions, "device": device, "processes": world.size}


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


# ----------------------------------------------------------------------------------------------------------- values


def _json(value: Any) -> Any:
    """A recipe's arguments as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _number(name: str, value: Any) -> float | int | None:
    """A metric's value as JSON: integers as they are; NaN, infinity, None and a reward's exception as null."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Exception):
        return None
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"metric {name!r} is not a number: {value!r}") from None
    return number if math.isfinite(number) else None


def _save_batch(folder: Path, tree: Any) -> None:
    """As safetensors and JSON; what is neither is noted by its type's name: a post-mortem must not fail."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    try:
        rest = split_tensors(tree, "batch", tensors)
    except TypeError as error:
        rest = {"not stored": str(error)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "batch.safetensors")
    write_text(folder / "batch.json", json.dumps(rest) + "\n")


def flat_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with its times beside the rest, as times/<name>: what trackers are given."""
    times = {f"times/{name}": value for name, value in line["times"].items()}
    return {name: value for name, value in {**line, **times}.items() if name not in ("schema", "times")}


def strip_times(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line without what depends on clock and machine: equal between two runs of one seed on one CPU."""
    return {name: value for name, value in line.items() if name != "times"}


def last_values(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of every metric; null, as NaN is stored, is none."""
    values: dict[str, Any] = {}
    for line in history:
        values.update({name: value for name, value in strip_times(line).items() if value is not None})
    return values


def read_metrics(path: Path, length: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or those of its first `length` bytes.

    Raises ValueError, naming the file, for a schema this version does not know."""
    lines = [json.loads(text) for text in path.read_bytes()[:length].decode().splitlines()]
    for line in lines:
        if line.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {line.get('schema')} is not {SCHEMA}: another version wrote it")
    return lines


def _write_record(directory: Path, record: Mapping[str, Any]) -> None:
    write_text(directory / "run.json", json.dumps(record, indent=2) + "\n")


def read_run(directory: Path) -> dict[str, Any]:
    """A run directory's run.json. Raises ValueError, naming the directory, where there is none or it is not whole."""
    path = Path(directory) / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory} holds no run (no run.json); give a run's directory, or start one") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or start a new run") from None
    if not isinstance(record, dict) or not {"recipe", "argv", "args"} <= record.keys():
        raise ValueError(f"{path} is not what a run writes: recipe, argv and args must be in it; restore it")
    return record


def fingerprint(value: Any) -> dict[str, Any]:
    """{"sha256": ..., ...} of a file or folder (Path), of text, or of a sequence of examples; of None "none".

    Of files above 64 MiB (weights) only the size, the first and the last MiB count: a safetensors header with
    names and shapes, and the end of the data. That tells two models apart without reading 30 GB."""
    if value is None:
        return {"sha256": "none"}
    digest = hashlib.sha256()
    if not isinstance(value, Path):
        items = [value] if isinstance(value, str) else list(value)
        for item in items:
            digest.update(json.dumps(_json(item), ensure_ascii=False).encode() + b"\n")
        return {"sha256": digest.hexdigest(), "items": len(items)}
    if not value.exists():
        raise ValueError(f"{value}: no such file or folder")
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
