"""A run's model over several processes: each holds stages, and one of them drives the others."""
