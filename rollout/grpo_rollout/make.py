"""Making the engine that a run samples with."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from grpo.errors import UserError
from grpo.runs.cli import check_vllm_installed, vllm_installed
from grpo.sampler import Engine, Rollout

if TYPE_CHECKING:
    from grpo_rollout.fit.plan import Card, Plan


def make_engine(
    model: Any, tokenizer: Any, rollout: Rollout, card: Card, plan: Plan | None = None, **settings: Any
) -> Engine:
    """The engine that --engine names, over the trainer's model: "torch", "vllm", or "auto", which is vLLM on a GPU
    where it is installed, and torch elsewhere.

    model: a policy of `load_policy`. tokenizer: its tokenizer, whose pad id is used, and its stop ids beside those that
    the model's folder names.
    rollout: its lengths size vLLM's memory. plan: gives the number of sequences at a time and the memory that the
    engine may fill; without one, the engine fits itself into what card.gpu_memory_gib leaves.
    settings: further arguments of VLLMEngine (sequences, tolerance, ...), which come before what plan and card say; the
    torch engine has no use for them.
    Raises UserError, naming the flag, for an unknown engine or where vLLM is asked for and missing; TypeError for a
    setting that VLLMEngine does not have, whichever engine is taken."""
    from grpo.policy.chat import stop_ids

    if settings:
        _check_settings(settings)
    if card.engine not in ("auto", "vllm", "torch"):
        raise UserError(f"--engine {card.engine}: there is no such engine; choose auto, vllm or torch")
    eos_ids = stop_ids(model.get_base_model().config._name_or_path, tokenizer)
    device = next(model.parameters()).device
    if card.engine == "vllm":
        check_vllm_installed()
    if card.engine == "torch" or (card.engine == "auto" and not (device.type == "cuda" and vllm_installed())):
        from grpo_rollout.torch.engine import TorchEngine

        return TorchEngine(model, eos_ids=eos_ids, pad_id=tokenizer.pad_token_id, dequantize=device.type == "cpu")

    from grpo_rollout.vllm.engine import VLLMEngine

    planned: dict[str, Any] = {
        "gpu_memory_gib": card.gpu_memory_gib,
        "kv_cache_dtype": card.kv_cache_dtype,
        "fused_nf4": card.fused_nf4,
    }
    if plan is not None:
        planned |= {"sequences": plan.sequences, "gpu_memory_gib": plan.engine_gib}
    return VLLMEngine(
        model,
        eos_ids=eos_ids,
        max_prompt_tokens=rollout.max_prompt_tokens,
        max_completion_tokens=rollout.max_completion_tokens,
        **(planned | settings),
    )


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise TypeError for names that are no settings of VLLMEngine, or that `make_engine` gives it itself."""
    from grpo_rollout.vllm.engine import VLLMEngine

    given = {"self", "model", "eos_ids", "max_prompt_tokens", "max_completion_tokens"}
    unknown = settings.keys() - (inspect.signature(VLLMEngine).parameters.keys() - given)
    if unknown:
        raise TypeError(f"VLLMEngine has no setting {', '.join(sorted(unknown))}")
