"""A layer's RMSNorm and gated MLP in fewer passes over memory than transformers takes, as functions of tensors.

Values are rounded where vLLM rounds them. `grpo.policy.patches` puts these functions into transformers' layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.policy.lora import (
    Adapted,
    adapter_weights,
    flattened,
    gradient_of_shrunk,
    gradient_of_x,
    gradients_of_adapters,
    products,
    unflattened,
)
from grpo_kernels.swiglu import swiglu, swiglu_backward_

MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2")
"""model_type in the transformers configs of the models whose layers are patched (`grpo.policy.patches`)"""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, by torch's kernel; transformers writes x to memory in fp32 several times.

    x: [..., hidden], in the dtype of weight: [hidden]."""
    with torch.autocast(x.device.type, enabled=False):  # it may ask for fp32, in which the kernel computes anyway
        # Rounded before the weight is multiplied as well, as transformers and vLLM do: with one rounding less the
        # trainer would be further from the sampler.
        return F.rms_norm(x, weight.shape, None, epsilon) * weight


def gated_mlp(x: Tensor, layers: Sequence[Adapted], *, skip_output: bool = False) -> Tensor:
    """down(silu(gate(x)) * up(x)) for adapted NF4 layers, differentiable in x and the adapters, once.

    x: [..., hidden]. layers: gate, up and down, or gate and up as one layer, and down. skip_output: leave the result
    uninitialized, for a caller who needs its gradients alone. Returns [..., hidden]."""
    return _GatedMLP.apply(x, layers, skip_output, *adapter_weights(layers))


def gate_and_up(results: Sequence[Tensor]) -> Sequence[Tensor]:
    """gate and up from the results of two layers, or of the one layer that makes both."""
    return results if len(results) == 2 else results[0].chunk(2, dim=-1)


class _GatedMLP(torch.autograd.Function):
    """See `gated_mlp`.

    The product silu(gate) * up is computed again in the backward pass rather than kept, and is written over its own
    gradient; the gradients of gate and up are written over gate and up. A layer's backward pass takes most memory here.
    Hence autograd refuses a second backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Adapted], skip_output: bool, *weights: Tensor) -> Tensor:
        flat = flattened(x)
        *first, down = layers
        results, saved = products(flat, first)
        [y], saved_down = products(swiglu(*gate_and_up(results)), [down], skip_output=skip_output)
        ctx.save_for_backward(flat, *results, *saved, *saved_down)
        ctx.layers, ctx.like = layers, (x.shape, x.dtype)
        return unflattened(y, x.shape, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        *first, down = ctx.layers
        needs_x, _, _, *needs = ctx.needs_input_grad
        x, *rest = ctx.saved_tensors
        results, saved, saved_down = rest[: len(first)], rest[len(first) : -3], rest[-3:]
        flat = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_shrunk = gradient_of_shrunk([flat], [down], saved_down)
        hidden = gradient_of_x([flat], grad_shrunk, [down], saved_down)
        gate, up = gate_and_up(results)
        swiglu_backward_(gate, up, hidden)  # from here on `results` are gradients, and `hidden` is silu(gate) * up
        found_down = gradients_of_adapters([flat], grad_shrunk, hidden, [down], saved_down, needs[-2:])
        del hidden  # as large as gate or up, and not needed for the rest
        grad_shrunk = gradient_of_shrunk(results, first, saved)
        grad_x = gradient_of_x(results, grad_shrunk, first, saved) if needs_x else None
        found = gradients_of_adapters(results, grad_shrunk, x, first, saved, needs[:-2])
        return None if grad_x is None else unflattened(grad_x, *ctx.like), None, None, *found, *found_down
