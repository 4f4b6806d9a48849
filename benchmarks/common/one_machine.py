"""What benchmarks need whose ranks are processes of one machine."""

import socket

CLUSTER = """
format: skippipe.cluster/1
name: here
device: cpu
nodes:
  - {name: node, count: 4, region: here, compute_tflop_per_s: 0.05, memory_gib: 4}
links:
  contention: none
  within_region: {latency_ms: 0.05, gbit_per_s: 20}
"""
"""Four processes and the connections between them, as a cluster file."""


def rank_environment(rank: int, world_size: int, host: str, port: int) -> dict[str, str]:
    """Return the variables that a launcher sets for a rank, whose store is at this place."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": host, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
