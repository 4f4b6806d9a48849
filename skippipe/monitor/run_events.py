"""RUN/events.jsonl: what happened to a run's membership, one JSON object an event."""

import json
import logging
import time
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger(__name__)
FILE_NAME: Final = "events.jsonl"


class RunEvents:
    """Appends events; storage that fails is said and does not end the run."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME

    def write(self, **event: Any) -> None:
        """Append one event with the time at which it is written, in UTC."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"time": when} | event) + "\n")
        except OSError as reason:
            logger.warning("%s: cannot be written (%s)", self._path, reason.strerror or reason)
