"""log softmax of a row of logits at one token, as a sampler wants it of each token it drew: one pass, nothing kept."""

from typing import Literal

import torch
from torch import Tensor

from grpo_kernels.backend import triton_or_torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None


def token_logprob(logits: Tensor, tokens: Tensor, *, backend: Literal["triton", "torch"] | None = None) -> Tensor:
    """logits[i, tokens[i]] - log(sum(exp(logits[i]))), nats: [rows] float32, computed in float32.

    logits: [rows, vocabulary] of a floating dtype, the last dimension contiguous; -inf is a token that cannot be.
    tokens: [rows], integers below the vocabulary's size. Not differentiable.
    backend: None picks Triton on CUDA, torch elsewhere. Raises ValueError, naming what does not fit."""
    if logits.dim() != 2 or tokens.shape != logits.shape[:1] or logits.stride(1) != 1 or not logits.shape[1]:
        raise ValueError(
            f"logits are {list(logits.shape)} with strides {logits.stride()}, tokens {list(tokens.shape)}: they must "
            "be [rows, vocabulary] with a contiguous last dimension, and [rows]"
        )
    if not logits.is_floating_point() or tokens.is_floating_point() or logits.device != tokens.device:
        raise ValueError(
            f"logits are {logits.dtype} on {logits.device}, tokens {tokens.dtype} on {tokens.device}: they must be "
            "floating and integers, on one device"
        )
    if triton_or_torch(backend, logits, triton is not None) == "torch":
        return token_logprob_reference(logits, tokens)
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(out):
        _token_logprob_kernel[(len(out),)](
            logits, tokens, out, logits.stride(0), tokens.stride(0), logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def token_logprob_reference(logits: Tensor, tokens: Tensor) -> Tensor:
    """The same by operations of torch, which write the row in float32 first."""
    wide = logits.float()
    return wide.gather(1, tokens.long()[:, None])[:, 0] - wide.logsumexp(1)


BLOCK, WARPS = 16_384, 16
"""logits a step: a row is one program's, and each step waits for its loads and a maximum once"""


if triton is not None:

    @triton.jit
    def _token_logprob_kernel(logits_ptr, tokens_ptr, out_ptr, stride, token_stride, vocabulary, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        lane = tl.arange(0, BLOCK)
        most = -1e30  # not -inf: a block of nothing but -inf would be nan
        sums = tl.zeros([BLOCK], dtype=tl.float32)  # relative to most, one a lane: added up once, at the end
        for start in range(0, vocabulary, BLOCK):
            inside = start + lane < vocabulary
            x = tl.load(logits_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(most, tl.max(x, 0))
            sums = sums * tl.exp(most - higher) + tl.exp(x - higher)
            most = higher
        token = tl.load(tokens_ptr + row * token_stride)
        chosen = tl.load(logits_ptr + token).to(tl.float32)
        tl.store(out_ptr + row, chosen - most - tl.log(tl.sum(sums, 0)))
