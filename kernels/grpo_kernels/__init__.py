"""Triton kernels: one operation per file, each with its torch reference and one function that chooses between the
two."""
