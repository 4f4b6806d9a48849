"""What a failure trace does to a run: the trace on a plan's nodes, four ways to live with losses, and the replay."""
