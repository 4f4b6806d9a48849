"""The most memory that this process took at a time since it began to build its stages.

On a GPU it is what torch's allocator had handed out at most. On a CPU it is the growth of resident memory, which also
sees what libraries and the system's allocator take: the kernel's high-water mark where it can be reset (Linux), else
the greatest of the values at the end of the steps. On Linux the pages of files do not count (code of libraries, mapped
texts): how many lie in memory depends on what other processes read, and the kernel drops them when it needs room.
"""

import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_HIGH_WATER_MARK = "5"


class PeakMemory:
    """Measures from its creation on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_mark = False
        self._greatest_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            RESET.write_text(RESET_HIGH_WATER_MARK)
            self._has_mark = STATUS.exists()
        except OSError:
            self._has_mark = False
        self._before_bytes = resident_bytes() - _file_bytes()

    def read(self) -> int:
        """Return the peak so far in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        now_bytes = _status_bytes("VmHWM") if self._has_mark else resident_bytes()
        self._greatest_bytes = max(self._greatest_bytes, now_bytes - _file_bytes() - self._before_bytes)
        return self._greatest_bytes


def resident_bytes() -> int:
    """Return this process's resident memory; elsewhere than on Linux, the greatest that it ever was."""
    if STATUS.exists():
        return _status_bytes("VmRSS")
    import resource

    greatest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return greatest if sys.platform == "darwin" else greatest * 1024


def _file_bytes() -> int:
    return _status_bytes("RssFile") if STATUS.exists() else 0


def _status_bytes(key: str) -> int:
    line = next(one for one in STATUS.read_text().splitlines() if one.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
