"""Log-probabilities of completion tokens under a causal language model, without ever holding all its logits."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from grpo.batch import MicroBatch
from grpo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model; a model that is not PEFT's itself."""
    get_base: Any = getattr(model, "get_base_model", None)
    return get_base() if get_base else model


def last_hidden(model: nn.Module, ids: Tensor, **inputs: Any) -> Any:
    """The backbone's output without the head; its `last_hidden_state` is [batch, time, hidden], after the final norm.

    On CUDA it runs under bf16 autocast: the adapter's master weights are fp32, the products are not.
    ids: [batch, time] int64. inputs: further arguments of the backbone."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return causal_lm(model).base_model(input_ids=ids, **inputs)


def completion_logps(
    model: nn.Module, micro: MicroBatch, *, temperature: float = 1.0, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at every completion token: log softmax(logits / temperature)[token].

    Returns (logps, entropy), each [batch, time] float32, nats, 0 at padding. logps is differentiable in the model's
    trainable weights; entropy, too, if `entropy_grad`. Only completion positions pass the head.
    Sequences that need no gradient (`micro.needs_grad`) save the head's part of it; where none of them needs one, the
    backward pass through the whole model is saved, and backward() through the result goes nowhere. Values are the same.
    temperature must be the sampler's (> 0), or the ratio of trainer to sampler is not 1 on policy."""
    from grpo_kernels.linear_logprob import linear_logprob

    needs_grad = micro.needs_grad if torch.is_grad_enabled() else None
    no_gradient = needs_grad is not None and not needs_grad.any()
    with torch.no_grad() if no_gradient else contextlib.nullcontext():
        hidden = last_hidden(model, micro.ids, use_cache=False).last_hidden_state
    row, time = micro.mask.nonzero(as_tuple=True)
    position = micro.prompt_lengths[row] + time  # of the token itself; the hidden state before it predicts it
    head = causal_lm(model).get_output_embeddings()
    logps, entropy = linear_logprob(
        hidden[row, position - 1].to(head.weight.dtype),  # a final norm with fp32 weights gives fp32 under autocast
        head.weight,
        micro.ids[row, position],
        temperature=temperature,
        softcap=getattr(causal_lm(model).config, "final_logit_softcapping", None),
        bias=getattr(head, "bias", None),
        entropy_grad=entropy_grad,
        grad_rows=None if needs_grad is None else needs_grad[row],
    )
    empty = logps.new_zeros(micro.mask.shape, requires_grad=no_gradient)
    return empty.index_put((row, time), logps), empty.index_put((row, time), entropy)
