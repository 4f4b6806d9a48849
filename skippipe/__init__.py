"""Train language models over slow and uneven networks, with a route of its own for every microbatch."""

__version__ = "0.1.0"
