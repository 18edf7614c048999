"""Which of its two ways an operation goes."""

from typing import Literal

from torch import Tensor


def triton_or_torch(
    backend: Literal["triton", "torch"] | None, x: Tensor, able: bool, needs: str = "needs Triton"
) -> Literal["triton", "torch"]:
    """The backend that was asked for; of None, Triton on CUDA where its kernel is able to, and torch elsewhere.

    needs: what the kernel is not able without, for the message. Raises ValueError for another name, or "triton" where
    its kernel is not able to."""
    if backend is None:
        return "triton" if able and x.is_cuda else "torch"
    if backend not in ("triton", "torch") or (backend == "triton" and not able):
        raise ValueError(f"backend {backend!r}: choose 'triton' ({needs}), 'torch' or None")
    return backend
