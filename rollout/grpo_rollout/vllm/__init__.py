"""The engine on vLLM, over the trainer's own 4-bit weights."""
