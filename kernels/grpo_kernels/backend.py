"""Choose between the Triton and the torch implementation of an operation."""

from typing import Literal

from torch import Tensor


def triton_or_torch(
    backend: Literal["triton", "torch"] | None, x: Tensor, supported: bool, needs: str = "needs Triton"
) -> Literal["triton", "torch"]:
    """The backend that is asked for; where none is, Triton if x is on CUDA and the kernel supports it, else torch.

    supported: whether the kernel can be used for x. needs: requirement of the kernel that the error message names.
    Raises ValueError for an unknown name, and for "triton" where the kernel does not support x."""
    if backend is None:
        return "triton" if supported and x.is_cuda else "torch"
    if backend not in ("triton", "torch") or (backend == "triton" and not supported):
        raise ValueError(f"backend {backend!r}: choose 'triton' ({needs}), 'torch' or None")
    return backend
