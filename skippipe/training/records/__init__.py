"""What a run leaves behind, as its trainer does it: metrics and tables, traces, checkpoints."""
