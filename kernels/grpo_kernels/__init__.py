"""Triton kernels, one operation a file, each with its torch reference and one dispatching function."""
