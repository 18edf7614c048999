"""Log-probabilities of completion tokens under a causal language model, without ever holding all its logits."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from grpo.batch import MicroBatch
from grpo.distributed import World
from grpo.objective import Objective, entropy_threshold
from grpo.policy.recompute import inputs_on_host
from grpo_kernels.linear_logprob import linear_logprob


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model (itself where there is none)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def last_hidden(model: nn.Module, ids: torch.Tensor, *, offload: bool = False, **inputs: Any) -> Any:
    """The backbone's output (its `last_hidden_state`: [batch, time, hidden], after the final norm), without the head.

    On CUDA under bf16 autocast: the adapter's master weights are fp32, the products are not.
    offload: what is kept for the backward pass waits in the host's pinned memory. Under gradient checkpointing that
    is each layer's input."""
    backbone = causal_lm(model).base_model
    kept = inputs_on_host(backbone, ids.device) if offload else contextlib.nullcontext()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"), kept:
        return backbone(input_ids=ids, **inputs)


def completion_logps(
    model: nn.Module,
    batch: MicroBatch,
    *,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    offload: bool = False,
    grad_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy at every completion token: log softmax(logits / temperature)[token].

    Returns (logps, entropy), each [batch, time] float32, nats, 0 at padding. logps is differentiable in the
    model's trainable weights; entropy too if `entropy_grad`. Only completion positions pass the head.
    grad_rows: [batch] bool, sequences whose gradient is wanted (`grpo.objective.rows_with_gradient`); the others' is
    zero, and the head's part of it is saved; where no sequence's is, the whole model's, and backward() through the
    result goes nowhere. None: all. Values are the same.
    offload: see `last_hidden`; for sequences so long that the layers' inputs are what fills the card.
    temperature must be the sampler's (> 0), or the ratio of trainer to sampler is not 1 on policy."""
    idle = grad_rows is not None and torch.is_grad_enabled() and not grad_rows.any()
    with torch.no_grad() if idle else contextlib.nullcontext():
        hidden = last_hidden(model, batch.ids, offload=offload, use_cache=False).last_hidden_state
    row, time = batch.mask.nonzero(as_tuple=True)
    position = batch.prompt_lengths[row] + time  # of the token itself; position - 1 predicts it
    head = causal_lm(model).get_output_embeddings()
    logps, entropy = linear_logprob(
        hidden[row, position - 1].to(head.weight.dtype),  # a final norm with fp32 weights gives fp32 under autocast
        head.weight,
        batch.ids[row, position],
        temperature=temperature,
        softcap=getattr(causal_lm(model).config, "final_logit_softcapping", None),
        bias=getattr(head, "bias", None),
        entropy_grad=entropy_grad,
        grad_rows=None if grad_rows is None else grad_rows[row],
    )
    empty = logps.new_zeros(batch.mask.shape, requires_grad=idle)
    return empty.index_put((row, time), logps), empty.index_put((row, time), entropy)


def step_entropy_threshold(
    model: nn.Module, micros: Sequence[MicroBatch], objective: Objective, *, temperature: float, world: World
) -> torch.Tensor | None:
    """The entropy from which on a token of this step counts as high (`grpo.objective.entropy_threshold`), by a pass of
    its own over the step's micro-batches; None, and no pass, where the objective does not ask for it."""
    if objective.top_entropy_quantile == 1:
        return None
    with torch.no_grad():
        entropies = [completion_logps(model, m, temperature=temperature)[1] for m in micros]
    return entropy_threshold(objective, entropies, [m.mask for m in micros], world)
