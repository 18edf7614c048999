"""The policy: a 4-bit model with a LoRA adapter, its tokenizer, and its fused layers."""
