"""Choosing an engine by name."""

import inspect
from typing import Any

from grpo.runs.cli import check_vllm_installed, vllm_installed
from grpo_rollout.engine import Engine
from grpo_rollout.torch.engine import TorchEngine
from grpo_rollout.vllm.engine import VLLMEngine

ENGINES = ("auto", "vllm", "torch")


def make_engine(
    kind: str,
    model: Any,
    *,
    eos_ids: list[int],
    pad_id: int,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    **settings: Any,
) -> Engine:
    """The engine that --engine names, over the trainer's model: "torch", "vllm", or "auto", which is vLLM on a GPU
    where it is installed and the lengths are given, and torch elsewhere.

    max_prompt_tokens, max_completion_tokens: of any later call; vLLM needs them to size its memory.
    settings: of VLLMEngine (sequences, gpu_memory_gib, kv_cache_dtype, ...); the torch engine has no use for them.
    Raises ValueError, naming the flag, for another name or where vLLM is asked for and missing; TypeError for a
    setting that VLLMEngine has not, whichever engine is taken."""
    unknown = settings.keys() - inspect.signature(VLLMEngine).parameters.keys()
    if unknown:
        raise TypeError(f"VLLMEngine has no setting {', '.join(sorted(unknown))}")
    if kind not in ENGINES:
        raise ValueError(f"--engine {kind}: no such engine; choose one of {', '.join(ENGINES)}")
    device = next(model.parameters()).device
    sized = max_prompt_tokens is not None and max_completion_tokens is not None
    if kind == "vllm":
        check_vllm_installed()
    if kind == "vllm" and not sized:
        raise ValueError("--engine vllm needs max_prompt_tokens and max_completion_tokens: it sizes its memory by them")
    if kind == "vllm" or (kind == "auto" and vllm_installed() and sized and device.type == "cuda"):
        return VLLMEngine(
            model,
            eos_ids=eos_ids,
            max_prompt_tokens=max_prompt_tokens or 0,
            max_completion_tokens=max_completion_tokens or 0,
            **settings,
        )
    return TorchEngine(model, eos_ids=eos_ids, pad_id=pad_id, dequantize=device.type == "cpu")
