"""The plans of a run for whoever is in it, at the paces that nodes have."""
