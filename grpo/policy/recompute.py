"""Gradient checkpointing of decoder layers: less work for the host than torch's, nothing computed that no one reads,
and inputs that wait in the host's memory without anyone waiting for them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from grpo.policy.lora import FusedLinear4bit

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Phi3DecoderLayer, Qwen2DecoderLayer)
"""layers that return one tensor, the residual plus what `mlp.down_proj` made, and need no value of the latter"""


def checkpoint_layers(model: PeftModel) -> int:
    """Let the checkpointed layers whose classes are known exactly be recomputed by `ActivationCheckpoint`; returns how
    many are. Others, and those that keep their activations, stay as they are. Call it when adapters are in place."""
    layers: list[Any] = [m for m in model.modules() if type(m) in LAYERS and m.gradient_checkpointing]
    for layer in layers:
        layer._gradient_checkpointing_func = ActivationCheckpoint(layer.mlp.down_proj)
    return len(layers)


class ActivationCheckpoint:
    """What a transformers layer calls in the place of `torch.utils.checkpoint`: only its input is kept, and the
    backward pass begins with a second forward pass. As there with use_reentrant and without preserve_rng_state,
    gradients go to the parameters' `grad`, autocast is as in the first pass, and nothing random is replayed.

    last: the layer's last product; in the second pass its result is not computed, where that is `FusedLinear4bit`."""

    def __init__(self, last: nn.Module):  # and not the layer: that would be a cycle, and keep it after the model
        self.last = last if isinstance(last, FusedLinear4bit) else None
        self.host: OffloadedInputs | None = None

    def __call__(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """run(hidden), [batch, time, hidden]; without gradient, or where the input asks for none, nothing more."""
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return run(hidden)
        return _CheckpointedLayer.apply(hidden, run, self.last, self.host)


def offload_inputs(backbone: nn.Module) -> None:
    """From here on every forward pass of the backbone that records gradients keeps the layers' inputs in host memory
    until the backward pass.

    It is two hooks of the backbone, so that nothing at the call sites knows of it. A layer's second forward pass does
    not run the backbone, so it triggers nothing."""
    hooks = _OffloadHooks()
    backbone.register_forward_pre_hook(hooks.before)
    backbone.register_forward_hook(hooks.after, always_call=True)


class _OffloadHooks:
    """What `offload_inputs` calls before and after each forward pass of the backbone."""

    def __init__(self) -> None:
        self.open: contextlib.ExitStack | None = None

    def before(self, backbone: nn.Module, args: Any) -> None:
        self.close()  # of a forward pass that a signal's exception ended: torch runs no hook then
        if torch.is_grad_enabled():
            self.open = contextlib.ExitStack()
            self.open.enter_context(_inputs_on_host(backbone, next(backbone.parameters()).device))

    def after(self, backbone: nn.Module, args: Any, output: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.open is not None:
            self.open.close()
            self.open = None


@contextlib.contextmanager
def _inputs_on_host(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, a forward pass keeps the layers' inputs in the host's memory until the backward pass.

    Those of a model that has no `ActivationCheckpoint` too, with all else it keeps, but there the host waits for each
    copy."""
    functions = [getattr(layer, "_gradient_checkpointing_func", None) for layer in getattr(backbone, "layers", ())]
    own = [function for function in functions if isinstance(function, ActivationCheckpoint)]
    if not own:
        with torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"):
            yield
        return
    host = OffloadedInputs(device)
    try:
        for function in own:
            function.host = host
        yield
    finally:
        for function in own:
            function.host = None


class OffloadedInputs:
    """The inputs of one forward pass's layers, in the host's memory. On a GPU the copies run beside the computation: an
    input leaves during its layer's forward pass and comes back during the backward pass of the layer after it."""

    def __init__(self, device: torch.device):
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.far: list[Tensor | None] = []
        """[layers], pinned on a GPU; None: was brought back"""
        self.near: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        """layer -> what is on the device, and when its copy is done: two at most"""

    def put(self, hidden: Tensor) -> int:
        """Begin to copy; returns the layer's number, for `get`. The last layer's stays here too: it is wanted first."""
        layer = len(self.far)
        if layer:
            # Waiting on the GPU, not here, and not `record_stream`, after which memory is free again when the host
            # sees that the copy is done: a host far ahead of the GPU would let all the inputs pile up.
            self._wait(self.near.pop(layer - 1)[1])
        far = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self.side is not None)
        # Detached: with its history it would hold the graph that holds this object, and neither would ever go.
        self.near[layer] = (hidden.detach(), self._copy(far, hidden))
        self.far.append(far)
        return layer

    def get(self, layer: int) -> Tensor:
        """The input of this layer; that of the layer before is on its way afterwards."""
        hidden, done = self.near.pop(layer) if layer in self.near else self._fetch(layer)
        if layer:
            self.near[layer - 1] = self._fetch(layer - 1)
        self._wait(done)
        self.far[layer] = None
        return hidden

    def _fetch(self, layer: int) -> tuple[Tensor, torch.cuda.Event | None]:
        far = self.far[layer]
        if far is None:
            raise RuntimeError("the layers' inputs were brought back already: one backward pass is all there is")
        device = "cpu" if self.side is None else self.side.device
        near = torch.empty(far.shape, dtype=far.dtype, device=device)  # the computation's stream's, which frees it
        return near, self._copy(near, far)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        if self.side is None:
            target.copy_(source)
            return None
        self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
            return self.side.record_event()

    def _wait(self, done: torch.cuda.Event | None) -> None:
        if self.side is not None and done is not None:
            torch.cuda.current_stream(self.side.device).wait_event(done)


class _CheckpointedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, run: Any, last: FusedLinear4bit | None, host: OffloadedInputs | None
    ) -> Tensor:
        device = hidden.device.type
        ctx.run, ctx.last, ctx.host = run, last, host
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        if host is None:
            ctx.save_for_backward(hidden)
        else:
            ctx.layer = host.put(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("a recomputed layer's gradients go to its parameters: call backward(), without inputs")
        [hidden] = ctx.saved_tensors if ctx.host is None else [ctx.host.get(ctx.layer)]
        hidden = hidden.detach().requires_grad_()
        unread = contextlib.nullcontext() if ctx.last is None else ctx.last.unread()
        with torch.enable_grad(), torch.autocast(**ctx.autocast), unread:
            edge = torch.autograd.graph.get_gradient_edge(ctx.run(hidden))  # and not the result, which no one reads
        torch.autograd.backward(edge, grad)
        return hidden.grad, None, None, None
