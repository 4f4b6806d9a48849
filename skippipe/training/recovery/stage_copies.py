"""Copies of stages that one node alone holds, in the memory of another: what is left of a stage when its node is lost.

The holder makes one between two steps, every so many; the keeper fetches it in the background. A copy that is on its
way is not replaced: where it takes longer than those steps, the next one is made when it has arrived. Where another
node becomes the keeper, the one before keeps what it has until the other has as new a copy.

With an interval of 1 nothing is lost with the holder. Before it gives its part to the sum by which all take a step, it
makes a copy of the state before that step and of its gradients, and waits until the keeper has both: whether the others
have taken the step or not, the state of the stage follows from the copy.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from skippipe.errors import CommunicationError
from skippipe.planning.copied_stages import keepers
from skippipe.training.recovery.stage_state import StageState
from skippipe_scheduler.plan.plan import Plan

if TYPE_CHECKING:
    from skippipe.membership.epoch import Member
    from skippipe.membership.exchange import Exchange

logger = logging.getLogger(__name__)
LABEL_OF: Final = "label-of-"
"""In front of a copy's name: that of its label."""
MARK_BYTES: Final = 8
POLL_S: Final = 1.0
"""Seconds between two questions of a keeper: a step lasts longer on slow networks, where copies matter."""
SHORT_POLL_S: Final = 0.01
"""The same where the holder waits for the keeper in every step."""


def kept_name(stage: int) -> str:
    """Return under which name a keeper has the copy of a stage."""
    return f"copy/{stage}"


class CopyLabel(NamedTuple):
    """What is to be known of a copy without fetching it."""

    mark: bytes
    """What tells it from all others, those of the same step included."""
    step: int

    def to_bytes(self) -> bytes:
        """Return it as bytes, `from_bytes` reads them."""
        return self.mark + str(self.step).encode()

    @classmethod
    def from_bytes(cls, label: bytes) -> Self:
        """Return what `to_bytes` has written; raise `CommunicationError` where it is something else."""
        if not label[MARK_BYTES:].isdigit():
            raise CommunicationError(f"{label[:64]!r} is no label of a copy")
        return cls(label[:MARK_BYTES], int(label[MARK_BYTES:]))


class KeptCopy(NamedTuple):
    """A copy in the memory of its keeper."""

    label: CopyLabel
    content: bytes


def offered_name(stage: int) -> str:
    """Return under which name the holder has its newest copy of a stage."""
    return f"offered-copy/{stage}"


class StageCopies:
    """One process's part: the copy that it offers, and those that it keeps."""

    def __init__(self, exchange: "Exchange", order: Sequence[str], every: int, silence_s: float):
        self._exchange = exchange
        self._order = tuple(order)
        self._every = every
        self._silence_s = silence_s
        self._poll_s = SHORT_POLL_S if every == 1 else POLL_S
        self._held: int | None = None
        self._keeper: Member | None = None
        self._copied_step: int | None = None
        self._lock = threading.Lock()
        self._kept: dict[int, KeptCopy] = {}
        self._sources: dict[int, Member] = {}
        self._successors: dict[int, Member] = {}
        """Who keeps in this process's place, by stage: what is kept here goes when they have it."""
        self._absent: frozenset[int] = frozenset()
        self._said = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_all, name="stage-copies", daemon=True)
        if every:
            self._thread.start()

    def begin_epoch(self, plan: Plan, members: Mapping[str, "Member"], own: str, coming: Collection[str] = ()) -> None:
        """Take the part that this process has under a plan; copies of stages that nobody holds are kept.

        Those who are `coming` have no state yet, and hold and keep nothing.
        """
        roles = keepers(plan, [name for name in self._order if name not in coming])
        self._absent = frozenset(plan.rules.absent_stages or ())
        if self._held is not None:
            self._withdraw(offered_name(self._held))
        self._held, self._keeper = None, None
        for stage, (holder, keeper) in roles.items():
            if self._every and holder == own:
                self._held, self._keeper = stage, members[keeper]
        self._copied_step = None
        with self._lock:
            self._sources = {stage: members[holder] for stage, (holder, keeper) in roles.items() if keeper == own}
            others = {stage: members[keeper] for stage, (_, keeper) in roles.items() if keeper != own}
            self._successors = {stage: member for stage, member in others.items() if stage in self._kept}
            needed = self._sources.keys() | self._successors.keys() | self._absent
            gone = [stage for stage in self._kept if stage not in needed]
        self._drop(gone)

    def between_steps(self, step: int, make: Callable[[], StageState]) -> None:
        """Make a copy where it is due and the one before has arrived; nothing else changes the state meanwhile."""
        due = self._copied_step is None or step - self._copied_step >= self._every
        if self._held is None or self._every == 1 or not due:
            return
        name = offered_name(self._held)
        if self._exchange.asked_after(name, LABEL_OF + name):  # a keeper asks for the label before and behind a copy
            self._say_once(
                f"a copy of stage {self._held} takes longer to send than {self._every} steps (recovery.copy_interval): "
                "copies are as far apart as the network lets them be"
            )
            return
        self._offer_copy(self._held, step, make())
        self._copied_step = step

    def before_sum(self, step: int, make: Callable[[], StageState], check: Callable[[], None]) -> None:
        """With an interval of 1: make a copy after `step`, with the next one's gradients, and wait until it is kept.

        `check` raises where the epoch ends meanwhile.
        """
        if self._held is None or self._keeper is None or self._every > 1:
            return
        label = self._offer_copy(self._held, step, make())

        def goes_on() -> bool:
            check()
            return True

        while self._fetch(self._keeper, LABEL_OF + kept_name(self._held), goes_on) != label:
            check()
            time.sleep(SHORT_POLL_S)

    @property
    def kept_steps(self) -> dict[int, int]:
        """The stages of which a copy is kept here, each with the step of the copy."""
        with self._lock:
            return {stage: kept.label.step for stage, kept in self._kept.items()}

    @property
    def kept_stages(self) -> list[int]:
        """The stages of which `absent_states` has something."""
        with self._lock:
            return sorted(self._absent & self._kept.keys())

    @property
    def absent_states(self) -> dict[int, StageState]:
        """What is kept here of stages that nobody holds, by stage."""
        with self._lock:
            kept = {stage: copy.content for stage, copy in self._kept.items() if stage in self._absent}
        return {stage: StageState.from_bytes(content) for stage, content in kept.items()}

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed.set()
        if self._every:
            self._thread.join()

    def _offer_copy(self, stage: int, step: int, state: StageState) -> bytes:
        """Have a copy ready for its keeper; return its label."""
        label = CopyLabel(secrets.token_bytes(MARK_BYTES), step)
        self._offer(offered_name(stage), KeptCopy(label, state.to_bytes()))
        return label.to_bytes()

    def _offer(self, name: str, copy: KeptCopy) -> None:
        """Offer a copy in place of the one before; whoever still finds a label has fetched the content of that label.

        The content is hashed when it is asked for, which it often never is.
        """
        self._exchange.withdraw(LABEL_OF + name)
        self._exchange.offer_made(name, lambda: copy.content)
        self._exchange.offer(LABEL_OF + name, copy.label.to_bytes())

    def _withdraw(self, name: str) -> None:
        self._exchange.withdraw(LABEL_OF + name)
        self._exchange.withdraw(name)

    def _fetch(self, member: "Member", name: str, wanted: Callable[[], bool]) -> bytes | None:
        from skippipe.membership.download import Source

        return self._exchange.fetch(Source(member.host, member.data_port), name, self._silence_s, wanted)

    def _drop(self, stages: Collection[int]) -> None:
        """Keep no copies of these stages any more."""
        with self._lock:
            for stage in stages:
                self._kept.pop(stage, None)
        for name in map(kept_name, stages):
            self._withdraw(name)

    def _keep_all(self) -> None:
        while not self._closed.wait(self._poll_s):
            with self._lock:
                work = [(self._keep, *each) for each in self._sources.items()]
                work += [(self._hand_over, *each) for each in self._successors.items()]
            for act, stage, member in work:
                try:
                    act(stage, member)
                except CommunicationError as reason:  # it is lost, which others say, or it will answer later
                    logger.debug("no copy of stage %d: %s", stage, reason)
                except Exception as reason:  # the holder waits for this thread; too many open files end some day
                    self._say_once(f"no copy of stage {stage} for now: {type(reason).__name__}: {reason}")

    def _say_once(self, words: str) -> None:
        if words != self._said:
            logger.warning(words)
        self._said = words

    def _hand_over(self, stage: int, member: "Member") -> None:
        """Drop what is kept of a stage once the member that keeps it now has as new a copy."""

        def wanted() -> bool:
            return self._successors.get(stage) == member and not self._closed.is_set()

        label = self._fetch(member, LABEL_OF + kept_name(stage), wanted)
        with self._lock:
            if label is None or not wanted() or CopyLabel.from_bytes(label).step < self._kept[stage].label.step:
                return
            del self._successors[stage]
        self._drop([stage])

    def _keep(self, stage: int, member: "Member") -> None:
        """Fetch the holder's copy where it is another one than that which is kept."""
        name = offered_name(stage)

        def wanted() -> bool:  # an answer of one that is lost would be awaited for seconds
            return self._sources.get(stage) == member and not self._closed.is_set()

        label = self._fetch(member, LABEL_OF + name, wanted)
        with self._lock:
            kept = self._kept.get(stage)
        if label is None or (kept is not None and kept.label.to_bytes() == label):
            return
        content = self._fetch(member, name, wanted)
        if content is None or self._fetch(member, LABEL_OF + name, wanted) != label:
            return  # it has a newer one already
        copy = KeptCopy(CopyLabel.from_bytes(label), content)
        with self._lock:
            if self._sources.get(stage) != member:
                return
            self._kept[stage] = copy
        self._offer(kept_name(stage), copy)
