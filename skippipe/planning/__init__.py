"""From an experiment to its plans: workload, problem, solving, and the same plans on every rank."""
