"""Mirrors of metrics.jsonl in Weights & Biases or TensorBoard. Neither is needed: the run directory has it all."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_PACKAGE = {"wandb": "wandb", "tensorboard": "tensorboard"}


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, flat (`grpo.runs.run.flat_metrics`), with its step under "step"."""

    def close(self) -> None: ...


def check_tracker(kind: str) -> None:
    """Raise ValueError, naming the flag, for an unknown tracker or one whose package is not installed."""
    if kind == "none":
        return
    if kind not in _PACKAGE:
        raise ValueError(f"--track {kind}: none, wandb or tensorboard")
    if importlib.util.find_spec(_PACKAGE[kind]) is None:
        raise ValueError(f"--track {kind} needs a package: pip install {_PACKAGE[kind]}")


def open_tracker(
    kind: str, directory: Path, arguments: Mapping[str, Any], *, run_id: str, start_step: int = 0
) -> Tracker | None:
    """The tracker of a run directory; opened again with its id on a resume, it continues the same run after start_step.
    "none" is None.

    wandb: the project is $WANDB_PROJECT or grpo-recipes; WANDB_MODE=offline writes to the run directory only."""
    check_tracker(kind)
    if kind == "wandb":
        return _Wandb(directory, arguments, run_id)
    if kind == "tensorboard":
        return _TensorBoard(directory, start_step)
    return None


class _Wandb:
    def __init__(self, directory: Path, arguments: Mapping[str, Any], run_id: str) -> None:
        import os

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
        except wandb.Error as error:  # nobody is logged in, say
            raise ValueError(
                f"--track wandb: {error} Or set WANDB_MODE=offline, which writes into the run directory only"
            ) from error
        # Our own x axis: after a resume steps are written again, which wandb's counter would drop.
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.run.log({name: value for name, value in metrics.items() if value is not None})

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of a resumed run the steps after the checkpoint are done again, and would stand there twice.
        purge = start_step + 1 if start_step else None
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def log(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if value is not None and name != "step":
                self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
