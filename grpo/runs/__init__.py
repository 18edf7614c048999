"""Runs: the training loop's record, checkpoints, report and views."""
