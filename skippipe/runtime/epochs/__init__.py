"""Process groups that last for one epoch of a run's membership: their store, and what ends a wait in them."""
