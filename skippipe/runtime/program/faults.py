"""Deaths of processes at planned places, to try what the others do."""

import os
import signal
from collections.abc import Iterable
from typing import Final

from skippipe.config.experiment import FaultOptions

RESTARTS: Final = "TORCHELASTIC_RESTART_COUNT"
"""What torchrun's agent counts; it starts a process that has died again."""


class Faults:
    """The deaths that are planned for one node; without any, `reached` does nothing."""

    def __init__(self, faults: Iterable[FaultOptions] = (), node: str = "") -> None:
        self._planned = {(fault.step, str(fault.at)) for fault in faults if fault.node == node}

    def reached(self, point: str, step: int) -> None:
        """Die here where that is planned, without a word to anybody."""
        if (step, point) in self._planned and os.environ.get(RESTARTS, "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
