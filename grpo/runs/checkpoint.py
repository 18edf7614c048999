"""Checkpoints that are either whole or absent: written aside, synced to disk, checksummed, then renamed.

checkpoints/step-000050/
    adapter/adapter_model.safetensors    the trainable weights; with adapter_config.json, peft and vLLM load them
    training.pt                          the states of optimizer, scheduler and every rank's random-number generators
    manifest.json                        first line: SHA-256 of the rest. The rest: step, score, the run's own state,
                                         and the SHA-256 of every other file
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.errors import UserError
from grpo.lazy import torch

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 2
"""version of the checkpoint's files"""
MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINING = "training.pt"


class Checkpoint(NamedTuple):
    """A checkpoint whose files match their checksums."""

    path: Path
    step: int
    """number of optimizer steps done"""
    score: float | None
    """value that decides which checkpoint is the best; None: not measured at this step"""
    state: dict[str, Any]
    """the `state` that `save_checkpoint` was given"""


# ------------------------------------------------------------------------------------------ random-number generators


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch's CPU and, where `device` is a GPU, that GPU."""
    import numpy as np

    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()  # torch.load(weights_only=True) refuses NumPy's arrays
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `rng_state`. A GPU's state is ignored on a machine without a GPU."""
    import numpy as np

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# --------------------------------------------------------------------------------------------- the trainable weights


def trainable_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable parameter, under the name that peft's adapter files use (without the adapter's own name)."""
    adapter = getattr(model, "active_adapter", None)
    infix = f".{adapter}." if isinstance(adapter, str) else None
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace(infix, ".") if infix else name: p for name, p in named}


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the trainable weights to `folder`/adapter_model.safetensors and, for a peft model, adapter_config.json.

    peft, transformers and vLLM load the folder as it is. We do not use peft's `save_pretrained`: it may ask the hub
    about the base model's vocabulary, and it orders target modules by hash, differently in each process.
    A frozen second adapter (the reference policy of a continued run) is not written."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in trainable_state(model).items()}
    (folder / ADAPTER_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    configs: Any = getattr(model, "peft_config", None)
    if configs is not None:
        config = copy.copy(configs[model.active_adapter])
        config.inference_mode = True
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
        config.save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copy the weights that `save_adapter` wrote into the trainable parameters. The copy is in place, so that an
    optimizer still holds the same tensors.

    Raises UserError, naming the first parameter, where names or shapes differ from the model's."""
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER_WEIGHTS)
    parameters = trainable_state(model)
    remedy = "take the model, LoRA rank and targets of the run"
    for name in sorted(tensors.keys() ^ parameters.keys()):
        where = "the model has no such trainable parameter" if name in tensors else "the file lacks it"
        raise UserError(f"{folder}: {name}: {where}; {remedy}")
    with torch.no_grad():
        for name, p in parameters.items():
            if tensors[name].shape != p.shape:
                raise UserError(
                    f"{folder}: {name} is {list(tensors[name].shape)}, the model's is {list(p.shape)}; {remedy}"
                )
            p.copy_(tensors[name])


# --------------------------------------------------------------------------------------------------- files that last


def fsync(path: Path) -> None:
    """Wait until the disk holds a file's bytes, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash, and for any reader, it holds the old text or the new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def serialize(state: Any) -> memoryview:
    """The bytes that torch.save writes. They go through memory because torch.save reports a full disk as a RuntimeError
    without the error's number.

    Raises TypeError for an object that torch.load(weights_only=True) would refuse: better now than on the resume."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True, map_location="meta")  # reads no tensor's data
    except pickle.UnpicklingError as error:
        raise TypeError("torch.load(weights_only=True) refuses this state; store numbers, text and tensors") from error
    return buffer.getbuffer()


# -------------------------------------------------------------------------------------------------- whole checkpoints


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    rng: list[dict[str, Any]],
    state: dict[str, Any],
    score: float | None = None,
) -> Path:
    """Write `folder`/step-NNNNNN so that it is whole or absent whenever the process or the machine dies.

    scheduler: anything with state_dict, or None. rng: `rng_state` of every rank. state: the caller's own, as JSON.
    Raises OSError (for example, when the disk is full); then nothing is left behind, and older checkpoints are as they
    were. Raises TypeError for a state of the optimizer or the scheduler that could not be loaded again."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(step)
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_adapter(model, temporary / "adapter")
        training = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler else None,
            "rng": rng,
        }
        (temporary / TRAINING).write_bytes(serialize(training))
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in files:
            fsync(path)
        sums = {path.relative_to(temporary).as_posix(): file_sha256(path) for path in files}
        body = json.dumps({"schema": SCHEMA, "step": step, "score": score, "state": state, "sha256": sums})
        head = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
        write_text(temporary / MANIFEST, f"{head}\n{body}")
        fsync(temporary / "adapter")
        fsync(temporary)
        if final.exists():  # from an earlier attempt at this step
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises UserError, naming the checkpoint, where the manifest is missing, damaged or of another version."""
    try:
        head, body = (path / MANIFEST).read_text(encoding="utf-8").split("\n", 1)
        if json.loads(head)["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            raise ValueError("its checksum does not match")
        manifest = json.loads(body)
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"its schema is {manifest['schema']}, and this version reads {SCHEMA}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} is torn or corrupt: {MANIFEST}: {error}") from None


def verify_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its checksum.

    Raises UserError, naming the checkpoint and the file, where one is missing or differs."""
    manifest = _read_manifest(path)
    for name, expected in manifest["sha256"].items():
        try:
            actual = file_sha256(path / name)
        except OSError as error:
            raise UserError(f"checkpoint {path} is torn or corrupt: {name}: {error.strerror}") from None
        if actual != expected:
            raise UserError(f"checkpoint {path} is torn or corrupt: {name}: its checksum does not match")
    return Checkpoint(path, manifest["step"], manifest["score"], manifest["state"])


def restore_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, *, rank: int, device: torch.device
) -> None:
    """Bring model, optimizer, scheduler and this rank's random-number generators to a checkpoint's state.

    The learning rate is the one that `optimizer` was made with, at the schedule's place: a resume may give another.
    A rank that the checkpoint does not know (there are more processes now) keeps its generators as they are."""
    load_adapter(model, path / "adapter")
    training = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    schedule = training["scheduler"] if scheduler is not None else None
    for i, (saved, made) in enumerate(zip(training["optimizer"]["param_groups"], optimizer.param_groups)):
        before, rate = (group.get("initial_lr", group["lr"]) for group in (saved, made))
        if rate == before:
            continue
        saved["lr"] *= rate / before  # a schedule multiplies the rate that it begins with
        if schedule is not None:
            saved["initial_lr"] = schedule["base_lrs"][i] = rate
            schedule["_last_lr"][i] = saved["lr"]
    optimizer.load_state_dict(training["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(schedule)
    if rank < len(training["rng"]):
        set_rng_state(training["rng"][rank], device)


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole (None where there is no checkpoint at all), and a message for each newer one
    that was refused. A refused one is renamed to corrupt-step-...: the run no longer sees it, and you can look into it.

    Raises UserError where there are checkpoints and every one is refused."""
    refused: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = verify_checkpoint(path)
        except UserError as error:
            refused[path] = str(error)
            continue
        for corrupt in refused:
            aside = corrupt.with_name(f"corrupt-{corrupt.name}")
            shutil.rmtree(aside, ignore_errors=True)
            corrupt.rename(aside)
        return checkpoint, list(refused.values())
    if refused:
        raise UserError("no checkpoint of the run is whole, so it cannot resume:\n  " + "\n  ".join(refused.values()))
    return None, []


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest score, the later one of two equals; None where none has a score."""
    scored: list[tuple[float, Path]] = []
    for path in list_checkpoints(folder):
        with contextlib.suppress(UserError):  # a corrupt one cannot be the best
            score = _read_manifest(path)["score"]
            if score is not None:
                scored.append((score, path))
    return max(scored)[1] if scored else None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best one."""
    paths = list_checkpoints(folder)
    best = best_checkpoint(folder)
    for path in paths[:-keep]:
        if path != best:
            # Renamed first, because a half-deleted folder must not look like a torn checkpoint.
            doomed = path.with_name(f".tmp-{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
