"""Programs over a trained policy: evaluate, export, generate, report."""
