"""A training run: its loop, and the directory that it writes."""
