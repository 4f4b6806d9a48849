"""A run that outlives its processes: where each one stands, what they agree on, and how those left go on."""
