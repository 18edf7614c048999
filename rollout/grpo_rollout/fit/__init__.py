"""Does a run fit the card? Memory by part, the engine's sizes, and the plan that a recipe prints with --dry-run."""
