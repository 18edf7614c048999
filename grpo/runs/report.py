"""A run's curves as PNG, and report.html: one file without links or scripts, to open in any browser or to send."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.runs.checkpoint import write_text
from grpo.runs.record import read_metrics, read_run
from grpo.runs.watch import alarms

# Panels of rewards.png: title and the metrics drawn together. A panel without data is left out.
PANELS = (
    ("reward", ("reward",)),
    ("pass@1", ("pass_at_1", "eval/pass_at_1")),
    ("length, tokens", ("length",)),
    ("fractions: truncated, zero variance, clipped", ("truncated", "zero_variance", "clip_low", "clip_high")),
    ("KL to the reference, nats per token", ("kl",)),
    ("entropy, nats per token", ("entropy",)),
    ("sampler gap, nats per token", ("mismatch_mean",)),
    ("gradient norm", ("grad_norm",)),
    ("tokens per second", ("times/tokens_per_second",)),
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border: 1px solid #ddd; text-align: left; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(20em, 1fr)); gap: 1em; }
.samples > div { border: 1px solid #ddd; border-radius: 4px; padding: .6em; min-width: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4em 0; font-size: 13px; }
.alarm { background: #fff3cd; border-left: 4px solid #e0a800; padding: .5em 1em; }
img { max-width: 100%; height: auto; } small { color: #666; }
"""


def redraw(directory: Path) -> None:
    """Draw rewards.png and report.html of a run directory again, from its run.json, metrics.jsonl and completions/.

    Raises UserError, naming the directory, where it holds no run."""
    read_run(directory)
    history = read_metrics(directory / "metrics.jsonl")
    if history:
        write_curves(directory / "rewards.png", history)
    write_report(directory, history)


def _figure(history: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A grid of the panels that have data, drawn without pyplot (no global state, no display)."""
    from matplotlib.figure import Figure

    def series(name: str) -> tuple[list[int], list[float]]:
        group, _, inner = name.partition("/")
        lines = [(line["step"], line["times"].get(inner) if group == "times" else line.get(name)) for line in history]
        points = [(step, value) for step, value in lines if value is not None]
        return [p[0] for p in points], [p[1] for p in points]

    panels = [(label, [(n, *series(n)) for n in names if series(n)[0]]) for label, names in PANELS]
    panels = [(label, curves) for label, curves in panels if curves]
    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(13, 3.1 * rows))
    figure.suptitle(title)
    # Margins are fixed: matplotlib's automatic layouts take longer than the drawing.
    height = 3.1 * rows
    figure.subplots_adjust(0.05, 0.35 / height, 0.99, 1 - 0.65 / height, wspace=0.18, hspace=0.32)
    axes = figure.subplots(rows, 3, squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= len(panels):
            axis.set_axis_off()
            continue
        label, curves = panels[i]
        for name, steps, values in curves:
            marked = "o" if len(steps) < 30 else ""
            axis.plot(steps, values, label=name, linewidth=1.4, marker=marked, markersize=3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    return figure


def write_curves(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw the panels that have data to a PNG, which is replaced atomically.

    history: lines of metrics.jsonl."""
    temporary = path.with_name(f".tmp-{path.name}")
    _figure(history, path.parent.name).savefig(temporary, format="png", dpi=90)
    temporary.replace(path)


def write_report(directory: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `directory`/report.html: alarms, results, curves (an inline copy of rewards.png), samples side by side, and
    run.json. Everything that a model wrote is escaped.

    history: lines of metrics.jsonl."""
    record = read_run(directory)
    body = [f"<h1>{html.escape(directory.name)}</h1>", f"<pre>{html.escape(record['command'])}</pre>"]
    body += [f'<p class="alarm">{html.escape(text)}</p>' for text in alarms(history).values()]
    body += ["<h2>Results</h2>", _results(history), "<h2>Curves</h2>", _image(directory / "rewards.png")]
    body += _before_and_after(directory / "completions") + _training_samples(directory / "completions")
    shown = {k: v for k, v in record.items() if k not in ("command", "results")}
    body += [f"<details><summary>run.json</summary><pre>{html.escape(json.dumps(shown, indent=2))}</pre></details>"]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(directory.name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    write_text(directory / "report.html", page)


def _image(path: Path) -> str:
    """An image tag that contains the PNG itself."""
    if not path.exists():
        return "<p>no curves yet</p>"
    return f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _results(history: Sequence[Mapping[str, Any]]) -> str:
    """A table with the first and last value of every metric."""
    names = dict.fromkeys(n for line in history for n, v in line.items() if n not in ("schema", "step", "times"))
    rows = []
    for name in names:
        points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
        if points:
            cells = (f"{value:.6g} <small>step {step}</small>" for step, value in (points[0], points[-1]))
            rows.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table><tr><th>metric</th><th>first</th><th>last</th></tr>" + "".join(rows) + "</table>"


def read_completions(path: Path) -> list[dict[str, Any]]:
    """The samples in a file that `Run.save_completions` wrote."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _sample(record: Mapping[str, Any], heading: str) -> str:
    """One completion with its rewards and advantage."""
    numbers = [f"{name} {value:.3g}" for name, value in record["rewards"].items() if value is not None]
    if record["advantage"] is not None:
        numbers.append(f"advantage {record['advantage']:+.3f}")
    return (
        f"<div><b>{html.escape(heading)}</b> <small>{html.escape(', '.join(numbers))}</small>"
        f"<pre>{html.escape(record['completion'])}</pre></div>"
    )


def _before_and_after(folder: Path, count: int = 6) -> list[str]:
    """Some held-out questions, each with its answer in the first and in the last evaluation, side by side."""
    files = sorted(folder.glob("eval-*.jsonl"))
    if len(files) < 2:
        return []
    first, last = ({r["prompt"]: r for r in reversed(read_completions(f))} for f in (files[0], files[-1]))
    steps = [int(f.stem.removeprefix("eval-")) for f in (files[0], files[-1])]
    parts = ["<h2>Held-out questions, before and after</h2>"]
    for prompt in [p for p in reversed(first) if p in last][:count]:
        pair = _sample(first[prompt], f"step {steps[0]}") + _sample(last[prompt], f"step {steps[1]}")
        parts.append(f'<pre>{html.escape(prompt)}</pre><div class="samples">{pair}</div>')
    return parts


def _training_samples(folder: Path, groups: int = 3, width: int = 4) -> list[str]:
    """Some groups of the latest step that was kept: the completions with the highest and the lowest advantages."""
    files = sorted(folder.glob("train-*.jsonl"))
    if not files:
        return []
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for record in read_completions(files[-1]):
        by_prompt.setdefault(record["prompt"], []).append(record)
    parts = [f"<h2>Training samples of step {int(files[-1].stem.removeprefix('train-'))}</h2>"]
    for prompt, records in list(by_prompt.items())[:groups]:
        records = sorted(records, key=lambda r: -(r["advantage"] or 0.0))
        half = width // 2
        chosen = records if len(records) <= width else records[:half] + records[-half:]
        shown = "".join(_sample(r, f"{i + 1}") for i, r in enumerate(chosen))
        parts.append(f'<pre>{html.escape(prompt)}</pre><div class="samples">{shown}</div>')
    return parts
