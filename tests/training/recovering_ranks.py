"""Processes that are in a run and go on in it as in training, without a model: deaths in it take no time to set up."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import redirect

from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.disks.run_disks import ONE_DISK
from skippipe.config.experiment import Experiment
from skippipe.errors import CommunicationError, SkipPipeError
from skippipe.monitor.run_events import RestoredStage
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.groups import create_groups
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.recovery.open_membership import open_recovery
from skippipe.training.recovery.progress import ProgressReport, Settlement
from skippipe.training.recovery.run_facts import TrainerFacts
from skippipe.training.recovery.run_recovery import FindState, RunRecovery
from skippipe.training.recovery.stage_state import StageState
from skippipe.training.recovery.state_source import FoundState, WantedState

STEP = 3
"""After which all stand."""


class LightTraining:
    """What stands after `STEP`, with nothing in its stage; see `Recoverable`."""

    def __init__(self, plans: PlanSet, context: DistributedContext, *, lacks_state: bool) -> None:
        self.plans, self._context, self._lacks_state = plans, context, lacks_state
        self._node = plans.main.nodes[context.rank]
        self._find: Callable[[], FoundState] | None = None
        self.restored: RestoredStage | None = None
        self.disks = ONE_DISK

    @property
    def stage(self) -> int:
        """The stage of its node."""
        return self.plans.main.stage_of[self._node]

    def progress(self) -> ProgressReport | None:
        """Say where all stand, but those that have come lately."""
        return None if self._lacks_state else ProgressReport(step=STEP, contributed=STEP)

    def facts(self) -> TrainerFacts:
        """Say what is of no concern here."""
        return TrainerFacts(
            devices="", peak_tflop_per_s=None, device_types={}, fingerprint="", num_tokens={}, disk_nonce=""
        )

    def stage_state(self) -> StageState:
        """Return an empty state."""
        return StageState(STEP, 0.0, {}, {})

    def leave_epoch(self) -> None:
        """There is no connection of its own."""

    def follow(self, settlement: Settlement, plans: PlanSet, find: FindState) -> None:
        """Fetch a state where there is none, at once or when all are connected."""
        wanted = WantedState(self.stage, (), plans.main, settlement.standing)
        self._find = (lambda: find(wanted)) if self._lacks_state else None
        if plans.joining is None:
            self.take_state()

    def take_state(self) -> None:
        """Fetch a state, unless that is done."""
        if self._find is not None:
            assert self._find().state.step == STEP
            self._lacks_state, self._find = False, None

    def disk_name(self) -> str:
        """All see one disk."""
        return ""

    def enter_epoch(self, plans: PlanSet, disk_names: Sequence[str], peers: PeerFiles) -> None:
        """Connect as a runner does."""
        self.plans = plans
        create_groups(plans.main, self._context.rank, self._context.timeout_s).destroy()


def wait_for_end(context: DistributedContext, training: LightTraining, recovery: RunRecovery) -> str:
    """Return why the epoch ends; before that, the state of stages is taken where some have come without it."""
    try:
        if recovery.is_joining:
            recovery.complete_joining(training)
        while True:
            context.check()
            time.sleep(0.005)
    except CommunicationError as reason:
        return str(reason)


def recover(
    experiment: Experiment, plans: PlanSet, place: dict[str, str], num_left: int, output: Path, *, lacks_state: bool
) -> None:
    """Be in a run until so many are left, and write who they are, or the error with which this process ends."""
    redirect(output.with_suffix(".log"))
    os.environ.update(place)
    try:
        with (
            DistributedContext.from_environment(experiment.comm.timeout_s) as context,
            open_recovery(experiment, plans, context) as recovery,
        ):
            training = LightTraining(plans, context, lacks_state=lacks_state)
            recovery.publish(training)
            Faults(experiment.emulation.faults, plans.main.nodes[context.rank]).reached("BEGIN", STEP + 1)
            while context.world_size > num_left:
                ending = wait_for_end(context, training, recovery)
                recovery.go_on(training, ending)
            context.meet(Topic.END, "")
            output.write_text(" ".join(training.plans.main.nodes))
    except SkipPipeError as error:
        output.write_text(f"{type(error).__name__}: {error}")
