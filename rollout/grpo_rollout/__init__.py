"""Rollout engines: prompt token ids in, completion token ids and their log-probabilities out."""
