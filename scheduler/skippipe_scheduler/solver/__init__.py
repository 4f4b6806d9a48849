"""From a problem to a finished plan: one solve, open layer splits, re-planning, further plans, split backwards."""
