"""What the processes of a run do when one of them is lost: agree, plan anew, meet again, and go on."""

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch._C._distributed_c10d import Store

from skippipe.config.experiment import Experiment
from skippipe.errors import CommunicationError, InfeasibleError, InputError, PeerLostError, SkipPipeError
from skippipe.membership.addresses import own_address
from skippipe.monitor.run_events import RunEvents
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.epochs.epoch_store import EpochStore, host_store, reach_store
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.remote_errors import error_content, error_elsewhere
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.recovery.decision import Decision
from skippipe.training.recovery.progress import ProgressReport, Settlement, settle
from skippipe_scheduler.files import parse

if TYPE_CHECKING:
    from skippipe.membership.epoch import Epoch, Member
    from skippipe.membership.membership import Membership

logger = logging.getLogger(__name__)
MOST_TRIES = 10
"""Epochs in a row in which no step was finished: as many losses at a time are no accident."""


class Recoverable(Protocol):
    """What can go on in another epoch: the trainer."""

    plans: PlanSet

    def progress(self) -> ProgressReport:
        """Say where this process stands."""

    def leave_epoch(self) -> None:
        """Let go of all connections."""

    def enter_epoch(self, plans: PlanSet, settlement: Settlement) -> None:
        """Connect to the others along new plans, and go to where all go on. All members call this together."""


class RunRecovery:
    """Brings a trainer from one epoch into the next."""

    def __init__(
        self, experiment: Experiment, plans: PlanSet, context: DistributedContext, membership: "Membership"
    ) -> None:
        """Begin with the plans of all nodes; those of fewer nodes are made from these."""
        self._plans = plans
        self._options = experiment.recovery
        self._run_dir = experiment.run_path
        self._events = RunEvents(self._run_dir)
        self._timeout_s = experiment.comm.timeout_s
        self._context = context
        self._membership = membership
        self._hosted: Store | None = None

    def go_on(self, trainer: Recoverable, reason: str) -> None:
        """Agree with the members that are left and bring the trainer to where all go on.

        Raises `SkipPipeError`, on all of them, where the run cannot go on, and `PeerLostError` on one that the others
        have gone on without.
        """
        start_s = time.monotonic()
        nodes = trainer.plans.main.nodes
        for attempt in range(1, MOST_TRIES + 1):
            trainer.leave_epoch()
            self._membership.end_epoch(reason)
            report = trainer.progress().model_dump(mode="json")
            epoch = self._membership.next_epoch(report, self._decide, self._timeout_s)
            decision = parse(Decision, dict(epoch.decision), "what the members agreed on", InputError)
            if decision.error is not None:
                raise error_elsewhere(decision.error, epoch.members[0].name)
            try:
                self._meet(epoch, decision)
                trainer.enter_epoch(PlanSet.from_json(decision.plans), decision.settlement)
            except CommunicationError as failure:
                reason = str(failure)
                logger.warning("the new epoch has ended at once (%s); try %d of %d", reason, attempt, MOST_TRIES)
                continue
            if self._context.rank == 0:
                self._tell(nodes, epoch, decision, reason, time.monotonic() - start_s)
                self._keep_plan(trainer.plans, epoch.number)
            return
        raise PeerLostError(f"no epoch has lasted in {MOST_TRIES} tries: {reason}; start again from the checkpoint")

    def _decide(self, members: "Sequence[Member]", reports: Mapping[str, Any]) -> dict[str, Any]:
        """Return the decision for all members; called on one of them."""
        try:
            decision = self._decision([member.name for member in members], reports)
        except SkipPipeError as error:
            decision = Decision(error=error_content(error))
        return decision.model_dump(mode="json")

    def _decision(self, names: Sequence[str], reports: Mapping[str, Any]) -> Decision:
        if len(names) < self._options.min_nodes:
            raise InfeasibleError(
                f"{len(names)} nodes are left ({', '.join(names)}), recovery.min_nodes is {self._options.min_nodes}; "
                "start the run again from its last checkpoint"
            )
        stand = settle(
            {
                name: parse(ProgressReport, dict(report), f"report of {name}", InputError)
                for name, report in reports.items()
            }
        )
        start_s = time.monotonic()
        lost = [node for node in self._plans.main.nodes if node not in names]
        plans = plans_without(self._plans, lost, time_limit_s=self._options.planning_s)
        planning_s = time.monotonic() - start_s
        host = self._membership.own.host
        self._hosted, port = host_store(host, self._timeout_s)
        return Decision(
            plans=plans.to_json(),
            step=stand.step,
            totals=stand.totals,
            work_is_left=stand.work_is_left,
            host=host,
            port=port,
            planning_s=planning_s,
        )

    def _meet(self, epoch: "Epoch", decision: Decision) -> None:
        """Meet the other members in the epoch's store."""
        names = [member.name for member in epoch.members]
        store = reach_store(decision.host, decision.port, self._timeout_s, lambda: self._membership.ending)
        rank = names.index(self._membership.own.name)
        self._context.enter_epoch(rank, len(names), store)

    def _tell(self, nodes: Sequence[str], epoch: "Epoch", decision: Decision, reason: str, duration_s: float) -> None:
        """Say what has happened, and write it down."""
        members = [member.name for member in epoch.members]
        lost = [node for node in nodes if node not in members]
        causes = {event.name: event.words for event in self._membership.events if event.what == "lost"}
        logger.warning(
            "%s; going on with %d of %d nodes, new plan %.2f s, step %d again, %.1f s",
            ", ".join(f"{name} lost ({causes.get(name, reason)})" for name in lost) or reason,
            len(members),
            len(nodes),
            decision.planning_s,
            decision.step + 1,
            duration_s,
        )
        self._events.write(
            event="epoch",
            epoch=epoch.number,
            lost=lost,
            members=members,
            reason=reason,
            step=decision.step,
            planning_s=decision.planning_s,
            recovery_s=duration_s,
        )

    def _keep_plan(self, plans: PlanSet, epoch: int) -> None:
        """Write the main plan of an epoch beside the run's own, which a later start begins from."""
        folder = self._run_dir / "epochs"
        try:
            folder.mkdir(exist_ok=True)
            plans.main.save(folder / f"epoch-{epoch:04d}.plan.json")
        except (OSError, SkipPipeError) as reason:
            logger.warning("the plan of epoch %d is not kept (%s)", epoch, reason)


@contextmanager
def open_recovery(experiment: Experiment, plans: PlanSet, context: DistributedContext) -> Iterator[RunRecovery | None]:
    """Make all ranks members of the run while entered, where the experiment asks for it; they enter together."""
    if context.store is None or not experiment.recovery.enabled:
        yield None
        return
    from skippipe.membership.epoch import Member
    from skippipe.membership.membership import Membership

    launch_secret = secrets.token_hex(32) if context.rank == 0 else ""
    host = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    secret = all_gather_json(context, Topic.MEMBERSHIP_KEY, lambda: launch_secret)[0]
    membership = Membership.open(plans.main.nodes[context.rank], host, secret, experiment.recovery.silence_s)
    try:
        members = all_gather_json(context, Topic.MEMBERS, lambda: membership.own.model_dump(mode="json"))
        parsed = [parse(Member, member, "members", InputError) for member in members]
        membership.begin(parsed, context.timeout_s)
        context.membership = membership
        context.store = EpochStore(context.store, context.timeout_s, lambda: membership.ending)
        if context.watch is not None:
            context.watch.follow(context.store)
        yield RunRecovery(experiment, plans, context, membership)
        membership.leave()
    finally:
        context.membership = None
        membership.close()
