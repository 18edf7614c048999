"""The loop of a run that you can watch, trust, stop and resume.   docs/runs.md

    record = open_record(args, recipe=__file__, world=world, inputs={...})     # the run directory
    model, optimizer, scheduler, tokenizer = ...
    run = Run(record, model, optimizer, scheduler, tokenizer)                  # on --resume: at the checkpoint's state
    for step in run.steps(args.steps):                                         # 1, 2, ..., args.steps
        with run.phase("generate"):
            ...
        run.log(step, {"reward": reward, "tokens": tokens, ...})

`step` is the number of optimizer steps done when the loop's body has run, so step 0 is the model before training. After
the body `run.steps` saves a checkpoint where one is due, and after the last one it writes adapter/ and the report.
"""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo.distributed import all_gather, all_sum
from grpo.lazy import torch
from grpo.runs.checkpoint import (
    best_checkpoint,
    prune_checkpoints,
    restore_checkpoint,
    rng_state,
    save_adapter,
    save_checkpoint,
    serialize,
)
from grpo.runs.record import SCHEMA, Record, last_values, now, number
from grpo.runs.report import redraw
from grpo.runs.watch import View, alarms

if TYPE_CHECKING:
    from torch import nn

    from grpo.sampler import Samples

_RESERVED = ("schema", "step", "times")


@dataclass(frozen=True)
class RunFlags:
    """Flags of the run: its seed, its directory, and how often it evaluates and saves."""

    seed: int = 0
    """random seed for the question order, the samples and the adapter's initialization"""
    run_dir: Path | None = None
    """directory that the run writes to; None: a new one under runs/"""
    resume: Path | None = None
    """directory of a run to go on with; flags given beside it override the run's own"""
    eval_every: int = 50
    """steps between evaluations on held-out questions; 0: only before the first step and after the last"""
    save_every: int = 50
    """steps between checkpoints; 0: only after the last step"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """tracker that mirrors the metrics; none: the run directory alone has them"""


class Run:
    """A training run. Every rank makes the same calls; only rank 0 writes."""

    def __init__(
        self,
        record: Record,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        tokenizer: Any = None,
        *,
        keep: int = 3,
        best: str = "eval/pass_at_1",
        completions_every: int = 10,
        refresh_seconds: float = 30.0,
        max_nonfinite: int = 5,
    ) -> None:
        """On --resume this brings model, optimizer, scheduler and random-number generators to the checkpoint's state,
        and drops what the run wrote after it.

        scheduler: anything with state_dict, or None. tokenizer: decodes the prompts of saved completions and is written
        to adapter/; None saves the questions' text. keep: number of newest checkpoints kept beside the best one.
        best: metric that scores the checkpoint of its step; higher is better. completions_every: steps between saved
        training completions. refresh_seconds: least time between two drawings of the curves and the report.
        max_nonfinite: number of steps in a row with NaN or infinite loss or gradients that ends the run.
        Raises UserError where the checkpoint does not fit the model."""
        self.record = record
        self.directory = record.directory
        self.world = record.world
        self.args = record.args
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.keep = keep
        self.best = best
        self.completions_every = completions_every
        self.refresh_seconds = refresh_seconds
        self.max_nonfinite = max_nonfinite

        self.start_step = 0
        """number of optimizer steps done before this process began: 0, or the step of the checkpoint resumed from"""
        self.skipped_steps = 0
        """number of steps without an update, because loss or gradients were NaN or infinite"""
        self._nonfinite_in_a_row = 0
        checkpoint = record.checkpoint
        if checkpoint is not None:
            rank, device = self.world.rank, self.world.device
            restore_checkpoint(checkpoint.path, model, optimizer, scheduler, rank=rank, device=device)
            self.start_step = checkpoint.step
            self.skipped_steps = checkpoint.state["skipped_steps"]
            self._nonfinite_in_a_row = checkpoint.state["nonfinite_in_a_row"]
        record.cut_back()

        self._total = 0
        self._signal = 0
        self._view: View | None = None
        self._raised: set[str] = set()
        self._phases: dict[str, float] = {}
        self._since = time.perf_counter()
        self._refresh_at = self._since + refresh_seconds

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, on rank 0."""
        return self.record.history

    # -------------------------------------------------------------------------------------------------- the loop

    def steps(self, total: int) -> Iterator[int]:
        """The steps still to do, `start_step` + 1 to `total`, under the live view.

        After the body of a step a checkpoint is saved every --save-every steps, after the last step, and when a signal
        asked the run to stop. After the last step the run is finished: adapter/, curves and report are written, and the
        directory is released.
        Ctrl-C or SIGTERM lets the step end; once it is saved the process exits with 128 + the signal's number. A second
        Ctrl-C interrupts at once."""
        self._total = total
        every = self.args.run.save_every
        with self._signals(), self._watch():
            for step in range(self.start_step + 1, total + 1):
                self._reset_clock()
                yield step
                stopping = self._any_rank(bool(self._signal))  # the ranks agree: one may have got a signal alone
                if stopping or step == total or (every > 0 and step % every == 0):
                    self._save(step)
                if stopping:
                    self.record.close()
                    self.say(f"stopped after step {step}; continue with --resume {self.directory}")
                    raise SystemExit(128 + (self._signal or signal.SIGTERM))
        self._finish()

    def evaluates(self, step: int) -> bool:
        """Whether to evaluate after this step: every --eval-every steps, and after the last one."""
        every = self.args.run.eval_every
        return step == self._total or (every > 0 and step % every == 0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent within to times["seconds/<name>"] of the next line logged."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # kernels still running belong to this phase
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - begin

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, show it, and now and then redraw the curves and the report.

        metrics: by name (docs/metrics.md), numbers or tensors of one element; NaN and infinity are stored as null.
        The line's `times` holds everything that depends on the clock or the machine, and nothing else does.
        Raises ValueError for a reserved name or a value that is not a number, UserError when the disk is full."""
        if not self.record.writes:
            return self._reset_clock()
        for name in _RESERVED:
            if name in metrics:
                raise ValueError(f"metric {name!r}: the name is reserved; choose another")
        values = {name: number(name, value) for name, value in metrics.items()}
        line: dict[str, Any] = {"schema": SCHEMA, "step": step, **values, "skipped_steps": self.skipped_steps}
        line["times"] = self._times(values.get("tokens"))
        self.record.append(line)
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
        samples: Samples,
        rewards: Mapping[str, Sequence[float | Exception | None]],
        advantages: Sequence[float] | torch.Tensor | None = None,
        *,
        split: str = "train",
    ) -> None:
        """Write completions/<split>-NNNNNN.jsonl: prompt, completion, reward by function, and advantage of each sample.

        rewards: by function, [samples] each. advantages: [samples] or [prompts, group].
        The prompt is the text that the model saw, chat template included: `grpo export` compares models on it.
        Training samples are kept at step 1 and every `completions_every` steps, those of any other split ("eval")
        always. Only rank 0's samples are kept."""
        if not self.record.writes or (split == "train" and step != 1 and step % self.completions_every):
            return
        count = len(samples.texts)
        per_sample: Sequence[Any] = [None] * count if advantages is None else advantages  # type: ignore[assignment]
        if isinstance(advantages, torch.Tensor):
            per_sample = advantages.flatten().tolist()
        for name, column in {**rewards, "advantages": per_sample}.items():
            if len(column) != count:
                raise ValueError(f"save_completions: {name} has {len(column)} entries for {count} completions")
        prompts = [self.tokenizer.decode(q.prompt) if self.tokenizer else q.text for q in samples.questions]
        self.record.write_completions(
            f"{split}-{step:06d}",
            [
                {
                    "prompt": prompts[i // samples.group_size],
                    "completion": text,
                    "rewards": {name: number(name, column[i]) for name, column in rewards.items()},
                    "advantage": number("advantages", per_sample[i]),
                }
                for i, text in enumerate(samples.texts)
            ],
        )

    def guard_finite(self, step: int, loss: Any, grad_norm: Any, batch: Any = None) -> bool:
        """Whether the optimizer may step: False if loss or gradient norm is NaN or infinite on any rank.

        Then the batch (any nesting of tuples, lists and dicts of tensors, numbers and text) is kept under nonfinite/
        for you to look into, `skipped_steps` counts up, and the caller skips optimizer.step() and clears the gradients.
        Every rank must call this. Raises RuntimeError after `max_nonfinite` such steps in a row."""
        loss, grad_norm = float(torch.as_tensor(loss).detach()), float(torch.as_tensor(grad_norm).detach())
        bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not self._any_rank(bad):
            self._nonfinite_in_a_row = 0
            return True
        self.skipped_steps += 1
        self._nonfinite_in_a_row += 1
        folder = self.directory / "nonfinite"
        if bad:
            file = f"step-{step:06d}-rank-{self.world.rank}.pt"
            with self.record.may_be_missed(f"nonfinite/{file}"):
                folder.mkdir(exist_ok=True)
                (folder / file).write_bytes(serialize(_plain({"loss": loss, "grad_norm": grad_norm, "batch": batch})))
        self.say(f"warning: step {step} skipped: loss {loss}, gradient norm {grad_norm}; see {folder}")
        if self._nonfinite_in_a_row >= self.max_nonfinite:
            raise RuntimeError(
                f"loss or gradients were NaN or infinite in {self._nonfinite_in_a_row} steps in a row; the batches are "
                f"in {folder}: lower the learning rate, or look there for extreme log-probabilities"
            )
        return False

    def say(self, text: str) -> None:
        """Print a line above the live view, on rank 0 only."""
        self.record.say(text)

    def refresh(self) -> None:
        """Redraw rewards.png and report.html."""
        if not self.record.writes or not self.history:
            return
        begin = time.perf_counter()
        with self.record.may_be_missed("rewards.png and report.html"):
            redraw(self.directory)
        end = time.perf_counter()
        self._refresh_at = end + max(self.refresh_seconds, 50 * (end - begin))  # at most 2% of the run's time

    # ------------------------------------------------------------------------------------------ saving and finishing

    def _save(self, step: int) -> None:
        """Write a checkpoint of the state after `step`, then delete all but the newest `keep` and the best one. A full
        disk is reported and does not end the run: the last good checkpoint stays."""
        rng = all_gather(rng_state(self.world.device), self.world)
        if not self.record.writes:
            return
        # An older evaluation would pass off as the best a policy that was never evaluated.
        scores = [line[self.best] for line in self.history if line["step"] == step and line.get(self.best) is not None]
        folder = self.directory / "checkpoints"
        with self.record.may_be_missed(f"checkpoint of step {step}, the one before is kept"):
            state = {
                "metrics_bytes": self.record.sync(),
                "skipped_steps": self.skipped_steps,
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
            }
            score = scores[-1] if scores else None
            save_checkpoint(folder, step, self.model, self.optimizer, self.scheduler, rng=rng, state=state, score=score)
            prune_checkpoints(folder, self.keep)
            self.record.adopt_args()

    def _finish(self) -> None:
        """Write adapter/ (it loads in peft, transformers and vLLM), the curves and the report, and close the run."""
        if not self.record.writes:
            return
        adapter = self.directory / "adapter"
        temporary = self.directory / ".tmp-adapter"
        with self.record.must_fit("adapter"):
            shutil.rmtree(temporary, ignore_errors=True)
            save_adapter(self.model, temporary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
            shutil.rmtree(adapter, ignore_errors=True)
            temporary.rename(adapter)
            best = best_checkpoint(self.directory / "checkpoints")
            self.record.update(
                finished=now(), results=last_values(self.history), best_checkpoint=best.name if best else None
            )
        self.refresh()
        self.record.close()
        self.say(f"run: {self.directory}  (report.html, rewards.png, metrics.jsonl, adapter/)")

    # ---------------------------------------------------------------------------------------------------- within

    def _times(self, tokens: float | None) -> dict[str, float]:
        """What depends on the clock and the machine: seconds, tokens per second, GiB, Unix time."""
        seconds = time.perf_counter() - self._since
        times = {"seconds": seconds, **{f"seconds/{name}": value for name, value in self._phases.items()}}
        if tokens:
            times["tokens_per_second"] = tokens / seconds
        if self.world.device.type == "cuda":
            times["memory_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.world.device)
        else:
            times["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB
        times["clock"] = time.time()
        return {name: round(value, 4) for name, value in times.items()}

    def _reset_clock(self) -> None:
        self._phases.clear()
        self._since = time.perf_counter()

    def _any_rank(self, value: bool) -> bool:
        if self.world.size == 1:
            return value  # without a tensor, and without waiting for the device in every step
        return bool(all_sum(torch.tensor(int(value), device=self.world.device), self.world))

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        """Show the live view."""
        if not self.record.writes:
            yield
            return
        with View(self.directory.name, self._total, self.start_step) as self._view:
            try:
                yield
            finally:
                self._view = None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take Ctrl-C and SIGTERM for a wish to stop after the step."""

        def ask_to_stop(number: int, frame: Any) -> None:
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            self.say(f"{signal.Signals(number).name}: stopping after this step; Ctrl-C again to stop at once")

        try:
            before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _plain(value: Any) -> Any:
    """Named tuples as dicts, tensors on the CPU, and for anything that could only be pickled the name of its type:
    keeping a batch must not fail."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key if isinstance(key, (str, int)) else str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # NumPy's float64 is a float, and torch.load would refuse it
    return None if value is None else type(value).__name__
