"""Draw report.html and rewards.png of a run again from its run.json, metrics.jsonl and completions/.   docs/runs.md

grpo report runs/quickstart_grpo-2026-11-24-0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo.runs.report import redraw
from grpo_rollout.programs import run_program


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """run directory; the run may be over, or still going on"""


def main(args: Args) -> None:
    """Draw both files and print their names. Raises UserError where the directory holds no run."""
    redraw(args.run)
    drawn = [args.run / name for name in ("report.html", "rewards.png")]
    print("drawn:", ", ".join(str(path) for path in drawn if path.exists()))


if __name__ == "__main__":
    run_program(Args, main)
