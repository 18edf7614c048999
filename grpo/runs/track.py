"""Copies of the metrics in Weights & Biases or TensorBoard. Neither is needed: the run directory has everything."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from grpo.errors import UserError

_TRACKERS = ("wandb", "tensorboard")
"""values of --track; each is also the name of the package to install"""


class Tracker(Protocol):
    """Where metrics are copied to."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Copy one line of metrics.jsonl, made flat by `grpo.runs.record.flat_metrics`; its step is under "step"."""

    def close(self) -> None:
        """Send what is still waiting, and end."""


def check_tracker(kind: str) -> None:
    """Raise UserError, naming the flag, for an unknown tracker or one whose package is not installed."""
    if kind == "none":
        return
    if kind not in _TRACKERS:
        raise UserError(f"--track {kind}: no such tracker; choose none, wandb or tensorboard")
    if importlib.util.find_spec(kind) is None:
        raise UserError(f"--track {kind} needs a package: pip install {kind}")


def open_tracker(
    kind: str, directory: Path, arguments: Mapping[str, Any], *, run_id: str, start_step: int = 0
) -> Tracker | None:
    """The tracker of a run directory; None for "none". Opened again on a resume, it continues the run of that id after
    `start_step`.

    wandb: the project is $WANDB_PROJECT or grpo-recipes; WANDB_MODE=offline writes into the run directory only.
    Raises UserError where Weights & Biases refuses."""
    if kind == "wandb":
        return _Wandb(directory, arguments, run_id)
    if kind == "tensorboard":
        return _TensorBoard(directory, start_step)
    return None


class _Wandb:
    def __init__(self, directory: Path, arguments: Mapping[str, Any], run_id: str) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "grpo-recipes"),
                name=directory.name,
                id=run_id,
                resume="allow",
                dir=str(directory),
                config=dict(arguments),
            )
        except wandb.Error as error:  # for example, when nobody is logged in
            raise UserError(
                f"--track wandb: {error} Or set WANDB_MODE=offline, which writes into the run directory only"
            ) from error
        # Our own x axis: after a resume some steps are written again, and wandb's counter would drop them.
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.run.log({name: value for name, value in metrics.items() if value is not None})

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run does the steps after the checkpoint again; without the purge they would appear twice.
        purge = start_step + 1 if start_step else None
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def log(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if value is not None and name != "step":
                self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
