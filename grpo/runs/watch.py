"""What a run shows while it runs: on a terminal a live table with a progress bar, elsewhere plain lines; and alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# (metric, name shown, format), in the order shown. A metric that the recipe does not log is left out.
SHOWN = (
    ("reward", "reward", ".3f"),
    ("pass_at_1", "pass@1", ".3f"),
    ("eval/pass_at_1", "held-out pass@1", ".3f"),
    ("length", "length", ".1f"),
    ("truncated", "truncated", ".2f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("clip_low", "clipped low", ".3f"),
    ("clip_high", "high", ".3f"),
    ("zero_variance", "zero variance", ".2f"),
    ("mismatch_mean", "sampler gap", ".4f"),
    ("grad_norm", "gradient", ".3g"),
    ("skipped_steps", "skipped", "d"),
)


def format_line(line: Mapping[str, Any]) -> dict[str, str]:
    """The cells that show one line of metrics.jsonl: name shown -> text."""
    cells = {label: format(line[name], spec) for name, label, spec in SHOWN if line.get(name) is not None}
    if not line["skipped_steps"]:
        del cells["skipped"]
    times = line["times"]
    if "tokens_per_second" in times:
        cells["tok/s"] = format(times["tokens_per_second"], ".0f")
    phases = [f"{k.removeprefix('seconds/')} {v:.1f}" for k, v in times.items() if k.startswith("seconds/")]
    cells["seconds"] = format(times["seconds"], ".1f") + (f" ({', '.join(phases)})" if phases else "")
    if "memory_gib" in times:
        cells["GiB"] = format(times["memory_gib"], ".1f")
    return cells


class View:
    """Context manager around the training loop; `show` takes each line of metrics.jsonl."""

    def __init__(self, name: str, total: int, done: int, console: Console | None = None) -> None:
        """name: the run's name. total: number of steps of the run. done: number of steps done before."""
        self.console = console or Console()
        self.total = total
        self.done = done
        self.cells: dict[str, str] = {}
        self.progress = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self.task = self.progress.add_task(name, total=total, completed=done)
        # Without a terminal (in a CI log, in a file) a live display would write control codes.
        self.live = Live(self._render(), console=self.console) if self.console.is_terminal else None

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.update(self._render(), refresh=True)
            self.live.stop()

    def show(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl; on a terminal, values that it lacks stay as they were."""
        cells = format_line(line)
        if self.live is None:
            body = "  ".join(f"{name} {value}" for name, value in cells.items())
            print(f"step {line['step']}/{self.total}  {body}", flush=True)
            return
        self.cells.update(cells)
        self.progress.update(self.task, completed=line["step"])
        self.live.update(self._render())

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 3), expand=False)
        cells = [f"{name} [bold]{value}[/bold]" for name, value in self.cells.items()]
        columns = max(1, min(4, self.console.width // 28))
        for start in range(0, len(cells), columns):
            table.add_row(*cells[start : start + columns])
        return Group(table, self.progress)


# ----------------------------------------------------------------------------------------------------------- alarms


def alarms(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What looks wrong at the end of a run's history: name of the alarm -> what was seen, and a remedy.

    history: lines of metrics.jsonl. An alarm looks at the mean of the last ten values, so one odd step raises none."""
    found: dict[str, str] = {}

    def recent(name: str, count: int = 10) -> float | None:
        values = _values(history, name)[-count:]
        return fmean(values) if len(values) == count else None

    flat = recent("zero_variance")
    if flat is not None and flat > 0.9:
        found["zero_variance"] = (
            f"in {flat:.0%} of groups all completions have the same reward, and carry no gradient: raise --group-size "
            "or --temperature, or take questions that are neither always nor never solved"
        )
    rewards = _values(history, "reward")
    if len(rewards) >= 30:
        means = [fmean(rewards[i : i + 10]) for i in range(0, len(rewards) - 9, 5)]
        first, best, last = means[0], max(means), fmean(rewards[-10:])
        if best > first and last < best - 0.5 * (best - first):
            found["reward"] = (
                f"reward fell from {best:.3f} to {last:.3f}: lower --learning-rate, raise --beta (KL), or go back to "
                "the best checkpoint"
            )
    kl = recent("kl")
    if kl is not None and kl > 0.5:
        found["kl"] = (
            f"KL to the reference is {kl:.2f} nats per token: the policy has left the base model; lower "
            "--learning-rate or raise --beta, and read some samples: they may be gibberish"
        )
    truncated = recent("truncated")
    if truncated is not None and truncated > 0.5:
        found["truncated"] = (
            f"{truncated:.0%} of completions hit the token limit and are scored without their end: raise "
            "--max-completion-tokens, or reward brevity"
        )
    lengths = _values(history, "length")
    if len(lengths) >= 20:
        before, after = fmean(lengths[:10]), fmean(lengths[-10:])
        if after < before / 3:
            found["length"] = (
                f"completions shrank from {before:.0f} to {after:.0f} tokens: the reward can perhaps be earned without "
                "reasoning; read some samples, and make the format reward stricter"
            )
        elif after > 3 * before:
            found["length"] = (
                f"completions grew from {before:.0f} to {after:.0f} tokens: if the reward did not grow with them, use "
                "--loss dr_grpo or dapo, or a penalty for overlong completions"
            )
    entropy = recent("entropy")
    if entropy is not None and entropy < 0.01:
        found["entropy"] = (
            f"entropy is {entropy:.4f} nats per token: the samples of a group are all alike; raise --epsilon-high or "
            "--temperature, or lower --learning-rate"
        )
    gap = recent("mismatch_mean")
    if gap is not None and gap > 0.1:
        found["mismatch_mean"] = (
            f"the sampler's log-probabilities differ from the trainer's by {gap:.3f} nats per token: check that the "
            "engine has the newest adapter, the trainer's temperature and its dtype; --importance corrects the rest"
        )
    return found


def _values(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The values of a metric, without those that are missing or null."""
    return [line[name] for line in history if line.get(name) is not None]
