"""Log-probability of one token per row of logits, in one pass over the row.

A sampler needs it for every token that it draws. Nothing is kept for a backward pass."""

from typing import Literal

import torch
from torch import Tensor

from grpo_kernels.backend import triton_or_torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None

BLOCK, WARPS = 16_384, 16
"""logits per step of the loop, and warps per program. Each row is one program, which waits for loads and for a maximum
once per step, so the steps are large."""


def token_logprob(logits: Tensor, tokens: Tensor, *, backend: Literal["triton", "torch"] | None = None) -> Tensor:
    """logits[i, tokens[i]] - log(sum(exp(logits[i]))) in nats: [rows] float32, computed in float32.

    logits: [rows, vocabulary] of a floating dtype, contiguous in the last dimension; -inf marks a forbidden token.
    tokens: [rows] integers below the vocabulary's size. Not differentiable.
    backend: None picks Triton on CUDA and torch elsewhere. Raises ValueError, naming the argument that does not fit."""
    if logits.dim() != 2 or tokens.shape != logits.shape[:1] or logits.stride(1) != 1 or not logits.shape[1]:
        raise ValueError(
            f"logits are {list(logits.shape)} with strides {logits.stride()}, tokens {list(tokens.shape)}: they must "
            "be [rows, vocabulary] with a contiguous last dimension, and [rows]"
        )
    if not logits.is_floating_point() or tokens.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}, tokens {tokens.dtype}: they must be floating point and integer")
    if triton_or_torch(backend, logits, triton is not None) == "torch":
        return token_logprob_reference(logits, tokens)
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(out):
        _token_logprob_kernel[(len(out),)](
            logits, tokens, out, logits.stride(0), tokens.stride(0), logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def token_logprob_reference(logits: Tensor, tokens: Tensor) -> Tensor:
    """The same in plain torch, which first writes the logits in float32."""
    logits = logits.float()
    return logits.gather(1, tokens.long()[:, None])[:, 0] - logits.logsumexp(1)


if triton is not None:

    @triton.jit
    def _token_logprob_kernel(logits_ptr, tokens_ptr, out_ptr, stride, token_stride, vocabulary, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        lane = tl.arange(0, BLOCK)
        maximum = -1e30  # finite, since a block that holds nothing but -inf would give NaN
        sums = tl.zeros([BLOCK], dtype=tl.float32)  # relative to the maximum, one per lane: added up once, at the end
        for start in range(0, vocabulary, BLOCK):
            inside = start + lane < vocabulary
            x = tl.load(logits_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(maximum, tl.max(x, 0))
            sums = sums * tl.exp(maximum - higher) + tl.exp(x - higher)
            maximum = higher
        token = tl.load(tokens_ptr + row * token_stride)
        chosen = tl.load(logits_ptr + token).to(tl.float32)
        tl.store(out_ptr + row, chosen - maximum - tl.log(tl.sum(sums, 0)))
