"""The most memory that this process took at a time since it began to build its stages.

On a GPU it is what torch's allocator had handed out at most. On a CPU it is the growth of resident memory, which also
sees what libraries and the system's allocator take: the kernel's high-water mark where it can be reset (Linux), else
the greatest of the values at the end of the steps. On Linux the pages of files do not count (code of libraries, mapped
texts): how many lie in memory depends on what other processes read, and the kernel drops them when it needs room.
"""

import sys
from pathlib import Path

import psutil
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
        self._before_bytes = _own_bytes("VmRSS")

    def read(self) -> int:
        """Return the peak so far in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        now_bytes = _own_bytes("VmHWM" if self._has_mark else "VmRSS")
        self._greatest_bytes = max(self._greatest_bytes, now_bytes - self._before_bytes)
        return self._greatest_bytes

    @staticmethod
    def process_bytes() -> int:
        """Return the resident memory that the process has now, pages of files included, as `ps` shows it."""
        return int(psutil.Process().memory_info().rss)

    def device_bytes(self) -> int:
        """Return what torch's allocator holds of the GPU's memory now, for tensors or for later; 0 on a CPU."""
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0


def _own_bytes(key: str) -> int:
    """Return resident memory without pages of files: now (VmRSS) or at its high-water mark (VmHWM).

    Elsewhere than on Linux, the greatest resident memory that there ever was.
    """
    if STATUS.exists():
        lines = (line.split() for line in STATUS.read_text().splitlines())
        kib = {words[0]: words[1] for words in lines if len(words) > 1}
        return (int(kib[f"{key}:"]) - int(kib["RssFile:"])) * 1024
    import resource

    greatest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return greatest if sys.platform == "darwin" else greatest * 1024
