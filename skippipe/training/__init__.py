"""The training loop, its start and end, what it records; the optimizer's back-ends."""
