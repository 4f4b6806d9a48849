"""How much memory a rank can count on."""

from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")


def memory_bytes(device: torch.device, sharing: int) -> int:
    """Return a rank's part of its device's memory, with `sharing` ranks on it: all of a GPU, free RAM for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // sharing
    free_bytes = int(psutil.virtual_memory().available)
    limit_bytes = container_limit_bytes(CONTROL_GROUP)
    return min(free_bytes, limit_bytes or free_bytes) // sharing


def container_limit_bytes(folder: Path) -> int | None:
    """Return what is left of the memory limit of a container (control groups, version 2); None without a limit."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = (folder / "memory.current").read_text().strip()
    except OSError:
        return None
    return max(1, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else None
