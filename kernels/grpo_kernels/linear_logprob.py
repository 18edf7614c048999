"""Log-probabilities and entropies of target tokens from hidden states, without ever holding the logits.

For a row h and a head W, z_j = cap(h . W_j + bias_j) / temperature with cap(x) = softcap * tanh(x / softcap):

    logp    = z_t - logsumexp(z)                            d logp / d z_j = [j = t] - p_j
    entropy = logsumexp(z) - sum_j p_j z_j                  d entropy / d z_j = -p_j (log p_j + entropy)

The forward pass (`_forward`):

    for each chunk of rows of hidden:             part [rows, hidden]
        for each block of the vocabulary:         block [columns, hidden] of the head
            logits = part @ block^T               a tile [rows, columns] in fp32, which stays in the L2 cache
               |
            row kernel: z = scaled, capped logits
               |------>  state [4, rows]: maximum of z, sum of 2^(z - maximum), weighted sum, z of the target
               v
            powers = 2^(z - maximum) cap'(z)      in the memory of the tile, in the head's dtype
               |
            factor += powers @ block              [rows, hidden] in fp32, only for rows that need a gradient

The matrix products are the vendor's library's, with fp32 output. The row kernel (Triton on CUDA, torch elsewhere)
keeps a running maximum and running sums, as flash attention does, and brings factor to each new maximum. z is in bits
(times log2 e), since the GPU's exponential is 2^x. The loops of the backward pass look alike, with dz in the place of
the powers (`_hidden_gradient`, and for the head `_head_gradient` with its two loops swapped).

Which products are computed (one product is 2 * tokens * hidden * vocab operations):

    no gradient     1   logits
    default         2   logits; powers @ W, accumulated into factor, from which d logp / d hidden follows. The backward
                        pass is then one scale per row.
    low_memory      3   logits; in the backward pass logits again, then dz @ W. Only a few numbers per row are kept.
                        The same with entropy_grad, where two upstream gradients meet.
    weight gradient 2   more, in the backward pass: logits again, then dz^T @ hidden

The target's own column is left out of the sums and of the powers: logp = -softplus(logsumexp over the others - z_t) and
1 - p_t = -expm1(logp) keep their relative precision where the target has nearly all the probability.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.backend import triton_or_torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS: the row steps in torch are used
    triton = None

LOG2E = math.log2(math.e)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    entropy_grad: bool = False,
    grad_rows: Tensor | None = None,
    low_memory: bool = False,
    backend: Literal["triton", "torch"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row's distribution, from hidden states.

    Args:
        hidden: [tokens, hidden] bfloat16, float16, float32, or float64 (then everything is float64, in torch).
        weight: [vocab, hidden], the head, in hidden's dtype. It gets a gradient if it requires one.
        targets: [tokens] int64 in [0, vocab). On CUDA the range is not checked, since that would wait for the device.
        temperature: positive number that divides the logits, after the softcap.
        softcap: bound of the logits, which become softcap * tanh(logits / softcap) first (Gemma 2). None: no bound.
        bias: [vocab], added to the logits. It gets a gradient if it requires one.
        entropy_grad: make the entropy differentiable, for an entropy bonus. It costs a third product, as low_memory
            does.
        grad_rows: [tokens] bool, the rows that need a gradient; that of the others is zero, and their second product is
            saved. Meant for rows of zero advantage, if no KL and no entropy bonus gives them one. None: all rows.
        low_memory: keep no [tokens, hidden] factor for the backward pass, which computes the logits again instead.
        backend: implementation of the row kernels; None picks Triton on CUDA and torch elsewhere.

    Returns:
        logps: [tokens] float32, nats.
        entropy: [tokens] float32, nats; detached unless entropy_grad.

    Raises:
        ValueError: a shape, dtype or value does not fit; the message names the argument.
    """
    _check(hidden, weight, targets, temperature, softcap, bias, grad_rows)
    supported = triton is not None and hidden.dtype != torch.float64
    backend = triton_or_torch(backend, hidden, supported, "needs Triton, not for float64")
    options = _Options(LOG2E / temperature, softcap, backend == "triton", entropy_grad or low_memory, entropy_grad)
    return _LinearLogprob.apply(hidden, weight, bias, targets, grad_rows, options)


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain formula with all logits in memory, for tests: (logps, entropy), both differentiable.

    Shapes and dtypes are those of `linear_logprob`; the arithmetic is float32, or float64 for float64 inputs."""
    dtype = _accumulator_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    bias: Tensor | None,
    grad_rows: Tensor | None,
) -> None:
    """Raise ValueError where an argument would give wrong values, or a kernel would read beyond a tensor."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be positive; for greedy sampling use temperature=1 here")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, must be positive; None switches it off")
    if hidden.dim() != 2 or hidden.shape[1:] != weight.shape[1:] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}, weight {weight.dtype} {list(weight.shape)}: they must be "
            "[tokens, hidden] and [vocab, hidden] of one dtype"
        )
    tokens, vocab = hidden.shape[:1], weight.shape[:1]
    if targets.shape != tokens or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {list(targets.shape)}, must be int64 {list(tokens)}")
    if bias is not None and bias.shape != vocab:
        raise ValueError(f"bias is {list(bias.shape)}, must be [vocab] = {list(vocab)}")
    if grad_rows is not None and (grad_rows.shape != tokens or grad_rows.dtype != torch.bool):
        raise ValueError(f"grad_rows is {grad_rows.dtype} {list(grad_rows.shape)}, must be bool {list(tokens)}")
    if targets.device.type == "cpu" and targets.numel() and not (targets.min() >= 0 and targets.max() < len(weight)):
        raise ValueError(f"targets holds ids outside [0, {len(weight)}): drop prompt and padding positions first")


class _Options(NamedTuple):
    scale: float  # log2(e) / temperature: z = scale * capped logits, in bits
    softcap: float | None
    kernels: bool  # whether the row steps are Triton kernels rather than torch operations
    recompute: bool  # whether the backward pass computes the logits again, rather than keeping the factor
    entropy_grad: bool


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, grad_rows, options: _Options):
        # order: indices of the rows, those with a gradient first (None: as they are); count: how many have one.
        order, count = None, len(hidden)
        if not any(ctx.needs_input_grad[:3]):
            count = 0
        elif grad_rows is not None:
            count = int(grad_rows.sum())
            order = grad_rows.logical_not().to(torch.int8).argsort(stable=True) if count < len(hidden) else None
        keep = ctx.needs_input_grad[0] and not options.recompute
        factor = hidden.new_empty(count if keep else 0, hidden.shape[1], dtype=_accumulator_dtype(hidden))
        targets = targets if order is None else targets[order]
        maximum, total, weighted, target = _forward(hidden, weight, bias, targets, order, factor, options)

        logps = -F.softplus((maximum + total.log2() - target) / LOG2E)
        target_mass = torch.exp2(target - maximum)
        mass = total + target_mass
        entropy = mass.log2() - (weighted + target_mass * (target - maximum)) / mass
        entropy = entropy.div_(LOG2E).clamp_(min=0)

        if count:
            head_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
            rows = (x[:count] for x in (targets, maximum, mass, target, logps, entropy))
            ctx.save_for_backward(None if keep and not head_grad else hidden, weight, bias, factor, order, *rows)
        ctx.tokens, ctx.count, ctx.keep, ctx.options = len(hidden), count, keep, options
        if order is not None:
            logps, entropy = (torch.empty_like(x).index_copy_(0, order, x) for x in (logps, entropy))
        if not options.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None):
        if not ctx.count or (grad_logps is None and grad_entropy is None):
            return (None,) * 6
        hidden, weight, bias, factor, order, targets, maximum, mass, target, logps, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        index = slice(0, ctx.count) if order is None else order[: ctx.count]
        grad_logps, grad_entropy = (
            torch.zeros_like(logps) if x is None else x[index].to(logps.dtype) for x in (grad_logps, grad_entropy)
        )
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:  # rows outside grad_rows stay zero
            grad_hidden = (weight.new_empty if order is None else weight.new_zeros)(ctx.tokens, weight.shape[1])
        if grad_hidden is not None and ctx.keep:
            inverse_temperature = options.scale / LOG2E
            target_scale = grad_logps * -torch.expm1(logps) * inverse_temperature
            if options.softcap is not None:
                target_scale *= 1 - (target / (options.scale * options.softcap)).square()
            others_scale = grad_logps * (-inverse_temperature / _half_range(weight)) / mass
            for rows in _slices(0, ctx.count, 512):
                part = factor[rows] * others_scale[rows, None]
                part.addcmul_(weight[targets[rows]].to(part.dtype), target_scale[rows, None])
                _put(grad_hidden, order, rows, part)
        if not ctx.keep or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # Half precision cannot hold the gradient of a mean over many tokens, so it is scaled here, and at the end
            # back.
            largest = torch.maximum(grad_logps.abs().max(), grad_entropy.abs().max())
            largest = largest.clamp_min(torch.finfo(largest.dtype).tiny)
            back = largest * (options.scale / LOG2E / _half_range(weight))
            data = torch.stack(
                [
                    maximum + mass.log2(),  # logsumexp in bits
                    -torch.expm1(logps),  # 1 - p_target
                    entropy * LOG2E,
                    grad_logps / largest,
                    grad_entropy / (largest * LOG2E),
                ]
            )
            if grad_hidden is not None and not ctx.keep:
                _hidden_gradient(grad_hidden, hidden, weight, bias, targets, order, data, back, options)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                hidden = hidden if order is None else hidden[index]
                grad_weight, grad_bias = _head_gradient(hidden, weight, bias, targets, data, back, options)
        return grad_hidden, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    order: Tensor | None,
    factor: Tensor,
    options: _Options,
) -> Tensor:
    """[4, tokens] running sums of each row, in the order of `order`, at the end of the vocabulary:

        maximum   of z
        total     sum over j != target of 2^(z_j - maximum)
        weighted  sum over j != target of 2^(z_j - maximum) (z_j - maximum)
        target    z of the target

    The first len(factor) rows also fill their row of factor: the sum over j != target of 2^(z_j - maximum) cap'_j W_j,
    times `_half_range`."""
    tokens = len(hidden)
    height, width = _tile(tokens, "factor" if len(factor) else "sums")
    chunks = (*_slices(0, len(factor), height), *_slices(len(factor), tokens, height))
    state = torch.zeros(4, tokens, dtype=factor.dtype, device=hidden.device)
    state[0] = -1e30  # finite: for a tile that holds only forbidden tokens (-inf), -inf minus -inf would be NaN
    state[3] = -torch.inf
    step = _softmax_step_triton if options.kernels else _softmax_step_torch
    blocks = _blocks(weight, width)
    streams = _streams(hidden, len(chunks))
    buffers = [hidden.new_empty(height, width, dtype=factor.dtype) for _ in streams]
    for i, rows in enumerate(chunks):
        buffer, stream = buffers[i % len(streams)], streams[i % len(streams)]
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            part, part_targets, part_state = hidden[_index(order, rows)], targets[rows], state[:, rows]
            accumulator = factor[rows] if rows.start < len(factor) else None
            tiles = _Tiles(buffer, len(part), weight)
            for start, block, block_transposed in blocks:
                logits, operand = tiles[len(block)]
                _matmul(part, block_transposed, logits)
                powers = step(logits, operand, bias, part_targets, start, part_state, accumulator, options)
                if accumulator is not None:
                    _matmul(powers, block, accumulator, accumulate=start > 0)
    for stream in streams[1:]:
        torch.cuda.current_stream(hidden.device).wait_stream(stream)
    return state


def _hidden_gradient(
    grad_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    order: Tensor | None,
    data: Tensor,
    back: Tensor,
    options: _Options,
) -> None:
    """grad_hidden = back * dz @ weight. The outer loop is over chunks of rows, so that only one chunk of it is in fp32.

    data: [5, tokens], what the row step needs, see `_gradient_step_kernel`. back: factor that undoes dz's scaling."""
    height, width = _tile(len(targets), "gradient")
    buffer = hidden.new_empty(height, width, dtype=back.dtype)
    chunk = hidden.new_empty(height, hidden.shape[1], dtype=back.dtype)
    step = _gradient_step_triton if options.kernels else _gradient_step_torch
    blocks = _blocks(weight, width)
    for rows in _slices(0, len(targets), height):
        part, part_targets, part_data = hidden[_index(order, rows)], targets[rows], data[:, rows]
        accumulator = chunk[: len(part)]
        tiles = _Tiles(buffer, len(part), weight)
        for start, block, block_transposed in blocks:
            logits, operand = tiles[len(block)]
            _matmul(part, block_transposed, logits)
            dz = step(logits, operand, bias, part_targets, start, part_data, options)
            _matmul(dz, block, accumulator, accumulate=start > 0)
        _put(grad_hidden, order, rows, accumulator.mul_(back))


def _head_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    data: Tensor,
    back: Tensor,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    """back * dz^T @ hidden and, for the bias, dz's column sums. The outer loop is over the vocabulary, so that only one
    block of them is in fp32."""
    height, width = _tile(len(targets), "gradient")
    buffer = hidden.new_empty(height, width, dtype=back.dtype)
    block_gradient = hidden.new_empty(width, hidden.shape[1], dtype=back.dtype)
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    step = _gradient_step_triton if options.kernels else _gradient_step_torch
    for start, block, block_transposed in _blocks(weight, width):
        accumulator = block_gradient[: len(block)]
        bias_accumulator = accumulator.new_zeros(len(block))
        for rows in _slices(0, len(hidden), height):
            part = hidden[rows]
            logits, operand = _Tiles(buffer, len(part), weight)[len(block)]
            _matmul(part, block_transposed, logits)
            dz = step(logits, operand, bias, targets[rows], start, data[:, rows], options)
            _matmul(dz.T, part, accumulator, accumulate=rows.start > 0)
            if grad_bias is not None:
                bias_accumulator += dz.sum(0, dtype=back.dtype)
        grad_weight[start : start + len(block)] = accumulator.mul_(back)
        if grad_bias is not None:
            grad_bias[start : start + len(block)] = bias_accumulator * back
    return grad_weight, grad_bias


def _tile(tokens: int, use: Literal["sums", "factor", "gradient"]) -> tuple[int, int]:
    """Rows and vocabulary columns of a tile of logits.

    A tile takes 32 MiB of fp32, which stay in an H100's L2 cache (50 MB) between the product that writes them and the
    row kernel that reads them; 16 MiB in the backward pass, where a chunk of fp32 accumulators [rows, hidden] comes on
    top. The product of the powers with a block of the head wants many columns, since each such product reads and writes
    the accumulator; where there is only the first product, many rows are better, since each chunk reads the whole
    head."""
    most, area = {"sums": (4096, 2**23), "factor": (1024, 2**23), "gradient": (1024, 2**22)}[use]
    height = max(1, min(tokens, most))
    return height, min(16384, 1 << (area // height).bit_length() - 1)


def _streams(x: Tensor, chunks: int) -> list[Any]:
    """Streams on which the chunks of rows run, in turn; None is the current stream.

    On CUDA there are two: the row kernels of one chunk, and the ends of its products, when few multiprocessors are
        still
    at work, overlap with the products of the other. The second stream starts here."""
    if not x.is_cuda or chunks < 2:
        return [None]
    side = _side_stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    return [None, side]


@cache
def _side_stream(device: torch.device) -> Any:
    """One stream for the whole process, since cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class _Tiles:
    """Two views of one buffer: the logits [rows, width] in fp32, and in the same memory the operand of the product that
    follows, [rows, width] in the head's dtype; of each fp32 row, a bf16 row takes the first half.

    The views are made once per width, as a view takes the host as long as a kernel launch."""

    def __init__(self, buffer: Tensor, rows: int, weight: Tensor):
        self.buffer, self.rows, self.dtype = buffer, rows, weight.dtype
        self.views: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, width: int) -> tuple[Tensor, Tensor]:
        if width not in self.views:
            logits = self.buffer[: self.rows, :width]
            self.views[width] = logits, logits.view(self.dtype)[:, :width]
        return self.views[width]


def _blocks(weight: Tensor, width: int) -> list[tuple[int, Tensor, Tensor]]:
    """For each block of the vocabulary: its first column, its part of the head [columns, hidden], and the transpose."""
    return [(i * width, block, block.T) for i, block in enumerate(weight.split(width))]


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _index(order: Tensor | None, rows: slice) -> Any:
    return rows if order is None else order[rows]


def _put(out: Tensor, order: Tensor | None, rows: slice, values: Tensor) -> None:
    if order is None:
        out[rows] = values
    else:
        out.index_copy_(0, order[rows], values.to(out.dtype))


def _accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _half_range(x: Tensor) -> float:
    """Factor that lifts probabilities into float16's range, whose smallest normal number is 6e-5."""
    return 4096.0 if x.dtype == torch.float16 else 1.0


def _matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, summed in out's dtype, which may be wider than the operands'."""
    if out.is_cuda and b.dtype != out.dtype:
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(accumulate), out=out)


# The row steps in torch. They overwrite the tile `logits` and return it; on CUDA they return a copy in operand's dtype.


def _scale_torch(logits: Tensor, bias: Tensor | None, start: int, options: _Options) -> tuple[Tensor, Tensor | None]:
    """z, and the derivative of the softcap (None without one)."""
    if bias is not None:
        logits += bias[start : start + logits.shape[1]]
    slope = None
    if options.softcap is not None:
        ratio = logits.div_(options.softcap).tanh_()
        slope = 1 - ratio.square()
        logits = ratio.mul_(options.softcap)
    return logits.mul_(options.scale), slope


def _at_target(values: Tensor, targets: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: whether its target lies in the tile, the target's column (0 outside), and the value there."""
    inside = (targets >= start) & (targets < start + values.shape[1])
    column = torch.where(inside, targets - start, 0)[:, None]
    return inside, column, values.gather(1, column).squeeze(1)


def _finish_torch(values: Tensor, slope: Tensor | None, operand: Tensor) -> Tensor:
    """values as the operand of the next product: times the softcap's derivative and `_half_range`."""
    values = values.mul_(_half_range(operand)) if slope is None else values.mul_(slope).mul_(_half_range(operand))
    return values.to(operand.dtype) if values.is_cuda else values


def _softmax_step_torch(
    logits: Tensor,
    operand: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    state: Tensor,
    accumulator: Tensor | None,
    options: _Options,
) -> Tensor:
    """Add a tile of raw logits to `state`, in place, and return its powers. See `_softmax_step_kernel`."""
    z, slope = _scale_torch(logits, bias, start, options)
    old, total, weighted, target = state
    inside, column, at_target = _at_target(z, targets, start)
    target.copy_(torch.where(inside, at_target, target))
    maximum = torch.maximum(old, z.amax(1))
    decay = torch.exp2(old - maximum)
    if accumulator is not None and start > 0:
        accumulator.mul_(decay[:, None])
    shifted = z.sub_(maximum[:, None]).clamp_(min=-1e4)  # finite, since 0 * -inf would be NaN
    powers = shifted.exp2()
    powers.scatter_(1, column, torch.where(inside, 0, powers.gather(1, column).squeeze(1))[:, None])
    fallen = decay * (weighted + total * (old - maximum).clamp(min=-1e4))
    weighted.copy_(fallen + shifted.mul_(powers).sum(1))
    total.mul_(decay).add_(powers.sum(1))
    old.copy_(maximum)
    return _finish_torch(powers, slope, operand)


def _gradient_step_torch(
    logits: Tensor, operand: Tensor, bias: Tensor | None, targets: Tensor, start: int, data: Tensor, options: _Options
) -> Tensor:
    """Turn a tile of raw logits into their gradient. See `_gradient_step_kernel`."""
    z, slope = _scale_torch(logits, bias, start, options)
    lse, target_rest, entropy, grad_logps, grad_entropy = data[:, :, None]
    logp = z.sub_(lse).clamp_(min=-1e4)
    from_entropy = (logp + entropy).mul_(grad_entropy)
    p = logp.exp2_()
    from_entropy.mul_(p)
    inside, column, at_target = _at_target(from_entropy, targets, start)
    at_target = (grad_logps * target_rest).squeeze(1) - at_target
    dz = from_entropy.add_(p.mul_(grad_logps)).neg_()
    dz.scatter_(1, column, torch.where(inside, at_target, dz.gather(1, column).squeeze(1))[:, None])
    return _finish_torch(dz, slope, operand)


# The row steps in Triton: one program per row, with the whole width of the tile in registers.


def _softmax_step_triton(
    logits: Tensor,
    operand: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    state: Tensor,
    accumulator: Tensor | None,
    options: _Options,
) -> Tensor:
    rows, width = logits.shape
    block, warps = _launch_shape(logits)
    if accumulator is None:
        _sums_step_kernel[(rows,)](
            *(logits, bias, targets, state, logits.stride(0), state.stride(0), start, width, options.scale),
            SOFTCAP=options.softcap,
            BLOCK=block,
            num_warps=warps,
        )
        return operand
    _softmax_step_kernel[(rows,)](
        *(logits, operand, bias, targets, state, accumulator),
        *(logits.stride(0), operand.stride(0), state.stride(0), accumulator.shape[1]),
        *(start, width, options.scale, _half_range(operand)),
        SOFTCAP=options.softcap,
        BLOCK=block,
        num_warps=warps,
    )
    return operand


def _gradient_step_triton(
    logits: Tensor, operand: Tensor, bias: Tensor | None, targets: Tensor, start: int, data: Tensor, options: _Options
) -> Tensor:
    rows, width = logits.shape
    block, warps = _launch_shape(logits)
    _gradient_step_kernel[(rows,)](
        *(logits, operand, bias, targets, data, logits.stride(0), operand.stride(0), data.stride(0)),
        *(start, width, options.scale, _half_range(operand)),
        SOFTCAP=options.softcap,
        BLOCK=block,
        num_warps=warps,
    )
    return operand


def _launch_shape(logits: Tensor) -> tuple[int, int]:
    """Columns and warps per program, for the width of a whole tile: the narrower last one runs the same compiled
    kernel."""
    block = max(128, triton.next_power_of_2(logits.stride(0)))
    return block, max(4, min(16, block // 512))


if triton is not None:

    @triton.jit
    def _scale(raw, bias_ptr, columns, valid, scale, SOFTCAP: tl.constexpr):
        """z of raw logits, and the derivative of the softcap (1 without one)."""
        if bias_ptr is not None:
            raw += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        slope = 1.0
        if SOFTCAP is not None:
            ratio = 2 * tl.sigmoid(raw * (2 / SOFTCAP)) - 1  # tanh
            slope = 1 - ratio * ratio
            raw = SOFTCAP * ratio
        return raw * scale, slope

    @triton.jit
    def _load_row(logits_ptr, columns, valid, target_ptr, start, width):
        """A row of raw logits; the target's column in the tile, whether the target lies inside, and its raw logit."""
        raw = tl.load(logits_ptr + columns, mask=valid, other=-float("inf"))
        target = tl.load(target_ptr).to(tl.int32) - start
        inside = (target >= 0) & (target < width)
        return raw, target, inside, tl.load(logits_ptr + target, mask=inside, other=0.0)

    @triton.jit
    def _load_state(state_ptr, stride):
        return tl.load(state_ptr), tl.load(state_ptr + stride), tl.load(state_ptr + 2 * stride)

    @triton.jit
    def _softmax_step_kernel(
        logits_ptr, operand_ptr, bias_ptr, targets_ptr, state_ptr, accumulator_ptr,
        logits_stride, operand_stride, state_stride, hidden_size, start, width, scale, half_range,
        SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Add one row of a tile to its running sums, with m the new maximum and decay = 2^(m_old - m):

            total    = decay total + sum_j 2^(z_j - m)
            weighted = decay (weighted + total_old (m_old - m)) + sum_j 2^(z_j - m) (z_j - m)      j != target

        The row of the tile becomes the powers 2^(z_j - m) cap'_j (0 for the target), and the row of the accumulator,
        which sums such powers times W_j, is brought from the old maximum to the new one."""
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        valid = columns < width
        raw, target, inside, raw_target = _load_row(
            logits_ptr + row * logits_stride, columns, valid, targets_ptr + row, start, width
        )
        state = state_ptr + row
        old, total, weighted = _load_state(state, state_stride)

        z, slope = _scale(raw, bias_ptr, start + columns, valid, scale, SOFTCAP)
        z = tl.where(valid, z, -float("inf")) if SOFTCAP is not None else z  # tanh(-inf) is finite
        maximum = tl.maximum(old, tl.max(z, 0))
        shifted = tl.maximum(z - maximum, -1e4)  # finite, since 0 * -inf would be NaN
        powers = tl.where(columns == target, 0.0, tl.exp2(shifted))
        rise = tl.maximum(old - maximum, -1e4)
        decay = tl.exp2(rise)
        tl.store(state, maximum)
        tl.store(state + state_stride, decay * total + tl.sum(powers, 0))
        tl.store(state + 2 * state_stride, decay * (weighted + total * rise) + tl.sum(powers * shifted, 0))
        if inside:
            z_target, _ = _scale(raw_target, bias_ptr, start + target, inside, scale, SOFTCAP)
            tl.store(state + 3 * state_stride, z_target)
        powers = (powers * (slope * half_range)).to(operand_ptr.dtype.element_ty)
        tl.debug_barrier()  # the whole row must be read before its first half is overwritten
        tl.store(operand_ptr + row * operand_stride + columns, powers, mask=valid)
        if (decay < 1) & (start > 0):  # the product of the first tile overwrites the accumulator
            for first in range(0, hidden_size, BLOCK):
                pointers = accumulator_ptr + row * hidden_size + first + columns
                within = first + columns < hidden_size
                tl.store(pointers, decay * tl.load(pointers, mask=within), mask=within)

    @triton.jit
    def _fold(maximum, total, weighted, other_maximum, other_total, other_weighted):
        return tl.maximum(maximum, other_maximum), total + other_total, weighted + other_weighted

    @triton.jit
    def _sums(z, shift, columns, target):
        """Maximum of z and, without the target, sums of 2^(z - shift) and of 2^(z - shift) (z - shift): one
        reduction."""
        shifted = tl.maximum(z - shift, -1e4)  # finite, since 0 * -inf would be NaN
        powers = tl.where(columns == target, 0.0, tl.exp2(shifted))
        return tl.reduce((z, powers, powers * shifted), 0, _fold)

    @triton.jit
    def _sums_step_kernel(
        logits_ptr, bias_ptr, targets_ptr, state_ptr, logits_stride, state_stride, start, width, scale,
        SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """`_softmax_step_kernel` for rows without gradient, which does not wait for the tile's maximum before it sums.

        The sums are relative to the state's `maximum`, that of the tiles before, which may lie up to 8 bits below the
        true one. Only where a tile rises further is its row summed again: in most rows never, in a confident one at the
        tile of its target."""
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        valid = columns < width
        raw, target, inside, raw_target = _load_row(
            logits_ptr + row * logits_stride, columns, valid, targets_ptr + row, start, width
        )
        state = state_ptr + row
        old, total, weighted = _load_state(state, state_stride)

        z, _slope = _scale(raw, bias_ptr, start + columns, valid, scale, SOFTCAP)
        z = tl.where(valid, z, -float("inf")) if SOFTCAP is not None else z  # tanh(-inf) is finite
        shift = old
        if start == 0:
            shift = tl.maximum(old, tl.max(z, 0))
        maximum, tile_total, tile_weighted = _sums(z, shift, columns, target)
        if maximum > shift + 8:
            shift = maximum
            maximum, tile_total, tile_weighted = _sums(z, shift, columns, target)
        rise = tl.maximum(old - shift, -1e4)
        decay = tl.exp2(rise)
        tl.store(state, shift)
        tl.store(state + state_stride, decay * total + tile_total)
        tl.store(state + 2 * state_stride, decay * (weighted + total * rise) + tile_weighted)
        if inside:
            z_target, _ = _scale(raw_target, bias_ptr, start + target, inside, scale, SOFTCAP)
            tl.store(state + 3 * state_stride, z_target)

    @triton.jit
    def _gradient_step_kernel(
        logits_ptr, operand_ptr, bias_ptr, targets_ptr, data_ptr,
        logits_stride, operand_stride, data_stride, start, width, scale, half_range,
        SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Overwrite one row of a tile with dz_j = cap'_j (g_logp ([j = t] - p_j) - g_entropy p_j (log p_j + entropy)).

        data: [5, rows]: logsumexp in bits, 1 - p of the target, entropy in bits, gradients of logp and of entropy."""
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        valid = columns < width
        raw = tl.load(logits_ptr + row * logits_stride + columns, mask=valid, other=0.0)
        target = tl.load(targets_ptr + row).to(tl.int32) - start
        data = data_ptr + row
        lse = tl.load(data)
        target_rest = tl.load(data + data_stride)
        entropy = tl.load(data + 2 * data_stride)
        grad_logp = tl.load(data + 3 * data_stride)
        grad_entropy = tl.load(data + 4 * data_stride)

        z, slope = _scale(raw, bias_ptr, start + columns, valid, scale, SOFTCAP)
        logp = tl.maximum(z - lse, -1e4)
        p = tl.exp2(logp)
        dz = grad_logp * tl.where(columns == target, target_rest, -p) - p * (grad_entropy * (logp + entropy))
        dz = (dz * (slope * half_range)).to(operand_ptr.dtype.element_ty)
        tl.debug_barrier()  # the whole row must be read before its first half is overwritten
        tl.store(operand_ptr + row * operand_stride + columns, dz, mask=valid)
