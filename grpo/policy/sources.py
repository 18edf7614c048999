"""Where a model comes from: a name on the hub, a transformers folder or a GGUF file; and the cache of made models."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import UserError, looks_like_path
from grpo.lazy import torch

T = TypeVar("T")


def resolve_model(model: str) -> str:
    """The transformers folder, or the name on the hub, that --model stands for.

    A GGUF file, or a folder that holds one and no config.json, is converted to a transformers folder once, which the
    cache keeps. Everything else is returned as it is.
    Raises UserError for a path at which there is no model."""
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_file():
        raise UserError(f"--model {model}: no such file; give a folder, a .gguf file or a name on the hub")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"--model {model}: of single files only .gguf can be read; give the model's folder")
        return str(_gguf_folder(path))
    if path.is_dir():
        if (path / "config.json").is_file():
            return model
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return str(_gguf_folder(ggufs[0]))
        problem = "has no config.json and no .gguf file" if not ggufs else "has several .gguf files"
        remedy = "give a model's folder" if not ggufs else "name one of them"
        raise UserError(f"--model {model}: the folder {problem}; {remedy}")
    if looks_like_path(model):
        raise UserError(f"--model {model}: no such folder; give a folder, a .gguf file or a name on the hub")
    return model


def load_from_hub(what: str, model: str, load: Callable[[], T]) -> T:
    """load(), a transformers loader, for `model`'s `what` ("tokenizer"); its many errors become one UserError."""
    try:
        return load()
    except OSError as error:
        raise UserError(
            f"--model {model}: could not load the {what}: neither a local folder nor a name that the hub knows "
            f"({str(error).splitlines()[0]}); give a folder with config.json, a .gguf file or a name on the hub"
        ) from error


def cache_dir() -> Path:
    """The folder of the models that this project makes: $XDG_CACHE_HOME (or ~/.cache) / grpo-recipes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo-recipes"


@contextlib.contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[str]:
    """A temporary folder to write into. It becomes `folder` where the block ends without an error, else it is removed,
    so that nobody ever reads half a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        yield temporary
        with contextlib.suppress(OSError):  # `folder` exists: another process was first, and its folder is as good
            os.rename(temporary, folder)
            os.mkdir(temporary)  # for TemporaryDirectory to remove


def _gguf_folder(path: Path) -> Path:
    """The folder with the bf16 transformers model that a GGUF file was dequantized to, made at the first call.

    transformers refuses to save a model that it loaded from GGUF, so a fresh model takes over the weights."""
    stat = path.stat()
    folder = cache_dir() / f"gguf-{path.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--model {path}: reading GGUF needs the package gguf: pip install -e '.[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    fresh: Any = type(loaded)(type(loaded.config)(**settings))
    fresh.load_state_dict(loaded.state_dict(), strict=True)
    fresh.tie_weights()
    with whole_or_not_at_all(folder) as temporary:
        fresh.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
