"""A run's curves as PNG, and report.html: one file without links or scripts, to open in any browser or to send."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Panels of rewards.png: the title, and the metrics drawn together. One without data is left out.
PANELS = (
    ("reward", ("reward",)),
    ("pass@1", ("pass_at_1", "eval/pass_at_1")),
    ("length, tokens", ("length",)),
    ("shares: truncated, zero variance, clipped", ("truncated", "zero_variance", "clip_low", "clip_high")),
    ("KL to the reference, nats a token", ("kl",)),
    ("entropy, nats a token", ("entropy",)),
    ("sampler gap, nats a token", ("mismatch_mean",)),
    ("gradient norm", ("grad_norm",)),
    ("tokens a second", ("times/tokens_per_second",)),
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
    # Margins in inches, as shares of the figure: matplotlib's automatic layouts take longer than the drawing.
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
    """Draw the panels that have data to a PNG, replacing it at once.

    history: the lines of metrics.jsonl."""
    temporary = path.with_name(f".tmp-{path.name}")
    _figure(history, path.parent.name).savefig(temporary, format="png", dpi=90)
    temporary.replace(path)


def write_report(directory: Path, history: Sequence[Mapping[str, Any]], alarms: Sequence[str]) -> None:
    """Write `directory`/report.html from run.json, the metrics and completions/: alarms, results, curves (an
    inline copy of rewards.png), samples side by side, arguments. Everything a model wrote is escaped."""
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    body = [f"<h1>{html.escape(directory.name)}</h1>", f"<pre>{html.escape(record['command'])}</pre>"]
    body += [f'<p class="alarm">{html.escape(text)}</p>' for text in alarms]
    body += ["<h2>Results</h2>", _results(history), "<h2>Curves</h2>", _image(directory / "rewards.png")]
    body += _before_and_after(directory / "completions") + _training_samples(directory / "completions")
    shown = {k: v for k, v in record.items() if k not in ("command", "argv", "results")}
    body += [f"<details><summary>run.json</summary><pre>{html.escape(json.dumps(shown, indent=2))}</pre></details>"]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(directory.name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    temporary = directory / ".tmp-report.html"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(directory / "report.html")


def _image(path: Path) -> str:
    """An image tag that holds the PNG itself."""
    if not path.exists():
        return "<p>no curves yet</p>"
    return f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _results(history: Sequence[Mapping[str, Any]]) -> str:
    """The first and last value of every metric."""
    names = dict.fromkeys(n for line in history for n, v in line.items() if n not in ("schema", "step", "times"))
    rows = []
    for name in names:
        points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
        if points:
            cells = (f"{value:.6g} <small>step {step}</small>" for step, value in (points[0], points[-1]))
            rows.append(f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table><tr><th>metric</th><th>first</th><th>last</th></tr>" + "".join(rows) + "</table>"


def read_completions(path: Path) -> list[dict[str, Any]]:
    """The records of a file that `Run.save_completions` wrote."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _sample(record: Mapping[str, Any], heading: str) -> str:
    numbers = [f"{name} {value:.3g}" for name, value in record["rewards"].items() if value is not None]
    if record["advantage"] is not None:
        numbers.append(f"advantage {record['advantage']:+.3f}")
    return (
        f"<div><b>{html.escape(heading)}</b> <small>{html.escape(', '.join(numbers))}</small>"
        f"<pre>{html.escape(record['completion'])}</pre></div>"
    )


def _before_and_after(folder: Path, count: int = 6) -> list[str]:
    """Held-out questions with the first and the last answer, side by side."""
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
    """Groups of the latest step kept: each one's completions side by side, highest and lowest rewards among them."""
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
