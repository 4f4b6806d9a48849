"""One step of a run: what all ranks agree on in it, the update, its metrics, and when it is given up."""
