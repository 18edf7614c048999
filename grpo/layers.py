"""A transformers model's layers in fewer passes over memory, for training: norms, gated MLPs, adapted 4-bit layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP, Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from grpo.lora import fuse_adapters
from grpo_kernels.swiglu import swiglu

NORMS = (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm)
MLPS = (LlamaMLP, MistralMLP, Phi3MLP, Qwen2MLP)
MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2")
"""of a transformers config: models whose layers are of these classes"""
SILU = (nn.SiLU, type(ACT2FN["silu"]))


class Fused(NamedTuple):
    """How many layers of each kind were taken over."""

    adapters: int
    norms: int
    mlps: int


def fuse_layers(model: PeftModel) -> Fused:
    """Take over the forward of the layers whose classes are known exactly; others stay as they are.

    RMSNorm by torch's own kernel: transformers writes the activations in fp32 several times. silu(gate) * up by
    `grpo_kernels.swiglu`. Adapted 4-bit layers by `fuse_adapters`, which raises ValueError for another PEFT than it
    knows. Values are rounded where transformers rounds them, the adapters' less often; parameters, names and files stay
    as they are. A second call finds nothing left."""
    norms = [m for m in model.modules() if type(m) in NORMS]
    mlps = [m for m in model.modules() if type(m) in MLPS and isinstance(_activation(m), SILU)]
    for norm in norms:
        norm.__class__ = _subclass(type(norm), _norm)
    for mlp in mlps:
        mlp.__class__ = _subclass(type(mlp), _mlp)
    return Fused(fuse_adapters(model), len(norms), len(mlps))


def _subclass(kind: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """Of the same name. (A `forward` of the instance's own would be a cycle, and keep the weights after the model.)"""
    return type(kind.__name__, (kind,), {"forward": forward})


def _activation(mlp: Any) -> Any:
    return mlp.activation_fn if isinstance(mlp, Phi3MLP) else mlp.act_fn


def _norm(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != norm.weight.dtype:  # transformers then returns the wider of the two
        return super(type(norm), norm).forward(x)
    with torch.autocast(x.device.type, enabled=False):  # which may ask for fp32, as the kernel computes in anyway
        # Rounded before the weight as well, as transformers and vLLM do: one rounding less is further from the sampler.
        return F.rms_norm(x, norm.weight.shape, None, norm.variance_epsilon) * norm.weight


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    if isinstance(mlp, Phi3MLP):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if gate.dtype != up.dtype:  # one in 4 bits, one not: torch takes the wider
        return mlp.down_proj(F.silu(gate) * up)
    return mlp.down_proj(swiglu(gate, up))
