"""How much two models differ: their greedy completions of the same prompts, their log-probabilities, their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.lazy import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


class Behaviour(NamedTuple):
    """What a model does on some prompts, kept so that the model can leave memory before the next one is loaded."""

    completions: list[list[int]]
    """[prompts] token ids of its greedy completions"""
    logps: list[Tensor]
    """[prompts] of [time, vocabulary] float32, nats: its log-probabilities along some completions"""


class Difference(NamedTuple):
    """Two models on the same prompts: the greedy completions of the first, and how the second sees them."""

    equal: int
    """number of prompts whose greedy completions are the same"""
    prompts: int
    """number of prompts"""
    mean: float
    """mean |difference| of the log-probabilities of the first model's tokens, nats"""
    largest: float
    """largest |difference| of them, nats"""
    margin: float
    """where greedy completions part: by how much the first model prefers its own token to the second's, in nats; the
    largest over the prompts, 0 if none part. A small margin is a tie that rounding decides."""


def behaviour(
    model: Any,
    *,
    prompts: Sequence[list[int]],
    max_tokens: int,
    eos_ids: list[int],
    along: Sequence[list[int]] | None = None,
) -> Behaviour:
    """A model's greedy completions, and its log-probabilities along `along` (None: along its own completions).

    One prompt at a time, so that no padding takes part. max_tokens: of each completion."""
    completions, logps = [], []
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=model.device)
            settings = {"max_new_tokens": max_tokens, "eos_token_id": eos_ids, "pad_token_id": eos_ids[0]}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
            completions.append(out[0, len(prompt) :].tolist())
            judged = completions[i] if along is None else along[i]
            logits = model(torch.tensor([[*prompt, *judged]], device=model.device)).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.float().log_softmax(-1).cpu())
    return Behaviour(completions, logps)


def difference(first: Behaviour, second: Behaviour) -> Difference:
    """Compare two models. The log-probabilities of both must be along the completions of the first."""
    gaps, margins = [], [0.0]
    for a, b, logps_a, logps_b in zip(first.completions, second.completions, first.logps, second.logps):
        index = torch.tensor(a)[:, None]
        gaps.append((logps_a.gather(1, index) - logps_b.gather(1, index)).abs().flatten())
        for t, (x, y) in enumerate(zip(a, b)):
            if x != y:
                margins.append(float(logps_a[t, x] - logps_a[t, y]))
                break
    gap = torch.cat(gaps)
    equal = sum(a == b for a, b in zip(first.completions, second.completions))
    return Difference(equal, len(gaps), float(gap.mean()), float(gap.max()), max(margins))


def weight_changes(model: PeftModel) -> tuple[float, float]:
    """By how much the adapter moves the adapted weight matrices, and by how much NF4 would, relative to their norm.

    Frobenius norms over all adapted matrices together, from 16- or 32-bit weights that are not merged yet."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    total = by_adapter = by_nf4 = 0.0
    for module in model.modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        weight = module.get_base_layer().weight.detach()  # type: ignore[operator]
        total += float(weight.float().square().sum())
        by_adapter += float(module.get_delta_weight("default").detach().float().square().sum())  # type: ignore[operator]
        packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        by_nf4 += float((dequantize_4bit(packed, state).to(weight.dtype) - weight).float().square().sum())
    return (by_adapter / total) ** 0.5, (by_nf4 / total) ** 0.5


def describe(what: str, d: Difference) -> str:
    """One line per comparison."""
    ties = "" if d.equal == d.prompts else f" (where they part, by at most {d.margin:.4f} nats)"
    return (
        f"{what}: {d.equal} of {d.prompts} greedy completions equal{ties}; log-probabilities differ by "
        f"{d.mean:.5f} nats per token on average, {d.largest:.5f} at most"
    )
