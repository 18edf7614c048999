"""The engine in plain PyTorch, which runs anywhere."""
