"""GRPO as pure functions: sampler, advantages, objective, rewards, data, models, run directory."""
