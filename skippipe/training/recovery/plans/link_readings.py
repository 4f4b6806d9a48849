"""How long messages take on links, beside the plan: what all members of an epoch have traced of a step."""

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from skippipe.cluster.run_trace import link_paces, trace_of
from skippipe.errors import CommunicationError
from skippipe.training.measurement.step_trace import TracedStep
from skippipe_scheduler.files import json_objects
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import NodePair

if TYPE_CHECKING:
    from skippipe.membership.epoch import Member

logger = logging.getLogger(__name__)
TRACED: Final = "traced-step"
"""Under which name every member's exchange has what it did in the newest step that was traced for this."""
LARGEST_BYTES: Final = 64 * 2**20
"""Of a step of one member: a thousand microbatches have less than a megabyte."""


def packed(traced: TracedStep) -> bytes:
    """Return a traced step as others fetch it: a tenth of its JSON lines."""
    return zlib.compress(traced.lines().encode(), level=1)


def unpacked(content: bytes) -> str:
    """Return the lines that were packed; raise `CommunicationError` where it is something else."""
    try:
        return zlib.decompressobj().decompress(content, LARGEST_BYTES).decode()
    except (zlib.error, UnicodeDecodeError) as reason:
        raise CommunicationError(f"no traced step: {reason}") from None


class LinkReadings:
    """Asks the members of an epoch what they have traced, one after the other in a thread."""

    def __init__(self, plan: Plan, members: Sequence["Member"], fetch: Callable[["Member", str], bytes | None]) -> None:
        """`fetch` returns what a member has under a name; it raises `CommunicationError` where that is impossible."""
        self._plan, self._members, self._fetch = plan, members, fetch
        self._planned_s: Mapping[NodePair, float] = {
            (source, sink): seconds for source, row in plan.costs.transfer_s.items() for sink, seconds in row.items()
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="link-readings")
        self._reading: Future[dict[NodePair, float]] | None = None

    def begin(self) -> None:
        """Begin a reading, where none is under way."""
        if self._reading is None:
            self._reading = self._thread.submit(self._read)

    def take(self) -> dict[NodePair, float] | None:
        """Return once what a reading has found: the time of messages over the plan's, by the link's two ends.

        None where none is ready. A link has it under both orders of its ends.
        """
        if self._reading is None or not self._reading.done():
            return None
        reading, self._reading = self._reading, None
        return reading.result()

    def close(self) -> None:
        """Read no more; `fetch` is to return soon."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self) -> dict[NodePair, float]:
        lines = ""
        for member in self._members:
            try:
                content = self._fetch(member, TRACED)
                lines += "" if content is None else unpacked(content)
            except CommunicationError as reason:
                logger.debug("nothing is known of what %s has done: %s", member.name, reason)
        return link_paces(self._plan, self._planned_s, trace_of(json_objects(lines.splitlines())))
