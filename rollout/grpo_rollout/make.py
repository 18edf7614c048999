"""Choosing an engine by name."""

import importlib.util
from typing import Any

from grpo_rollout.engine import Engine
from grpo_rollout.torch_engine import TorchEngine

ENGINES = ("auto", "vllm", "torch")


def make_engine(kind: str, model: Any, *, eos_ids: list[int], pad_id: int, **settings: Any) -> Engine:
    """The engine that --engine names, over the trainer's model: "torch", "vllm", or "auto", which is vLLM on a GPU
    where it is installed and torch elsewhere. Raises ValueError, naming the flag, for another name or where vLLM
    is asked for and missing."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind not in ENGINES:
        raise ValueError(f"--engine {kind}: no such engine; choose one of {', '.join(ENGINES)}")
    if kind == "vllm" and not installed:
        raise ValueError("--engine vllm: vLLM is not installed; pip install -e '.[vllm]', or take --engine torch")
    device = next(model.parameters()).device
    return TorchEngine(model, eos_ids=eos_ids, pad_id=pad_id, dequantize=device.type == "cpu", **settings)
