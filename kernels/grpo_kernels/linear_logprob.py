"""Log-probabilities and entropies of target tokens from hidden states, without ever holding the logits.

For a row h and a head W, z_j = cap(h . W_j + bias_j) / temperature with cap(x) = softcap * tanh(x / softcap):

    logp    = z_t - logsumexp(z)                            d logp / d z_j = [j = t] - p_j
    entropy = logsumexp(z) - sum_j p_j z_j                  d entropy / d z_j = -p_j (log p_j + entropy)

The logits are made in tiles of some rows by some vocabulary columns that fit the GPU's L2 cache: one matrix product
by the vendor's library with fp32 output, then one row kernel (Triton on CUDA, torch elsewhere) that keeps a running
maximum and running sums, as in flash attention, and overwrites the tile with what the next product needs.

Which products are done (one product is 2 * tokens * hidden * vocab operations):

    no gradient     1   logits
    default         2   logits; P @ W accumulated on line into the gradient factor d logp / d hidden, kept in fp32.
                        The backward pass is then one scale per row.
    low_memory      3   logits; in the backward pass logits again, then dz @ W. Nothing is kept but one number a row.
                        The same with entropy_grad, where two upstream gradients meet.
    weight gradient 2   more, in the backward pass: logits again, then dz^T @ hidden

The target's own column is left out of the sums and of P: logp = -softplus(logsumexp over the others - z_t) and
1 - p_t = -expm1(logp) keep their relative precision where the target has nearly all the mass.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS: the torch row steps serve
    triton = None


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
        hidden: [tokens, hidden] bfloat16, float16, float32 (or float64: then everything is float64, in torch).
        weight: [vocab, hidden], the head, dtype and device of hidden. Differentiable too, if it requires grad.
        targets: [tokens] int64 in [0, vocab). On CUDA this is not checked (it would wait for the device).
        temperature: divides the logits, after the softcap. Must be positive.
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2). None: off.
        bias: [vocab], added to the logits. Differentiable too, if it requires grad.
        entropy_grad: make the entropy differentiable, for an entropy bonus (then as low_memory: a third product).
        grad_rows: [tokens] bool, rows whose gradient is wanted; the others' is zero and their second product is
            saved. For rows of zero advantage where nothing else (KL, entropy bonus) gives a gradient. None: all.
        low_memory: keep nothing of [tokens, hidden] for the backward pass: the logits are made again there.
        backend: None picks Triton row kernels on CUDA, torch elsewhere.

    Returns:
        logps: [tokens] float32, nats.
        entropy: [tokens] float32, nats; detached unless entropy_grad.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names it.
    """
    _check(hidden, weight, targets, temperature, softcap, bias, grad_rows)
    usable = triton is not None and hidden.dtype != torch.float64
    if backend is None:
        backend = "triton" if usable and hidden.is_cuda else "torch"
    elif backend not in ("triton", "torch") or (backend == "triton" and not usable):
        raise ValueError(f"backend {backend!r}: choose 'triton' (needs Triton, not for float64), 'torch' or None")
    options = _Options(float(temperature), softcap, entropy_grad, low_memory, backend == "triton")
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

    Shapes and dtypes as in `linear_logprob`; arithmetic in float32, or in float64 for float64 inputs.
    """
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
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be positive; for greedy sampling use temperature=1 here")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, must be positive; None switches it off")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [tokens, hidden] and [vocab, hidden]"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, both must be one float dtype")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {list(targets.shape)}, must be int64 [{hidden.shape[0]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}, must be [vocab] = [{weight.shape[0]}]")
    if grad_rows is not None and (grad_rows.shape != hidden.shape[:1] or grad_rows.dtype != torch.bool):
        raise ValueError(f"grad_rows is {grad_rows.dtype} {list(grad_rows.shape)}, must be bool [{hidden.shape[0]}]")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias), ("grad_rows", grad_rows)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: move one")
    if targets.device.type == "cpu" and targets.numel() and not (targets.min() >= 0 and targets.max() < len(weight)):
        raise ValueError(f"targets holds ids outside [0, {len(weight)}): drop prompt and padding positions first")


class _Options(NamedTuple):
    temperature: float
    softcap: float | None
    entropy_grad: bool
    low_memory: bool
    kernels: bool  # Triton row kernels rather than torch row steps


class _Sums(NamedTuple):
    """Running sums over the vocabulary, [rows] each. The target's column is in `maximum` only."""

    maximum: Tensor  # of z
    total: Tensor  # sum exp(z_j - maximum), j != target
    weighted: Tensor  # sum exp(z_j - maximum) (z_j - maximum), j != target
    target: Tensor  # z of the target


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, grad_rows, options: _Options):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        order, count = None, len(hidden)  # the first `count` rows of `order` (None: as they are) have a gradient
        if not (need_hidden or need_weight or need_bias):
            count = 0
        elif grad_rows is not None:
            count = int(grad_rows.sum())
            order = grad_rows.logical_not().to(torch.int8).argsort(stable=True) if count < len(hidden) else None
        keep = need_hidden and not (options.entropy_grad or options.low_memory)

        factor = hidden.new_empty(count if keep else 0, hidden.shape[1], dtype=_accumulator_dtype(hidden))
        ordered_targets = targets if order is None else targets[order]
        sums = _forward(hidden, weight, bias, ordered_targets, order, factor, options)

        logps = -F.softplus(sums.maximum + sums.total.log() - sums.target)
        target_shift = sums.target - sums.maximum
        target_mass = target_shift.exp()
        mass = sums.total + target_mass
        entropy = (mass.log() - (sums.weighted + target_mass * target_shift) / mass).clamp_(min=0)

        if count:
            ctx.save_for_backward(
                hidden if need_weight or need_bias or not keep else None,
                *(weight, bias, factor, order),
                *(x[:count] for x in (ordered_targets, sums.maximum, mass, sums.target, logps, entropy)),
            )
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
        hidden, weight, bias, factor, order, targets, maximum, mass, target_logit, logps, entropy = ctx.saved_tensors
        options, count = ctx.options, ctx.count
        index = slice(0, count) if order is None else order[:count]
        grad_logps, grad_entropy = (
            torch.zeros_like(logps) if x is None else x[index].to(logps.dtype) for x in (grad_logps, grad_entropy)
        )
        grad_hidden: Any = None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # rows outside grad_rows stay zero
            grad_hidden = (weight.new_empty if order is None else weight.new_zeros)(ctx.tokens, weight.shape[1])
        if ctx.keep:
            slope = 1.0
            if options.softcap is not None:
                slope = 1 - (target_logit * options.temperature / options.softcap).square()
            target_scale = grad_logps * slope * -torch.expm1(logps) / options.temperature
            others_scale = -grad_logps / (mass * options.temperature * _half_range(weight))
            for rows in _slices(0, count, 512):
                part = factor[rows] * others_scale[rows, None]
                part.addcmul_(weight[targets[rows]].to(part.dtype), target_scale[rows, None])
                grad_hidden[rows if order is None else order[rows]] = part.to(weight.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or not ctx.keep:
            # Half precision cannot hold the gradient of a mean over many tokens: scale it, and back at the end.
            largest = torch.maximum(grad_logps.abs().max(), grad_entropy.abs().max())
            largest = largest.clamp_min(torch.finfo(largest.dtype).tiny)
            back = largest / (_half_range(weight) * options.temperature)
            rows_data = _Rows(
                targets,
                maximum + mass.log(),
                -torch.expm1(logps),
                entropy,
                grad_logps / largest,
                grad_entropy / largest,
            )
            if ctx.needs_input_grad[0] and not ctx.keep:
                _hidden_gradient(grad_hidden, hidden, weight, bias, order, rows_data, back, options)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                if order is not None:
                    hidden = hidden[index]
                grad_weight, grad_bias = _head_gradient(hidden, weight, bias, rows_data, back, options)
        return grad_hidden, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None, None, None


class _Rows(NamedTuple):
    """What the gradient with respect to the logits needs of each row, [rows] each."""

    targets: Tensor
    lse: Tensor
    target_rest: Tensor  # 1 - p_target
    entropy: Tensor
    grad_logps: Tensor
    grad_entropy: Tensor


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    order: Tensor | None,
    factor: Tensor,
    options: _Options,
) -> _Sums:
    """Sums of every row, in the order of `order`; the first len(factor) rows also fill their row of factor:
    sum over j != target of exp(z_j - maximum) cap'_j W_j, times _half_range."""
    tokens, vocab = len(hidden), len(weight)
    height, width = _tile(tokens, options.low_memory)
    buffer = hidden.new_empty(height, width, dtype=factor.dtype)
    state = torch.zeros(4, tokens, dtype=factor.dtype, device=hidden.device)
    state[0].fill_(-torch.inf)
    state[3].fill_(-torch.inf)
    step = _softmax_step_triton if options.kernels else _softmax_step_torch
    for rows in (*_slices(0, len(factor), height), *_slices(len(factor), tokens, height)):
        part = hidden[rows if order is None else order[rows]]
        sums = _Sums(*state[:, rows])
        accumulator = factor[rows] if rows.start < len(factor) else None
        for columns in _slices(0, vocab, width):
            logits = _matmul(part, weight[columns].T, buffer[: len(part), : columns.stop - columns.start])
            bias_part = None if bias is None else bias[columns]
            powers = step(logits, bias_part, targets[rows] - columns.start, sums, accumulator, weight, options)
            if accumulator is not None:
                _matmul(powers, weight[columns], accumulator, accumulate=columns.start > 0)
    return _Sums(*state)


def _hidden_gradient(
    grad_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    rows_data: _Rows,
    back: Tensor,
    options: _Options,
) -> None:
    """grad_hidden = dz @ weight, row chunks outside so that one chunk's fp32 accumulator is all it takes."""
    height, width = _tile(len(rows_data.targets), low_memory=True)
    buffer = hidden.new_empty(height, width, dtype=back.dtype)
    accumulator_buffer = hidden.new_empty(height, hidden.shape[1], dtype=back.dtype)
    for rows in _slices(0, len(rows_data.targets), height):
        index = rows if order is None else order[rows]
        part = hidden[index]
        accumulator = accumulator_buffer[: len(part)]
        for columns in _slices(0, len(weight), width):
            dz = _logit_gradient(part, weight, bias, rows, columns, rows_data, buffer, options)
            _matmul(dz, weight[columns], accumulator, accumulate=columns.start > 0)
        grad_hidden[index] = accumulator.mul_(back).to(grad_hidden.dtype)


def _head_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows_data: _Rows, back: Tensor, options: _Options
) -> tuple[Tensor, Tensor | None]:
    """dz^T @ hidden and the column sums of dz, vocabulary outside so that one fp32 block of them is all it takes."""
    height, width = _tile(len(hidden), low_memory=True)
    buffer = hidden.new_empty(height, width, dtype=back.dtype)
    accumulator_buffer = hidden.new_empty(width, hidden.shape[1], dtype=back.dtype)
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    for columns in _slices(0, len(weight), width):
        accumulator = accumulator_buffer[: columns.stop - columns.start]
        bias_accumulator = accumulator.new_zeros(len(accumulator))
        for rows in _slices(0, len(hidden), height):
            dz = _logit_gradient(hidden[rows], weight, bias, rows, columns, rows_data, buffer, options)
            _matmul(dz.T, hidden[rows], accumulator, accumulate=rows.start > 0)
            bias_accumulator += dz.sum(0, dtype=back.dtype)
        grad_weight[columns] = accumulator.mul_(back)
        if grad_bias is not None:
            grad_bias[columns] = bias_accumulator * back
    return grad_weight, grad_bias


def _logit_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: slice,
    columns: slice,
    rows_data: _Rows,
    buffer: Tensor,
    options: _Options,
) -> Tensor:
    """[rows, columns] gradient with respect to the raw logits, times temperature * _half_range."""
    logits = _matmul(hidden, weight[columns].T, buffer[: len(hidden), : columns.stop - columns.start])
    data = _Rows(*(x[rows] for x in rows_data))
    data = data._replace(targets=data.targets - columns.start)
    step = _gradient_step_triton if options.kernels else _gradient_step_torch
    return step(logits, None if bias is None else bias[columns], data, weight, options)


def _tile(tokens: int, low_memory: bool) -> tuple[int, int]:
    """Rows and vocabulary columns of a tile of logits. 32 MiB of fp32, so that it stays in an H100's L2 cache (50 MB)
    between the product that writes it and the kernel that reads it, and whole waves of 128 x 256 output blocks for
    both products; low memory: 16 MiB, and fewer rows, because each has an fp32 accumulator [hidden] besides."""
    height = max(1, min(tokens, 1024 if low_memory else 2048))
    area = 2**22 if low_memory else 2**23
    return height, min(16384, 1 << (area // height).bit_length() - 1)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _half_range(x: Tensor) -> float:
    """Factor that lifts probabilities into float16's range (smallest normal number 6e-5)."""
    return 4096.0 if x.dtype == torch.float16 else 1.0


def _matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in out's precision whatever the operands' dtype."""
    if out.is_cuda and b.dtype != out.dtype:
        a = a.to(b.dtype)
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(accumulate), out=out)


# Row steps in torch. Tiles are overwritten; `targets` count from the tile's first column and may lie outside it.


def _scale_torch(logits: Tensor, bias: Tensor | None, options: _Options) -> tuple[Tensor, Tensor | None]:
    """z, and the softcap's derivative where there is one."""
    if bias is not None:
        logits += bias
    slope = None
    if options.softcap is not None:
        ratio = logits.div_(options.softcap).tanh_()
        slope = 1 - ratio.square()
        logits = ratio.mul_(options.softcap)
    return logits.div_(options.temperature), slope


def _at_target(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each row's target lies in the tile, its column (0 where not), and the value there."""
    inside = (targets >= 0) & (targets < values.shape[1])
    column = torch.where(inside, targets, 0)[:, None]
    return inside, column, values.gather(1, column).squeeze(1)


def _softmax_step_torch(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sums: _Sums,
    accumulator: Tensor | None,
    weight: Tensor,
    options: _Options,
) -> Tensor:
    """Fold a tile of raw logits into `sums` in place; with an accumulator, return its powers. See the Triton kernel."""
    z, slope = _scale_torch(logits, bias, options)
    inside, column, at_target = _at_target(z, targets)
    sums.target.copy_(torch.where(inside, at_target, sums.target))
    maximum = torch.maximum(sums.maximum, z.amax(1))
    decay = torch.exp(sums.maximum - maximum)
    fallen = torch.where(decay > 0, decay * (sums.weighted + sums.total * (sums.maximum - maximum)), 0)
    shifted = z.sub_(maximum[:, None])
    powers = shifted.exp()
    powers.scatter_(1, column, torch.where(inside, 0, powers.gather(1, column).squeeze(1))[:, None])
    sums.total.mul_(decay).add_(powers.sum(1))
    sums.weighted.copy_(fallen + shifted.mul_(powers).nan_to_num_(nan=0.0).sum(1))  # nan: 0 * -inf
    if accumulator is not None:
        accumulator.mul_(torch.where(sums.maximum.isneginf(), 1, decay)[:, None])  # not filled yet on the first tile
    sums.maximum.copy_(maximum)
    return powers.mul_(_half_range(weight)) if slope is None else powers.mul_(slope).mul_(_half_range(weight))


def _gradient_step_torch(logits: Tensor, bias: Tensor | None, data: _Rows, weight: Tensor, options: _Options) -> Tensor:
    """Turn a tile of raw logits into their gradient; see the Triton kernel."""
    z, slope = _scale_torch(logits, bias, options)
    logp = z.sub_(data.lse[:, None])
    from_entropy = (logp + data.entropy[:, None]).mul_(data.grad_entropy[:, None])
    from_entropy.masked_fill_(logp.isneginf(), 0)
    probability = logp.exp_()
    inside, column, p_target = _at_target(probability, data.targets)
    at_target = data.grad_logps * data.target_rest - p_target * from_entropy.gather(1, column).squeeze(1)
    dz = from_entropy.add_(data.grad_logps[:, None]).mul_(probability).neg_()
    dz.scatter_(1, column, torch.where(inside, at_target, dz.gather(1, column).squeeze(1))[:, None])
    return dz.mul_(_half_range(weight)) if slope is None else dz.mul_(slope).mul_(_half_range(weight))


# Row kernels in Triton: one program a row, the whole width of the tile in registers.


def _softmax_step_triton(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sums: _Sums,
    accumulator: Tensor | None,
    weight: Tensor,
    options: _Options,
) -> Tensor:
    rows, width = logits.shape
    powers = _in_place(logits, weight.dtype)
    block, warps = _launch_shape(logits)
    _softmax_step_kernel[(rows,)](
        *(logits, powers, bias, targets, *sums, accumulator, logits.stride(0), powers.stride(0), width),
        *(weight.shape[1], 1 / options.temperature, options.softcap or 0.0, _half_range(weight)),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=options.softcap is not None,
        WRITE=accumulator is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return powers


def _gradient_step_triton(
    logits: Tensor, bias: Tensor | None, data: _Rows, weight: Tensor, options: _Options
) -> Tensor:
    rows, width = logits.shape
    dz = _in_place(logits, weight.dtype)
    block, warps = _launch_shape(logits)
    _gradient_step_kernel[(rows,)](
        *(logits, dz, bias, *data, logits.stride(0), dz.stride(0), width),
        *(1 / options.temperature, options.softcap or 0.0, _half_range(weight)),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=options.softcap is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return dz


def _in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The same rows as narrower numbers: each row's first half when fp32 becomes bf16."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _launch_shape(logits: Tensor) -> tuple[int, int]:
    """Block and warps for the whole tile's width, so that the ragged last tile runs the same compiled kernel."""
    block = max(128, triton.next_power_of_2(logits.stride(0)))
    return block, max(4, min(16, block // 512))


if triton is not None:

    @triton.jit
    def _scale(
        z, bias_ptr, columns, valid, inverse_temperature, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
    ):
        """z of raw logits, and the softcap's derivative (1 where there is none)."""
        if HAS_BIAS:
            z += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        slope = tl.full(z.shape, 1.0, tl.float32)
        if HAS_SOFTCAP:
            ratio = 2 * tl.sigmoid(2 * z / softcap) - 1  # tanh
            slope = 1 - ratio * ratio
            z = softcap * ratio
        return tl.where(valid, z * inverse_temperature, -float("inf")), slope

    @triton.jit
    def _softmax_step_kernel(
        logits_ptr, powers_ptr, bias_ptr, targets_ptr,
        maximum_ptr, total_ptr, weighted_ptr, target_ptr, accumulator_ptr,
        logits_stride, powers_stride, width, hidden_size, inverse_temperature, softcap, half_range,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Fold one row of a tile into its running sums, with m the new maximum and decay = exp(m_old - m):

            total    = decay total + sum_j exp(z_j - m)
            weighted = decay (weighted + total_old (m_old - m)) + sum_j exp(z_j - m) (z_j - m)      j != target

        WRITE: also leave exp(z_j - m) cap'_j in the tile (0 for the target), and bring the row of the accumulator,
        which sums such powers times W_j, from the old maximum to the new one.
        """
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        valid = columns < width
        raw = tl.load(logits_ptr + row * logits_stride + columns, mask=valid, other=0.0)
        z, slope = _scale(raw, bias_ptr, columns, valid, inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)
        is_target = columns == tl.load(targets_ptr + row)
        target = tl.max(tl.where(is_target, z, -float("inf")), 0)
        old = tl.load(maximum_ptr + row)
        maximum = tl.maximum(old, tl.max(z, 0))
        decay = tl.exp(old - maximum)
        shifted = z - maximum
        powers = tl.where(is_target, 0.0, tl.exp(shifted))
        total = tl.load(total_ptr + row)
        fallen = tl.where(decay > 0, decay * (tl.load(weighted_ptr + row) + total * (old - maximum)), 0.0)
        tl.store(total_ptr + row, decay * total + tl.sum(powers, 0))
        tl.store(weighted_ptr + row, fallen + tl.sum(tl.where(powers > 0, powers * shifted, 0.0), 0))
        tl.store(maximum_ptr + row, maximum)
        tl.store(target_ptr + row, tl.maximum(target, tl.load(target_ptr + row)))
        if WRITE:
            powers = powers * slope * half_range
            tl.debug_barrier()  # all of the row is read before its first half is overwritten
            tl.store(powers_ptr + row * powers_stride + columns, powers.to(powers_ptr.dtype.element_ty), mask=valid)
            if (decay < 1) & (old > -float("inf")):
                for start in range(0, hidden_size, BLOCK):
                    inside = start + columns < hidden_size
                    pointers = accumulator_ptr + row * hidden_size + start + columns
                    tl.store(pointers, decay * tl.load(pointers, mask=inside), mask=inside)

    @triton.jit
    def _gradient_step_kernel(
        logits_ptr, dz_ptr, bias_ptr,
        targets_ptr, lse_ptr, target_rest_ptr, entropy_ptr, grad_logps_ptr, grad_entropy_ptr,
        logits_stride, dz_stride, width, inverse_temperature, softcap, half_range,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Overwrite one row of a tile by dz_j = cap'_j (g_logp ([j = t] - p_j) - g_entropy p_j (log p_j + entropy))."""
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        valid = columns < width
        raw = tl.load(logits_ptr + row * logits_stride + columns, mask=valid, other=0.0)
        z, slope = _scale(raw, bias_ptr, columns, valid, inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)
        logp = z - tl.load(lse_ptr + row)
        p = tl.exp(logp)
        grad_logp = tl.load(grad_logps_ptr + row)
        from_entropy = tl.load(grad_entropy_ptr + row) * tl.where(p > 0, p * (logp + tl.load(entropy_ptr + row)), 0.0)
        is_target = columns == tl.load(targets_ptr + row)
        dz = grad_logp * tl.where(is_target, tl.load(target_rest_ptr + row), -p) - from_entropy
        dz = (dz * slope * half_range).to(dz_ptr.dtype.element_ty)
        tl.debug_barrier()  # all of the row is read before its first half is overwritten
        tl.store(dz_ptr + row * dz_stride + columns, dz, mask=valid)
