"""Whether the vLLM engine multiplies 4-bit weights by `grpo_kernels.nf4.linear`, which is decided by a trial.

`nf4_linear` reads a 4-bit weight once, where bitsandbytes' way writes the dequantized weight to memory first, and it
adds the product of a LoRA adapter within its own launches. Its kernels are tuned for NVIDIA's Hopper alone. A kernel
that returned wrong values with some driver or for some shape would spoil a run silently. An engine that is about to use
them therefore runs them first as its decode steps will: from a CUDA graph, on one weight of each shape, for every kind
of batch size, against bitsandbytes' way (`disagreement`). Where the trial fails, one warning says why, and the engine
takes the other way.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from grpo.errors import UserError
from grpo.policy.lora import mm_in
from grpo_kernels.nf4.dequantize import BLOCK, NestedAbsmax
from grpo_kernels.nf4.linear import FUSED_ROWS, is_hopper, nf4_linear
from grpo_kernels.nf4.prologue import FUSED_RANK, Lora, new_counters
from grpo_kernels.nf4.tiles import FEW_ROWS_TILE
from grpo_kernels.swiglu import swiglu_reference
from grpo_rollout.fit.sizing import EngineSizes
from grpo_rollout.vllm.shared_weights import MergedLinears, Quantized, dequantize

Product = Callable[[Quantized, torch.Tensor], torch.Tensor]
"""(W, x [tokens, cols]) -> x W^T [tokens, rows]"""
Gated = Literal["x", "y"] | None
"""what silu(gate) * up is computed of within a product of `nf4_linear`: its input x, its output y, or neither"""
TOLERANCE = 0.05
"""largest |difference| / (root mean square + |value|): 16-bit products differ by a hundredth, a wrong output by 1"""
LOG = logging.getLogger(__name__)


def use_fused_products(merged: MergedLinears, sizes: EngineSizes, dtype: torch.dtype, *, required: bool) -> bool:
    """Whether `nf4_linear` serves all 4-bit weights of the model, after a trial where it may.

    required: raise UserError, with the reason, instead of returning False."""
    weights = merged.quantized()
    reason = why_not(weights)
    if not reason:
        rows = rows_to_try(sizes.max_num_seqs, sizes.max_num_batched_tokens)
        reason = disagreement(replayed_from_graph(fused_product), plain_product, weights, rows, dtype)
        torch.cuda.empty_cache()
    if reason and required:
        raise UserError(f"--fused-nf4 True, but nf4_linear cannot be used here: {reason}; leave the flag out")
    if reason and weights and weights[0].packed.device.type == "cuda":
        LOG.warning("4-bit products go bitsandbytes' way, which is slower than nf4_linear: %s", reason)
    return reason is None


def use_fused_adapter(
    merged: MergedLinears, rank: int, sizes: EngineSizes, dtype: torch.dtype, *, fused_nf4: bool, required: bool
) -> bool:
    """Whether `nf4_linear` adds the adapter's product, after a trial where it may.

    rank: of vLLM's adapter buffers. fused_nf4: what `use_fused_products` found.
    required: raise ValueError, with the reason, instead of returning False."""
    if not fused_nf4 or rank > FUSED_RANK:
        if required:
            raise ValueError(f"fused_lora=True needs 4-bit products by nf4_linear and a rank of at most {FUSED_RANK}")
        return False
    rows = [r for r in rows_to_try(sizes.max_num_seqs, FUSED_ROWS) if r <= FUSED_ROWS]
    few_rows = [r for r in rows if r <= FEW_ROWS_TILE]  # inside.apply_with_adapter gates the output only then
    trials: list[tuple[Gated, list[Quantized], list[int]]] = [
        (None, merged.quantized(), rows),
        ("x", merged.quantized("down_proj"), rows),
        ("y", merged.quantized("up_proj"), few_rows),  # the last of the merged layers gate and up
    ]
    reason = None
    for gated, weights, counts in trials:
        fused, plain = products_with_adapter(rank, gated=gated)
        reason = reason or disagreement(replayed_from_graph(fused), plain, weights, counts, dtype, gated=gated)
    torch.cuda.empty_cache()
    if reason and required:
        raise ValueError(f"fused_lora=True, but nf4_linear cannot add the adapter here: {reason}")
    if reason:
        LOG.warning("vLLM's kernels apply the adapter, which is slower than within nf4_linear: %s", reason)
    return reason is None


def why_not(weights: Iterable[Quantized]) -> str | None:
    """Why `nf4_linear` does not apply to all of these weights, or None where it does."""
    for weight in weights:
        device = weight.packed.device
        if device.type != "cuda" or torch.version.hip or not is_hopper(device):
            return "its kernels are tuned for NVIDIA's Hopper alone"
        if (weight.quant_type, weight.blocksize) != ("nf4", BLOCK) or weight.cols % BLOCK:
            return (
                f"a weight {list(weight.shape)} is {weight.quant_type} in blocks of {weight.blocksize}; it takes nf4 "
                f"in blocks of {BLOCK}, and a number of columns that is a multiple of {BLOCK}"
            )
    return None


def takes_adapters(weight: Quantized) -> bool:
    """Whether the fused kernel serves this weight, its adapter included.

    For other weights `nf4_linear` leaves both products to torch, which is slower than vLLM's kernels for adapters."""
    return weight.cols % 256 == 0


def rows_to_try(sequences: int, batched_tokens: int) -> list[int]:
    """Numbers of rows for the trial: one of each kind that the kernels distinguish, since a prefill can have any of
    them; a full decode step; and, where a prefill can be that long, one for the path that dequantizes.

    No more rows than that: the trial has to fit into the memory in which the KV cache will be."""
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
    gated: Gated = None,
) -> str | None:
    """The first disagreement between two products, over one weight of each shape and each number of rows, or None.

    x is Gaussian, [rows, cols] of `dtype`, or [rows, 2 cols] if "x" is `gated`; the process's random generators are not
    touched. An exception of `tried` counts as a disagreement, and so does a single value that differs by more than
    `TOLERANCE` allows."""
    kinds = {(w.shape, type(w.absmax)): w for w in weights}
    for weight in kinds.values():
        device = weight.packed.device
        generator = torch.Generator(device).manual_seed(0)
        width = 2 * weight.cols if gated == "x" else weight.cols
        for count in rows:
            x = torch.randn(count, width, generator=generator, device=device).to(dtype)
            scales = "doubly quantized" if isinstance(weight.absmax, NestedAbsmax) else "expanded"
            where = f"{count} rows by a weight {list(weight.shape)} with {scales} scales"
            expected = reference(weight, x).float()
            try:
                actual = tried(weight, x).float()
            except Exception as error:  # whatever it is, there is another way
                return f"{where}: {type(error).__name__}: {error}"
            allowed = expected.square().mean().sqrt() + expected.abs()
            worst = ((actual - expected).abs() / allowed).amax()
            if not worst <= TOLERANCE:  # true for NaN as well
                return f"{where}: values differ by {worst:.2g} of their size (allowed: {TOLERANCE})"
    return None


# ---- the products that are compared


def fused_product(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
    """x W^T by `nf4_linear`."""
    return nf4_linear(x, weight.packed, weight.absmax, weight.shape)


def plain_product(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
    """x W^T as bitsandbytes computes it: the weight is dequantized to memory first."""
    return nn.functional.linear(x, dequantize(weight, x.dtype))


def products_with_adapter(rank: int, *, gated: Gated = None) -> tuple[Product, Product]:
    """x W^T with a random adapter's product added: by `nf4_linear`, and in torch.

    The adapter's product is as large as the weight's own. It has three slices, as that of a merged layer, where the
    weight has rows enough; if "y" is `gated`, two, for gate and up."""
    made: dict[tuple, Lora] = {}

    def adapter(weight: Quantized, x: torch.Tensor) -> Lora:
        key = (weight.shape, x.dtype)
        if key not in made:  # at the first call, since a graph that is being captured can draw no random numbers
            if gated == "y":
                ends: tuple[int, ...] = (weight.rows // 2, weight.rows)
            elif weight.rows > 512:
                ends = (256, 512, weight.rows)  # multiples of every tile's rows, as in real layers: else torch adds it
            else:
                ends = (weight.rows,)
            generator = torch.Generator(x.device).manual_seed(1)
            a = torch.randn(len(ends) * rank, weight.cols, generator=generator, device=x.device) / weight.cols**0.5
            b = torch.randn(weight.rows, rank, generator=generator, device=x.device) / rank**0.5
            b *= dequantize(weight, x.dtype)[0].float().norm()
            made[key] = Lora(a.to(x.dtype), b.to(x.dtype), ends, new_counters(x.device))
        return made[key]

    def fused(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
        return nf4_linear(x, weight.packed, weight.absmax, weight.shape, lora=adapter(weight, x), gated=gated)

    def plain(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
        if gated == "x":
            x = swiglu_reference(*x.chunk(2, -1))
        slices = [(a, b) for _, a, b in adapter(weight, x).slices()]
        if gated == "y":
            # In fp32: where up is almost zero, a rounded sum errs by much of its size, times a large gate.
            update = torch.cat([mm_in(x, a.T, torch.float32) @ b.float().T for a, b in slices], 1)
            y = mm_in(x, dequantize(weight, x.dtype).T, torch.float32) + update
            return swiglu_reference(*y.chunk(2, -1))
        return plain_product(weight, x) + torch.cat([x @ a.T @ b.T for a, b in slices], 1)

    return fused, plain


def replayed_from_graph(product: Product) -> Product:
    """The product as a decode step runs it: replayed from a CUDA graph, into memory that held something else."""

    def replayed(weight: Quantized, x: torch.Tensor) -> torch.Tensor:
        product(weight, x)  # compiles the kernels, which cannot be done during the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = product(weight, x)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize(x.device)
        return y.clone()

    return replayed
