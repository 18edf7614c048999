"""Checkpoints that are whole or absent: safetensors and JSON only, written aside, checksummed, then renamed.

checkpoints/step-000050/
    adapter/adapter_model.safetensors    the trainable weights; with adapter_config.json peft and vLLM load it
    training.safetensors                 optimizer state, random-number states
    manifest.json                        a line with the SHA-256 of the rest; the rest of the state as JSON, and
                                         the SHA-256 of every other file
"""

import contextlib
import copy
import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class Checkpoint(NamedTuple):
    """A checkpoint whose files match their checksums."""

    path: Path
    step: int
    """optimizer steps done"""
    score: float | None
    """what "best" is decided by; None: not measured yet"""
    state: dict[str, Any]
    """what `save_checkpoint` was given as `state`"""


# ------------------------------------------------------------------------------------------ state as JSON + tensors


def split_tensors(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON form of nested dicts, lists, tuples and scalars; each tensor goes to `tensors` under the name of its
    place in the tree. `join_tensors` is the inverse, to the bit and to the type (tuples, integer keys).

    Raises TypeError, naming the place, for anything else: it could be stored only by pickling."""
    if isinstance(tree, torch.Tensor):
        # Cloned: safetensors refuses tensors that share memory, as 8-bit optimizers' quantization maps do.
        tensors[prefix] = tree.detach().to("cpu", copy=True).contiguous()
        return {"__tensor__": prefix}
    if isinstance(tree, Mapping):
        keys = [k if isinstance(k, str) else {"__int__": k} for k in tree]
        if any(not isinstance(k, (str, int)) for k in tree):
            raise TypeError(f"{prefix}: a key of this dictionary is neither a string nor an integer")
        items = [split_tensors(v, f"{prefix}.{k}", tensors) for k, v in tree.items()]
        if all(isinstance(k, str) for k in tree):
            return dict(zip(tree, items))
        return {"__items__": [[k, v] for k, v in zip(keys, items)]}
    if isinstance(tree, tuple):
        return {"__tuple__": [split_tensors(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]}
    if isinstance(tree, list):
        return [split_tensors(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{prefix}: a {type(tree).__name__} cannot be stored without pickle; store numbers, text, tensors")


def join_tensors(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `split_tensors`."""
    if isinstance(tree, list):
        return [join_tensors(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if "__tuple__" in tree:
        return tuple(join_tensors(v, tensors) for v in tree["__tuple__"])
    if "__items__" in tree:
        pairs = ((k["__int__"] if isinstance(k, dict) else k, v) for k, v in tree["__items__"])
        return {k: join_tensors(v, tensors) for k, v in pairs}
    return {k: join_tensors(v, tensors) for k, v in tree.items()}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch's CPU and, where `device` is one, the GPU."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `rng_state`. A GPU state is passed over on a machine without one."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# --------------------------------------------------------------------------------------------- the trainable weights


def trainable_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable parameter under the name peft's adapter files use (the adapter's own name taken out)."""
    adapter = getattr(model, "active_adapter", None)
    infix = f".{adapter}." if isinstance(adapter, str) else None
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace(infix, ".") if infix else name: p for name, p in named}


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the trainable weights to `folder`/adapter_model.safetensors and, of a peft model, adapter_config.json.

    The folder then loads in peft, transformers and vLLM as it is. peft's own `save_pretrained` is not used: it
    may ask the hub about the base model's vocabulary, and orders target modules by hash, so differently each run.
    A frozen second adapter (the reference policy of a continued run) is not written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in trainable_state(model).items()}
    _save_tensors(tensors, folder / ADAPTER_WEIGHTS)
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
    """Copy the weights `save_adapter` wrote into the trainable parameters, in place: an optimizer keeps its hold.

    Raises ValueError, naming the first parameter, where names or shapes differ from the model's."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    parameters = trainable_state(model)
    for name in sorted(tensors.keys() ^ parameters.keys()):
        where = "the model has no such trainable parameter" if name in tensors else "the file lacks it"
        raise ValueError(f"{folder}: {name}: {where}; model, LoRA rank and targets must be those of the run")
    with torch.no_grad():
        for name, p in parameters.items():
            if tensors[name].shape != p.shape:
                raise ValueError(
                    f"{folder}: {name} is {list(tensors[name].shape)}, the model's is {list(p.shape)}; "
                    "model, LoRA rank and targets must be those of the run"
                )
            p.copy_(tensors[name])


# ------------------------------------------------------------------------------------------------ files that last


def fsync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a directory's entries, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors' save_file, with a full disk as the OSError it is, and readable by others like any file."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if f"os error {number}" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from None
        raise
    path.chmod(0o644)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader, or a crash, sees the old text or the new, never half of it."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ whole checkpoints


def checkpoint_name(step: int) -> str:
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
    """Write `folder`/step-NNNNNN so that it is whole or absent, whenever the process or the machine dies.

    scheduler: anything with state_dict, or None. rng: `rng_state` of every rank. state: JSON-able, the caller's.
    Raises OSError (a full disk, say); nothing is left behind then, and the checkpoints before are untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(step)
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_adapter(model, temporary / "adapter")
        tensors: dict[str, torch.Tensor] = {}
        trees = {
            "optimizer": split_tensors(optimizer.state_dict(), "optimizer", tensors),
            "scheduler": split_tensors(scheduler.state_dict() if scheduler else None, "scheduler", tensors),
            "rng": split_tensors(rng, "rng", tensors),
        }
        _save_tensors(tensors, temporary / "training.safetensors")
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in files:
            fsync(path)
        sums = {path.relative_to(temporary).as_posix(): file_sha256(path) for path in files}
        manifest = {"schema": 1, "step": step, "score": score, "state": state, "sha256": sums, **trees}
        body = json.dumps(manifest)
        head = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
        write_text(temporary / MANIFEST, f"{head}\n{body}")
        fsync(temporary / "adapter")
        fsync(temporary)
        if final.exists():  # of an earlier attempt at this step
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        head, body = (path / MANIFEST).read_text(encoding="utf-8").split("\n", 1)
        if json.loads(head)["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            raise ValueError("its checksum does not match")
        return json.loads(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} is torn or corrupt: {MANIFEST}: {error}") from None


def verify_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its checksum.

    Raises ValueError, naming the checkpoint and the file, where one is missing or differs."""
    manifest = _read_manifest(path)
    for name, expected in manifest["sha256"].items():
        try:
            actual = file_sha256(path / name)
        except OSError as error:
            raise ValueError(f"checkpoint {path} is torn or corrupt: {name}: {error.strerror}") from None
        if actual != expected:
            raise ValueError(f"checkpoint {path} is torn or corrupt: {name}: its checksum does not match")
    return Checkpoint(path, manifest["step"], manifest["score"], manifest["state"])


def restore_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, *, rank: int, device: torch.device
) -> None:
    """Bring model, optimizer, scheduler and this rank's random-number generators to a checkpoint's state.

    The learning rate is the one that `optimizer` was made with, at the schedule's place: a resume may give another.
    A rank the checkpoint does not know (more processes than then) keeps the generators it has."""
    manifest = _read_manifest(path)
    tensors = load_file(path / "training.safetensors")
    load_adapter(model, path / "adapter")
    wanted = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(join_tensors(manifest["optimizer"], tensors))
    if scheduler is not None:
        scheduler.load_state_dict(join_tensors(manifest["scheduler"], tensors))
    for i, (group, lr) in enumerate(zip(optimizer.param_groups, wanted)):
        before = group.get("initial_lr", group["lr"])
        if lr == before:
            continue
        group["lr"] *= lr / before  # schedules multiply the rate they begin with
        if scheduler is not None:
            group["initial_lr"] = scheduler.base_lrs[i] = lr
            scheduler._last_lr[i] = group["lr"]
    rng = join_tensors(manifest["rng"], tensors)
    if rank < len(rng):
        set_rng_state(rng[rank], device)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None where there is none at all; and one message for each newer one
    refused, which is renamed to corrupt-step-..., out of the way of the run, for a post-mortem.

    Raises ValueError where there are checkpoints and every one is refused."""
    refused: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = verify_checkpoint(path)
        except ValueError as error:
            refused[path] = str(error)
            continue
        for corrupt in refused:
            aside = corrupt.with_name(f"corrupt-{corrupt.name}")
            shutil.rmtree(aside, ignore_errors=True)
            corrupt.rename(aside)
        return checkpoint, list(refused.values())
    if refused:
        raise ValueError("no checkpoint of the run is whole, so it cannot resume:\n  " + "\n  ".join(refused.values()))
    return None, []


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest score, the later one of two equals; None where none has a score."""
    scored: list[tuple[float, Path]] = []
    for path in list_checkpoints(folder):
        with contextlib.suppress(ValueError):  # a corrupt one cannot be the best
            score = _read_manifest(path)["score"]
            if score is not None:
                scored.append((score, path))
    return max(scored)[1] if scored else None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best."""
    paths = list_checkpoints(folder)
    best = best_checkpoint(folder)
    for path in paths[:-keep]:
        if path != best:
            # Renamed first: a half-deleted folder must not pass for a torn checkpoint.
            doomed = path.with_name(f".tmp-{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
