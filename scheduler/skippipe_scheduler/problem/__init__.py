"""What a plan is made for: cluster, workload, rules and every cost in seconds; why a problem has no plan."""
