"""What the nodes of a run do now: what each measures of itself, RUN/nodes.json, and `skippipe top`, which shows it."""
