"""Activation checkpointing of decoder layers, with fewer Python calls than torch.utils.checkpoint, without the unused
last product of the second forward pass, and with optional asynchronous offloading of the layers' inputs to host memory.

`grpo.policy.patches` puts it into transformers' layers.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class ActivationCheckpoint:
    """What a transformers layer calls in place of `torch.utils.checkpoint`: it keeps the layer's input alone, and the
    backward pass begins with a second forward pass.

    It behaves as torch's with use_reentrant=True and preserve_rng_state=False: gradients go to the parameters' `grad`,
    autocast is as in the first pass, and no random state is replayed.

    skip_output: makes the context of the second forward pass, in which the layer's last product need not be computed,
        since only gradients are wanted of it. It must not hold the layer itself, which holds this object: the cycle
        would keep the layer's weights after the model is dropped."""

    def __init__(self, skip_output: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext):
        self.skip_output = skip_output
        self.offloaded: OffloadedInputs | None = None
        """where inputs wait, during a forward pass under `offloading`; None: on the device"""

    def __call__(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """run(hidden): [batch, time, hidden]. Nothing is kept where no gradient is recorded."""
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return run(hidden)
        return _CheckpointedLayer.apply(hidden, run, self.skip_output, self.offloaded)


class _CheckpointedLayer(torch.autograd.Function):
    """See `ActivationCheckpoint`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Any, skip_output: Any, offloaded: "OffloadedInputs | None") -> Tensor:
        device = hidden.device.type
        ctx.run, ctx.skip_output, ctx.offloaded = run, skip_output, offloaded
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        if offloaded is None:
            ctx.save_for_backward(hidden)
        else:
            ctx.layer = offloaded.put(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("a checkpointed layer's gradients go to its parameters: call backward(), without inputs")
        [hidden] = ctx.saved_tensors if ctx.offloaded is None else [ctx.offloaded.get(ctx.layer)]
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**ctx.autocast), ctx.skip_output():
            # The edge alone, so that the result's memory is free during the layer's backward pass.
            edge = torch.autograd.graph.get_gradient_edge(ctx.run(hidden))
        torch.autograd.backward(edge, grad)
        return hidden.grad, None, None, None


@contextlib.contextmanager
def offloading(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, a forward pass keeps the inputs of checkpointed layers in host memory until the backward pass.

    Where no layer has an `ActivationCheckpoint`, everything that the forward pass keeps goes there, and the host waits
    for each copy."""
    functions = [getattr(layer, "_gradient_checkpointing_func", None) for layer in getattr(backbone, "layers", ())]
    checkpoints = [function for function in functions if isinstance(function, ActivationCheckpoint)]
    if not checkpoints:
        with torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"):
            yield
        return
    offloaded = OffloadedInputs(device)
    try:
        for checkpoint in checkpoints:
            checkpoint.offloaded = offloaded
        yield
    finally:
        for checkpoint in checkpoints:
            checkpoint.offloaded = None


class OffloadedInputs:
    """The inputs of the layers of one forward pass, in host memory.

    On a GPU the copies run beside the computation: a layer's input leaves during the layer's forward pass, and returns
    during the backward pass of the layer after it."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.on_host: list[Tensor | None] = []
        """[layers] inputs, pinned on a GPU; None for an input that was brought back"""
        self.on_device: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        """layer -> its input on the device, and the event of the copy's end; two layers at most"""

    def put(self, hidden: Tensor) -> int:
        """Begin to copy the next layer's input to the host; returns the layer's number, for `get`.

        The last layer's input stays on the device as well, since the backward pass needs it first."""
        layer = len(self.on_host)
        if layer:
            # The GPU waits here, not the host. `record_stream` would free the memory only when the host sees that the
            # copy is done: with a host far ahead of the GPU all the inputs would pile up.
            self._wait(self.on_device.pop(layer - 1)[1])
        on_host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self.stream is not None)
        # Detached, since the graph holds this object: with its history the input would hold the graph, a cycle.
        self.on_device[layer] = (hidden.detach(), self._copy(on_host, hidden))
        self.on_host.append(on_host)
        return layer

    def get(self, layer: int) -> Tensor:
        """The input of this layer, on the device. Begins to copy the input of the layer before it."""
        hidden, done = self.on_device.pop(layer) if layer in self.on_device else self._fetch(layer)
        if layer:
            self.on_device[layer - 1] = self._fetch(layer - 1)
        self._wait(done)
        self.on_host[layer] = None
        return hidden

    def _fetch(self, layer: int) -> tuple[Tensor, torch.cuda.Event | None]:
        on_host = self.on_host[layer]
        if on_host is None:
            raise RuntimeError("the layers' inputs were brought back already: there can be only one backward pass")
        device = "cpu" if self.stream is None else self.stream.device
        # Allocated on the computation's stream, which also frees it.
        on_device = torch.empty(on_host.shape, dtype=on_host.dtype, device=device)
        return on_device, self._copy(on_device, on_host)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy after what the current stream has queued; returns the event of the copy's end."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _wait(self, done: torch.cuda.Event | None) -> None:
        """Let the current stream wait for a copy's end."""
        if self.stream is not None and done is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(done)
