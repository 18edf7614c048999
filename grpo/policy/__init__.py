"""The policy: a 4-bit model with a LoRA adapter, its tokenizer, and its fused layers."""

import logging


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """Whether a line of bitsandbytes' log is more than its notice that the package `kernels` is missing.

    On a CPU with AVX512-BF16 it looks for a faster product in bf16, which we never call: on a CPU we compute in fp32.
    (From this repository's root it finds our folder kernels/ instead, and says that.)"""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


# Here, since bitsandbytes writes the line while it is imported: every module of ours that imports it, or PEFT, which
# imports it too, comes after this one.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_the_user)
