"""What executes a plan: a runner for every process, whatever runs underneath."""
