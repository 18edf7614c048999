"""Does a run fit a card? Memory by part, the engine's sizes, and the plan."""
