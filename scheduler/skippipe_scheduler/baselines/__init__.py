"""What plans are compared with: full pipeline, network-blind skipping, dispatch rules, the paper's method."""
