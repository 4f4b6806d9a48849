"""Copies of stages that one node alone holds, in the memory of another: what is left of a stage when its node is lost.

The holder makes one between two steps, every so many; the keeper fetches it in the background.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from skippipe.errors import CommunicationError
from skippipe.planning.copied_stages import keepers
from skippipe.training.recovery.stage_state import StageState
from skippipe_scheduler.plan.plan import Plan

if TYPE_CHECKING:
    from skippipe.membership.epoch import Member
    from skippipe.membership.exchange import Exchange
    from skippipe.membership.keys import RunKeys

logger = logging.getLogger(__name__)
OFFERED: Final = "copy"
"""Name of the holder's newest copy; with `STEP_OF` in front that of its step, as JSON."""
STEP_OF: Final = "step-of-"
POLL_S: Final = 1.0
"""Seconds between two questions of a keeper: a step lasts longer on slow networks, where copies matter."""


def kept_name(stage: int) -> str:
    """Return under which name a keeper has the copy of a stage."""
    return f"copy/{stage}"


class StageCopies:
    """One process's part: the copy that it offers, and those that it keeps."""

    def __init__(self, exchange: "Exchange", keys: "RunKeys", order: Sequence[str], every: int, silence_s: float):
        self._exchange = exchange
        self._keys = keys
        self._order = tuple(order)
        self._every = every
        self._silence_s = silence_s
        self._is_holder = False
        self._copied_step: int | None = None
        self._lock = threading.Lock()
        self._kept: dict[int, bytes] = {}
        self._sources: dict[int, Member] = {}
        self._absent: frozenset[int] = frozenset()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_all, name="stage-copies", daemon=True)
        if every:
            self._thread.start()

    def begin_epoch(self, plan: Plan, members: Mapping[str, "Member"], own: str) -> None:
        """Take the part that this process has under a plan; copies of stages that nobody holds are kept."""
        roles = keepers(plan, self._order)
        self._absent = frozenset(plan.rules.absent_stages or ())
        self._is_holder = bool(self._every) and any(holder == own for holder, _ in roles.values())
        self._copied_step = None
        with self._lock:
            self._sources = {stage: members[holder] for stage, (holder, keeper) in roles.items() if keeper == own}
            gone = [stage for stage in self._kept if stage not in self._sources and stage not in self._absent]
            for stage in gone:
                del self._kept[stage]
        for name in map(kept_name, gone):
            self._exchange.withdraw(name)
            self._exchange.withdraw(STEP_OF + name)

    def between_steps(self, step: int, make: Callable[[], StageState]) -> None:
        """Make a copy where it is due; nothing else changes the state meanwhile."""
        if self._is_holder and (self._copied_step is None or step - self._copied_step >= self._every):
            self._offer(OFFERED, step, make().to_bytes())
            self._copied_step = step

    @property
    def kept_stages(self) -> list[int]:
        """The stages of which `absent_states` has something."""
        with self._lock:
            return sorted(self._absent & self._kept.keys())

    @property
    def absent_states(self) -> dict[int, StageState]:
        """What is kept here of stages that nobody holds, by stage."""
        with self._lock:
            return {stage: StageState.from_bytes(self._kept[stage]) for stage in self._absent if stage in self._kept}

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed.set()
        if self._every:
            self._thread.join()

    def _offer(self, name: str, step: int, content: bytes) -> None:
        self._exchange.offer(name, content)
        self._exchange.offer(STEP_OF + name, json.dumps(step).encode())

    def _keep_all(self) -> None:
        steps: dict[str, bytes] = {}
        while not self._closed.wait(POLL_S):
            with self._lock:
                sources = dict(self._sources)
            for stage, member in sources.items():
                try:
                    self._keep(stage, member, steps)
                except CommunicationError as reason:  # it is lost, which others say, or it will answer later
                    logger.debug("no copy of stage %d: %s", stage, reason)

    def _keep(self, stage: int, member: "Member", steps: dict[str, bytes]) -> None:
        """Fetch the holder's copy where it is newer."""
        from skippipe.membership.exchange import Source, fetch

        source = Source(member.host, member.data_port)
        step = fetch(source, self._keys, STEP_OF + OFFERED, self._silence_s)
        if step is None or steps.get(member.incarnation) == step:
            return
        content = fetch(source, self._keys, OFFERED, self._silence_s)
        if content is None:
            return
        with self._lock:
            if self._sources.get(stage) != member:
                return
            self._kept[stage] = content
        steps[member.incarnation] = step
        self._offer(kept_name(stage), int(json.loads(step)), content)
