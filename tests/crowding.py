"""Limits of wall-clock time for tests that run beside others."""

import os


def at_most_s(alone_s: float) -> float:
    """Return how long something may take here that may take `alone_s` where nothing else runs on the machine."""
    return alone_s * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
