"""Whether a sampler multiplies 4-bit weights by `grpo_kernels.nf4.linear`: where it applies, and once it was tried."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from grpo.policy.lora import mm_in
from grpo_kernels.nf4.dequantize import BLOCK, NestedAbsmax
from grpo_kernels.nf4.linear import FUSED_ROWS, is_hopper, nf4_linear
from grpo_kernels.nf4.prologue import Lora, new_counters
from grpo_kernels.swiglu import swiglu_reference
from grpo_rollout.vllm.shared_weights import Quantized, dequantized

Product = Callable[[Quantized, torch.Tensor], torch.Tensor]
"""(W, x [tokens, cols]) -> x W^T [tokens, rows]"""
TOLERANCE = 0.05
"""of |difference| / (root mean square + |value|): 16-bit products differ by a hundredth, a wrong output by 1"""


def fused(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
    """x W^T, the 4-bit weight read once where rows are few."""
    return nf4_linear(x, weight.packed, weight.absmax, weight.shape)


def plain(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
    """x W^T as bitsandbytes does it: the weight is dequantized to memory first."""
    return nn.functional.linear(x, dequantized(weight, x.dtype))


def with_adapter(rank: int, *, gated: Literal["x", "y"] | None = None) -> tuple[Product, Product]:
    """`fused` and `plain` with an adapter as large as the weight itself added: in the kernel, and in torch.

    It has three slices, as joined layers have, where the weight has rows for them. gated: as `nf4_linear`'s; of "y" the
    slices are gate and up."""
    made: dict[tuple, Lora] = {}

    def adapter(weight: Quantized, x: torch.Tensor) -> Lora:
        key = (weight.shape, x.dtype)
        if key not in made:  # at the first call: a capture of the second may draw no numbers
            # Where every tile's rows divide them, as real layers' do: else the kernel leaves the adapter to torch.
            ends: tuple[int, ...] = (256, 512, weight.rows) if weight.rows > 512 else (weight.rows,)
            ends = (weight.rows // 2, weight.rows) if gated == "y" else ends
            generator = torch.Generator(x.device).manual_seed(1)
            a = torch.randn(len(ends) * rank, weight.cols, generator=generator, device=x.device) / weight.cols**0.5
            b = torch.randn(weight.rows, rank, generator=generator, device=x.device) / rank**0.5
            b *= dequantized(weight, x.dtype)[0].float().norm()
            made[key] = Lora(a.to(x.dtype), b.to(x.dtype), ends, new_counters(x.device))
        return made[key]

    def tried(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
        return nf4_linear(x, weight.packed, weight.absmax, weight.shape, lora=adapter(weight, x), gated=gated)

    def reference(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
        if gated == "x":
            x = swiglu_reference(*x.chunk(2, -1))
        slices = [(a, b) for _, a, b in adapter(weight, x).slices()]
        if gated == "y":  # in fp32: where up is next to nothing, the rounding of sums is large, times a large gate
            low = [mm_in(x, a.T, torch.float32) @ b.float().T for a, b in slices]
            y = mm_in(x, dequantized(weight, x.dtype).T, torch.float32) + torch.cat(low, 1)
            return swiglu_reference(*y.chunk(2, -1))
        return plain(weight, x) + torch.cat([x @ a.T @ b.T for a, b in slices], 1)

    return tried, reference


def why_not(weights: Iterable[Quantized]) -> str | None:
    """Why `fused` does not apply to all of these weights, or None where it does."""
    for weight in weights:
        device = weight.packed.device
        if device.type != "cuda" or torch.version.hip or not is_hopper(device):
            return "its kernel was tuned for NVIDIA's Hopper alone"
        if (weight.quant_type, weight.blocksize) != ("nf4", BLOCK) or weight.cols % BLOCK:
            return (
                f"a weight {list(weight.shape)} is {weight.quant_type} in blocks of {weight.blocksize}; it takes nf4 "
                f"in blocks of {BLOCK}, and columns a multiple of that"
            )
    return None


def takes_adapters(weight: Quantized) -> bool:
    """Whether the fused kernel serves this weight, its adapter within; else `nf4_linear` leaves both to torch, which is
    slower than a sampler's own kernels for adapters."""
    return weight.cols % 256 == 0


def captured(product: Product) -> Product:
    """The product as a sampler's decode step runs it: from a CUDA graph, into memory that held something else."""

    def replayed(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
        product(weight, x)  # compiles, which a capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = product(weight, x)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize(x.device)
        return y.clone()

    return replayed


def check_rows(sequences: int, batched_tokens: int) -> list[int]:
    """Rows to try: each kind that the kernel tells apart (a prefill's rows may be any of them), a full decode step, and
    where a prefill can be so long, one for the path that dequantizes. No more rows than that: the comparison must fit
    where the KV cache will be."""
    kinds = {r for r in (1, 16, 32, 64, 128, FUSED_ROWS) if r <= max(sequences, batched_tokens)}
    return sorted(kinds | {sequences, min(batched_tokens, FUSED_ROWS + 1)})


@torch.no_grad()
def disagreement(
    tried: Product,
    reference: Product,
    weights: Iterable[Quantized],
    rows: Sequence[int],
    dtype: torch.dtype,
    *,
    gated: Literal["x", "y"] | None = None,
) -> str | None:
    """What goes wrong first when two products of one weight of each shape are compared, or None.

    x is Gaussian, [rows, cols] of `dtype`, or [rows, 2 cols] if "x" is `gated`; no generator of the process is touched.
    An exception of `tried` counts as disagreement, and so does a single value that differs by more than `TOLERANCE`
    allows."""
    kinds = {(w.shape, type(w.absmax)): w for w in weights}
    for weight in kinds.values():
        device = weight.packed.device
        generator = torch.Generator(device).manual_seed(0)
        for count in rows:
            x = torch.randn(count, (2 if gated == "x" else 1) * weight.cols, generator=generator, device=device).to(
                dtype
            )
            scales = "doubly quantized" if isinstance(weight.absmax, NestedAbsmax) else "expanded"
            where = f"{count} rows by a weight {list(weight.shape)} with {scales} scales"
            expected = reference(weight, x).float()
            try:
                actual = tried(weight, x).float()
            except Exception as error:  # whatever it is, there is another way
                return f"{where}: {type(error).__name__}: {error}"
            allowed = expected.square().mean().sqrt() + expected.abs()
            worst = ((actual - expected).abs() / allowed).amax()
            if not worst <= TOLERANCE:  # NaN is refused too
                return f"{where}: values differ by {worst:.2g} of their size (allowed: {TOLERANCE})"
    return None
