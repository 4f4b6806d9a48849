"""Plans for losses that may come, made ahead by a process of the lowest priority, so that recovery need not search."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self

from skippipe.runtime.plans.plan_set import PlanSet
from skippipe_scheduler.options import LostStage

logger = logging.getLogger(__name__)

WORKER = "skippipe.planning.ahead_worker"
LOWEST_PRIORITY = 19
"""Niceness with which a process gets what others leave."""


class PlansAhead:
    """Plans of a run without one node each, as far as they are ready; `close` ends the work.

    The process needs some 300 MB, and takes the time of cores that nobody else wants. It ends with this one, however
    that ends.
    """

    def __init__(
        self,
        plans: PlanSet,
        losses: Sequence[Collection[str]] | None = None,
        *,
        time_limit_s: float,
        lost_stage: LostStage = "stop",
        niceness: int = LOWEST_PRIORITY,
        free_origins: bool = False,
    ) -> None:
        """Begin with the first of `losses` (most likely first; by default every single node in rank order).

        The loss of nobody asks for better plans of all nodes at the places that they have.
        `time_limit_s` is for all plans of one loss together, `lost_stage` as for `plans_without`, `free_origins` as for
        `improved_plans`.
        """
        self._ready: dict[frozenset[str], PlanSet] = {}
        self._closed = False
        wanted = [[node] for node in plans.main.nodes] if losses is None else [sorted(lost) for lost in losses]
        request = {
            "plans": plans.to_json(),
            "losses": wanted,
            "time_limit_s": time_limit_s,
            "lost_stage": lost_stage,
            "niceness": niceness,
            "free_origins": free_origins,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._thread = threading.Thread(target=self._collect, args=(json.dumps(request),), daemon=True)
        self._thread.start()

    def ready(self, lost: Collection[str]) -> PlanSet | None:
        """Return the plans without exactly these nodes, or None where they are not ready or there are none."""
        return self._ready.get(frozenset(lost))

    @property
    def made(self) -> dict[frozenset[str], PlanSet]:
        """All plans that are ready, by the nodes that they are without."""
        return dict(self._ready)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all are made or the worker has ended, at most `timeout_s`; return whether that is so."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End the work; what is ready stays."""
        self._closed = True
        self._process.kill()
        self._thread.join()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _collect(self, request: str) -> None:
        """Hand in the request, and take the plans as they come."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the worker was started without pipes")
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                answer = json.loads(line)
                if answer["plans"] is not None:
                    self._ready[frozenset(answer["lost"])] = PlanSet.from_json(answer["plans"])
        except (OSError, ValueError):
            pass  # it has ended in the middle of a line: the code below says so
        finally:
            self._process.stdout.close()
            self._close_input()
        code = self._process.wait()
        if code and not self._closed:
            logger.warning("plans are no longer made ahead: their process ended with exit code %d", code)

    def _close_input(self) -> None:
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:
            pass  # the process was gone before all was written
