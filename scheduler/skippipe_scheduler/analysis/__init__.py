"""What a plan spends its time on: usage of nodes and links, critical path, jitter, a lost node, traces."""
