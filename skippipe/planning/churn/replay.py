"""Replaying a failure trace over a run, step by step: which time is useful, and what takes the rest."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from skippipe.planning.churn.failure_trace import FailureTrace, NodeChange
from skippipe.planning.churn.methods import Cause, RecoveryMethod

_SAME = 1e-9
"""Share of a step by which two instants count as one."""


Spent = Cause | Literal["useful"]


class Stretch(NamedTuple):
    """A time in which the throughput stays, as a share of the undisturbed one."""

    start_s: float
    end_s: float
    throughput: float


@dataclass(frozen=True)
class ReplayedRun:
    """What became of a run: `useful_s` and the seconds of `lost_s` add up to the length of the trace."""

    method: str
    duration_s: float
    useful_s: float
    """Time that the steps which count would have taken undisturbed on all nodes."""
    lost_s: Mapping[Cause, float]
    rollbacks: int
    """How often training began again from a checkpoint."""
    changed_stages: int
    """How often a stage went on with other weights than it had: older ones, or made up from other stages."""
    stretches: tuple[Stretch, ...]
    """Throughput over time, as seen while it goes: work that is later done again is in it."""

    @property
    def goodput(self) -> float:
        """Share of the undisturbed throughput, from 0 to 1."""
        return self.useful_s / self.duration_s


def replay(trace: FailureTrace, method: RecoveryMethod) -> ReplayedRun:
    """Replay a trace over a run that lives with losses by a method, from its first step on all nodes.

    A loss ends the step at its instant. A loss during a pause begins the method's pauses again. The step that is not
    finished at the end counts in part.
    """
    run = _RunInTime(method)
    for change in trace.changes:
        run.go_on_until(change.time_s)
        run.take(change)
    run.go_on_until(trace.duration_s)
    run.keep()
    lost_s: dict[Cause, float] = {cause: run.spent_s[cause] for cause in get_args(Cause) if run.spent_s[cause] > 0}
    return ReplayedRun(
        method=method.name,
        duration_s=trace.duration_s,
        useful_s=run.spent_s["useful"],
        lost_s=lost_s,
        rollbacks=run.rollbacks,
        changed_stages=run.changed_stages,
        stretches=tuple(run.stretches),
    )


class _RunInTime:
    """A run at an instant, and how it goes on."""

    def __init__(self, method: RecoveryMethod) -> None:
        self.method = method
        self.whole_s = method.paces.plan.predicted.iteration_s
        self.now_s = 0.0
        self.members = frozenset(method.paces.plan.nodes)
        self.ready_s: dict[str, float] = {}
        """When each node that is there, and no member, can become one."""
        self.pauses: list[tuple[Cause, float]] = []
        self.step_s = self.whole_s
        self.step_share_done = 0.0
        self.shares: dict[Spent, float] = {}
        """What time goes into while a step runs, as shares."""
        self.in_step_s: defaultdict[Spent, float] = defaultdict(float)
        """What time went into since the step began."""
        self.trained_s = 0.0
        """Since the checkpoint."""
        self.spent_s: defaultdict[Spent, float] = defaultdict(float)
        """What time went into, as far as no loss changes it any more."""
        self.open_s: defaultdict[Spent, float] = defaultdict(float)
        """The same of training since the checkpoint, which may have to be done again."""
        self.rollbacks = self.changed_stages = 0
        self.stretches: list[Stretch] = []

    def take(self, change: NodeChange) -> None:
        """Lose nodes, and begin to bring back others."""
        for node in change.lost:
            self.ready_s.pop(node, None)
        lost = self.members & change.lost
        if lost:
            aftermath = self.method.after_loss(self.members, lost)
            if aftermath.back_to != "this instant":
                self._undo_step()
            if aftermath.back_to == "checkpoint":
                self._undo_since_checkpoint()
            self.members -= lost
            self.changed_stages += aftermath.changed_stages
            self.pauses = [(cause, pause_s) for cause, pause_s in aftermath.pauses.items() if pause_s > 0]
        for node in change.back:
            self.ready_s[node] = self.now_s + self.method.prepare_s(node, self.members)
        if lost and self.method.joins_at_checkpoints:
            self._take_in()  # by the restart that follows anyway

    def go_on_until(self, end_s: float) -> None:
        """Pause, wait and train until an instant."""
        while self.now_s < end_s:
            if self.pauses:
                self._pause(end_s)
                continue
            pace_s = self.method.pace_s(self.members)
            if pace_s is None:
                self._wait(end_s)
            else:
                self._train(pace_s, end_s)

    def _take_in(self) -> dict[Cause, float] | None:
        """Make members of the nodes that are ready; return the pauses for that, None where there are none."""
        ready = frozenset(node for node, ready_s in self.ready_s.items() if ready_s <= self.now_s)
        if not ready:
            return None
        pauses = self.method.join_pauses(ready, self.members)
        self.members |= ready
        for node in ready:
            del self.ready_s[node]
        return {cause: pause_s for cause, pause_s in pauses.items() if pause_s > 0}

    def _pause(self, end_s: float) -> None:
        cause, left_s = self.pauses.pop(0)
        until_s = min(self.now_s + left_s, end_s)
        if until_s < self.now_s + left_s:
            self.pauses.insert(0, (cause, self.now_s + left_s - until_s))
        self._stand_still(cause, until_s)
        if cause == "checkpoints" and not self.pauses:
            self.keep()
            if self.method.joins_at_checkpoints:
                self.pauses += (self._take_in() or {}).items()

    def _wait(self, end_s: float) -> None:
        """Wait for a node with which the run can go on; it gets its state meanwhile."""
        pauses = self._take_in()
        if pauses is not None:
            self.pauses += pauses.items()
        else:
            cause: Cause = "state transfer" if self.ready_s else "waiting"
            self._stand_still(cause, min([end_s, *self.ready_s.values()]))

    def _train(self, pace_s: float, end_s: float) -> None:
        """Train until the end, until nodes join, or until a checkpoint is due."""
        method = self.method
        self._set_pace(pace_s)
        join_s = checkpoint_s = math.inf
        if self.ready_s and not method.joins_at_checkpoints:
            join_s = self._step_end_s(min(self.ready_s.values()))
        if method.checkpoint_interval_s < math.inf:
            checkpoint_s = self._step_end_s(self.now_s + method.checkpoint_interval_s - self.trained_s)
        self._advance(min(end_s, join_s, checkpoint_s))
        if self.now_s == checkpoint_s:
            self.pauses.append(("checkpoints", method.costs.checkpoint))
        elif self.now_s == join_s:
            self.pauses += (self._take_in() or {}).items()

    def _set_pace(self, pace_s: float) -> None:
        self.step_s = pace_s * self.method.slowdown
        self.shares = {
            "useful": self.whole_s / self.step_s,
            "fewer nodes": (pace_s - self.whole_s) / self.step_s,
            "redundant work": (self.step_s - pace_s) / self.step_s,
        }

    def _step_end_s(self, at_s: float) -> float:
        """Return the first end of a step at this instant or later; a step that has not begun ends now."""
        left_s = (1 - self.step_share_done) * self.step_s if self.step_share_done else 0.0
        more = max(0, math.ceil((at_s - self.now_s - left_s) / self.step_s - _SAME))
        return max(at_s, self.now_s + left_s + more * self.step_s)

    def _advance(self, until_s: float) -> None:
        """Train until an instant at which the pace is still the same."""
        duration_s = until_s - self.now_s
        done = self.step_share_done + duration_s / self.step_s
        at_step_end = abs(done - round(done)) < _SAME * max(1.0, done)
        self.step_share_done = 0.0 if at_step_end else done - math.floor(done)
        if at_step_end or done > 1:
            self.in_step_s.clear()
        for use, share in self.shares.items():
            self.open_s[use] += share * duration_s
            self.in_step_s[use] += share * (min(duration_s, self.step_share_done * self.step_s))
        self.trained_s += duration_s
        self._draw(until_s, self.shares["useful"])

    def _stand_still(self, cause: Cause, until_s: float) -> None:
        self.spent_s[cause] += until_s - self.now_s
        self._draw(until_s, 0.0)

    def _draw(self, until_s: float, throughput: float) -> None:
        last = self.stretches[-1] if self.stretches else None
        if last is not None and last.throughput == throughput:
            self.stretches[-1] = last._replace(end_s=until_s)
        elif until_s > self.now_s:
            self.stretches.append(Stretch(self.now_s, until_s, throughput))
        self.now_s = until_s

    def _undo_step(self) -> None:
        """Move what the unfinished step took to what is done again."""
        for use, spent_s in self.in_step_s.items():
            self.open_s[use] -= spent_s
            self.open_s["interrupted work"] += spent_s
            self.trained_s -= spent_s
        self.in_step_s.clear()
        self.step_share_done = 0.0

    def _undo_since_checkpoint(self) -> None:
        for use in self.shares:
            self.spent_s["work since a checkpoint"] += self.open_s.pop(use, 0.0)
        self.keep()
        self.rollbacks += 1

    def keep(self) -> None:
        """Take what was done since the checkpoint as done."""
        for use, open_s in self.open_s.items():
            self.spent_s[use] += open_s
        self.open_s.clear()
        self.trained_s = 0.0
