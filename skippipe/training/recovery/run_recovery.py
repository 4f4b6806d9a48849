"""What the processes of a run do when one is lost or comes: agree, plan anew, meet again, and go on."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch._C._distributed_c10d import Store

from skippipe.checkpoint.disks.newest_part import SavedFiles, newest_view, offer_newest, saved_stages
from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.disks.run_disks import RunDisks
from skippipe.config.experiment import Experiment
from skippipe.data.corpus_files import is_here
from skippipe.data.kept_tokenizer import TOKENIZER, packed_tokenizer
from skippipe.errors import (
    CheckpointError,
    CommunicationError,
    EpochEndedError,
    InfeasibleError,
    InputError,
    PeerLostError,
    SkipPipeError,
)
from skippipe.membership.shared_secret import SECRET, own_secret
from skippipe.monitor.run_events import MembershipChange, RestoredStage
from skippipe.runtime.epochs.epoch_store import EpochStore, host_store, reach_store
from skippipe.runtime.epochs.freed_memory import return_freed_memory
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.arrival import ContactNotes
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.remote_errors import error_content, error_elsewhere
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.recovery.decision import Decision
from skippipe.training.recovery.lost_stage.preference import places_without, ways_to_state
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.membership_record import KnownEpochs, record
from skippipe.training.recovery.plans.epoch_plans import EpochPlans
from skippipe.training.recovery.plans.replanning import Replanning
from skippipe.training.recovery.progress import KeptStep, MemberReport, ProgressReport, Settlement, settle
from skippipe.training.recovery.run_facts import RunFacts, ToldExperiment, TrainerFacts
from skippipe.training.recovery.stage_copies import StageCopies
from skippipe.training.recovery.stage_state import STATE, StageState
from skippipe.training.recovery.state_source import FoundState, StateSource, WantedState
from skippipe_scheduler.files import parse

if TYPE_CHECKING:
    from skippipe.membership.epoch import Epoch, Member
    from skippipe.membership.exchange import Exchange
    from skippipe.membership.membership import Membership

logger = logging.getLogger(__name__)
MOST_TRIES = 10
"""Epochs in a row in which no step was finished: as many losses at a time are no accident."""


FindState = Callable[[WantedState], FoundState]


class Recoverable(Protocol):
    """What can go on in another epoch: a trainer's `RecoverableTraining`."""

    restored: RestoredStage | None

    @property
    def plans(self) -> PlanSet:
        """Those of the present members."""

    @property
    def stage(self) -> int:
        """The stage that this process holds."""

    def progress(self) -> ProgressReport | None:
        """Say where this process stands; None where it has come lately and has nothing yet of its stage."""

    def facts(self) -> TrainerFacts:
        """Say what the trainers of all members have in common."""

    def stage_state(self) -> StageState:
        """Return what is held of the stage; nothing changes it while the process waits for an epoch to begin."""

    def leave_epoch(self) -> None:
        """Let go of all connections."""

    def follow(self, settlement: Settlement, plans: PlanSet, find: FindState) -> None:
        """Go to where all go on, to another stage where the plans say so; `find` gives the state of one.

        Where the plans have one for joining, a process that has come does so without its state.
        """

    def take_state(self) -> None:
        """Fetch the state of the stage, where this process has come lately and has followed without it."""

    @property
    def disks(self) -> RunDisks:
        """On which disks the run directory of the present members lies."""

    def disk_name(self) -> str:
        """Return the name of the disk that this process sees: the same for all that see it."""

    def enter_epoch(self, plans: PlanSet, disk_names: Sequence[str], peers: PeerFiles) -> None:
        """Connect to the others along new plans, on disks of these names by rank. All members call this together."""


class RunRecovery:
    """Brings a trainer from one epoch into the next."""

    def __init__(
        self,
        experiment: Experiment,
        plans: PlanSet,
        context: DistributedContext,
        membership: "Membership",
        exchange: "Exchange",
        secret: str,
    ) -> None:
        """Begin with the plans of all nodes; those of fewer nodes are made from these."""
        self._experiment = experiment
        self._plans = EpochPlans(experiment, plans)
        self._options = experiment.recovery
        self._timeout_s = experiment.comm.timeout_s
        self._context = context
        self._membership = membership
        self._exchange = exchange
        self._secret = secret
        self._faults = Faults(experiment.emulation.faults, membership.own.name)
        self._known, self._number = KnownEpochs(experiment.run_path), 0
        self._hosted: Store | None = None
        self._notes = None if context.run_store is None else ContactNotes(context.run_store)
        self._coming: tuple[str, ...] = ()
        self.replanning = Replanning(experiment, exchange)
        self._begun_after: int | None = None
        self._restored: tuple[RestoredStage, ...] = ()
        self._shares_disk = True
        copy_interval, silence_s = self._options.copy_interval, self._options.silence_s
        self.copies = StageCopies(exchange, plans.main.nodes, copy_interval, silence_s)
        self._told, self._has_text = ToldExperiment.of(experiment), is_here(experiment.data)

    @property
    def wants_epoch(self) -> bool:
        """Whether somebody waits to be taken in, or there is a better plan."""
        return bool(self._membership.applicants) or self.replanning.found is not None

    @property
    def is_joining(self) -> bool:
        """Whether an iteration begins, or is under way, in which those who have come get the state of their stage."""
        return bool(self._coming)

    @property
    def invitation(self) -> str:
        """How others come into the run."""
        own = self._membership.own
        return f"others come in with: skippipe join {own.host}:{own.data_port} ({SECRET}: see members.json of this run)"

    def peer_files(self, nodes: Sequence[str]) -> PeerFiles:
        """Return how the members give each other files, in the order of their ranks."""
        members = {member.name: member for member in self._membership.members}
        places = tuple((members[node].host, members[node].data_port) for node in nodes)
        return PeerFiles(self._exchange, places, self._timeout_s)

    def publish(self, trainer: Recoverable, *, arrived: bool = False) -> None:
        """Have ready what a process needs that comes later, where it will look for it.

        One that has just `arrived` says so in the launcher's store, else the first rank does.
        """
        from skippipe.membership.live_run import FACTS, Contacts

        members = tuple(self._membership.members)
        self._begin_copies(trainer)
        self._shares_disk = trainer.disks.shared
        facts = RunFacts(
            **self._told.model_dump(),
            plans=self._plans.whole.to_json(),
            members=members,
            trainer=trainer.facts(),
        )
        self._exchange.offer(FACTS, facts.model_dump_json().encode())
        data, run_dir = self._experiment.data, self._experiment.run_path
        self._exchange.offer_made(TOKENIZER, lambda: packed_tokenizer(data, run_dir))
        self._plans.plan_ahead([member.name for member in members], self._context.rank)
        own = self._membership.own
        self.replanning.begin_epoch(self._plans.whole, trainer.plans, members, own, self._begun_after)
        contacts = Contacts(secret=self._secret, members=members)
        contacts.keep(self._experiment.run_path)
        if (arrived or self._context.rank == 0) and self._notes is not None:
            self._notes.leave(contacts.as_note(own_secret()))

    def go_on(self, trainer: Recoverable, reason: str, *, interrupted: bool = True) -> None:
        """Agree with the members that are left, and those who want to come, and bring the trainer to where all go on.

        Raises `SkipPipeError`, on all of them, where the run cannot go on, and `PeerLostError` on one that the others
        have gone on without.
        """
        start_s = time.monotonic()
        self._known.add(self._number, {member.name: member.incarnation for member in self._membership.members})
        for attempt in range(1, MOST_TRIES + 1):
            self._exchange.withdraw(STATE)
            trainer.leave_epoch()
            self._membership.end_epoch(reason)
            ended_s = time.monotonic()
            report = self._report(trainer)
            if report.progress is not None:
                self._faults.reached("VOTE", report.progress.step + 1)
            epoch = self._membership.next_epoch(report.model_dump(mode="json"), self._decide, self._timeout_s)
            durations_s = {"agreement": time.monotonic() - ended_s}
            decision = self._decided(epoch)
            try:
                durations_s |= self._enter(trainer, epoch, decision)
            except CommunicationError as failure:
                reason = str(failure)
                logger.warning("the new epoch has ended at once (%s); try %d of %d", reason, attempt, MOST_TRIES)
                continue
            self.publish(trainer)
            if self._context.rank == 0:
                before = self._known.before_change(is_shared=self._shares_disk)
                now = {member.name: member.incarnation for member in epoch.members}
                durations_s["agreement"] -= decision.planning_s
                causes = {event.name: event.words for event in self._membership.events if event.what == "lost"}
                change = MembershipChange(
                    epoch=epoch.number,
                    lost={node: causes.get(node, reason) for node in before if now.get(node) != before[node]},
                    joined=tuple(node for node in now if before.get(node) != now[node]),
                    members=tuple(epoch.names),
                    num_nodes=len(self._plans.whole.main.nodes),
                    absent_stages=trainer.plans.main.rules.absent_stages or (),
                    restored=self._restored,
                    pace_change=decision.pace_change,
                    reason=reason,
                    step=decision.step,
                    interrupted=interrupted,
                    durations_s={part: max(0.0, duration_s) for part, duration_s in durations_s.items()},
                    total_s=time.monotonic() - start_s,
                )
                record(change, trainer.plans, self._experiment.run_path)
            return_freed_memory()
            self._faults.reached("EPOCH", decision.step + 1)
            return
        raise PeerLostError(f"no epoch has lasted in {MOST_TRIES} tries: {reason}; start again from the checkpoint")

    def complete_joining(self, trainer: Recoverable) -> None:
        """Return once all who have come have the state of their stage, which nobody changes until then.

        All call this together in the first iteration with them, each when it has done its tasks. Raises
        `CheckpointError`, which ends this process and not the run, where it has come and gets no state.
        """
        begun_s = time.monotonic()
        reason = ""
        try:
            trainer.take_state()
        except EpochEndedError:
            raise
        except CommunicationError as failure:
            reason = str(failure)
        if reason:
            raise CheckpointError(f"the state of stage {trainer.stage} did not come: {reason}")
        self._context.meet(Topic.JOINED, "", time_limits.STATE_S)
        self._coming = ()
        self._exchange.withdraw(STATE)
        self._begin_copies(trainer)
        if self._context.rank == 0:
            waited_s = time.monotonic() - begun_s
            logger.info("all have the state of their stage; this process has waited %.2f s for it", waited_s)

    def _begin_copies(self, trainer: Recoverable) -> None:
        """Have copies of the stages that one node alone holds; one that has no state yet holds none."""
        members = {member.name: member for member in self._membership.members}
        self.copies.begin_epoch(trainer.plans.main, members, self._membership.own.name, self._coming)

    def close(self) -> None:
        """Keep no copies and make no plans any more."""
        self.copies.close()
        self._plans.close()
        self.replanning.close()

    def come(self, trainer: Recoverable, epoch: "Epoch") -> None:
        """Bring the trainer of a process that has just been taken in to where all go on."""
        decision = self._decided(epoch)
        try:
            self._enter(trainer, epoch, decision)
        except CommunicationError as failure:
            self.go_on(trainer, str(failure))
        self.publish(trainer, arrived=True)

    def _enter(self, trainer: Recoverable, epoch: "Epoch", decision: Decision) -> dict[str, float]:
        """Meet the others of the epoch and go on along its plans; return what the parts of it took."""
        begun_s, next_step = time.monotonic(), decision.step + 1
        self._faults.reached("AGREED", next_step)
        plans = PlanSet.from_json(decision.plans)
        came = [name for name in epoch.names if name not in decision.standing]
        self._coming = () if plans.joining is None else tuple(came)
        source = StateSource(self._experiment, self._membership, self._exchange)

        def find(wanted: WantedState) -> FoundState:
            self._faults.reached("TAKE_STATE", next_step)
            return source.find(wanted, ways_to_state(self._options.lost_stage))

        def give() -> bytes:
            self._faults.reached("GIVE_STATE", next_step)
            return trainer.stage_state().to_bytes()

        trainer.follow(decision.settlement, plans, find)
        self._exchange.offer_made(STATE, give)
        is_met = False
        try:
            followed_s = time.monotonic()
            store = reach_store(decision.host, decision.port, self._timeout_s, lambda: self._membership.ending)
            rank = epoch.names.index(self._membership.own.name)
            if isinstance(self._context.store, EpochStore):
                self._context.store.end()
            self._context.enter_epoch(rank, len(epoch.names), store)
            told = all_gather_json(
                self._context, Topic.RESTORED, lambda: (_dumped(trainer.restored), trainer.disk_name())
            )
            self._restored = tuple(
                parse(RestoredStage, each, "what a member tells", InputError) for each, _ in told if each
            )
            self._faults.reached("GROUPS", next_step)
            trainer.enter_epoch(plans, [name for _, name in told], self.peer_files(epoch.names))
            trainer.restored = None
            is_met = True
            self._begun_after, self._number = decision.step, epoch.number
        finally:
            if not (is_met and self.is_joining):
                self._exchange.withdraw(STATE)
        return {
            "planning": decision.planning_s,
            "state": followed_s - begun_s,
            "groups": time.monotonic() - followed_s,
        }

    def _decide(self, members: "Sequence[Member]", reports: Mapping[str, Any]) -> dict[str, Any]:
        """Return the decision for all members; called on one of them."""
        try:
            decision = self._decision([member.name for member in members], reports)
        except SkipPipeError as error:
            decision = Decision(error=error_content(error))
        self._faults.reached("DECISION", decision.step + 1)
        return decision.model_dump(mode="json")

    def _decision(self, names: Sequence[str], reports: Mapping[str, Any]) -> Decision:
        if len(names) < self._options.min_nodes:
            raise InfeasibleError(
                f"{len(names)} nodes are left ({', '.join(names)}), recovery.min_nodes is {self._options.min_nodes}; "
                "start the run again from its last checkpoint"
            )
        said = {
            name: parse(MemberReport, dict(report), f"report of {name}", InputError)
            for name, report in reports.items()
            if report is not None and name in names
        }
        stand = settle({name: report.progress for name, report in said.items() if report.progress is not None})
        start_s = time.monotonic()
        situation = self._situation(names, said)
        self._check_state(situation)
        better = self.replanning.found
        if better is not None and {*names} != {*better.present.main.nodes}:
            better = None  # it was for other nodes
        whole, plans = self._plans_for(situation, stand) if better is None else (better.whole, better.present)
        plans = plans.in_rank_order(names)
        planning_s = time.monotonic() - start_s
        host = self._membership.own.host
        self._hosted, port = host_store(host, self._timeout_s)
        return Decision(
            plans=plans.to_json(),
            whole=whole.to_json(),
            step=stand.step,
            totals=stand.totals,
            work_is_left=stand.work_is_left,
            standing=stand.standing,
            host=host,
            port=port,
            pace_change=None if better is None else better.change,
            planning_s=planning_s,
        )

    def _plans_for(self, situation: Situation, stand: Settlement) -> tuple[PlanSet, PlanSet]:
        """Return the plans of all nodes, and those of the nodes that are there."""
        whole = places_without(situation, self._options.lost_stage)
        plans = self._plans.without(whole, situation.lost)
        if whole is situation.plans and not stand.work_is_left:  # a validation, say, needs the state of all at once
            plans = self._plans.with_joining(plans, situation, stand.step)
        return whole, plans

    def _report(self, trainer: Recoverable) -> MemberReport:
        copies = tuple(KeptStep(stage=stage, step=step) for stage, step in self.copies.kept_steps.items())
        progress, has_text = trainer.progress(), self._has_text
        saved = SavedFiles.of(offer_newest(self._exchange, self._experiment.run_path))
        return MemberReport(stage=trainer.stage, progress=progress, copies=copies, saved=saved, has_text=has_text)

    def _situation(self, names: Sequence[str], said: Mapping[str, MemberReport]) -> Situation:
        stage_of = self._plans.whole.main.stage_of
        copies: dict[int, dict[str, int]] = defaultdict(dict)
        for name, report in said.items():
            for kept in report.copies:
                copies[kept.stage][name] = kept.step
        standing = (name for name, report in said.items() if report.progress and report.stage == stage_of[name])
        return Situation(
            plans=self._plans.whole,
            members=tuple(names),
            standing=frozenset(standing),
            copies=copies,
            saved_stages=saved_stages(
                newest_view(self._experiment.run_path),
                [report.saved for report in said.values() if report.saved is not None],
                dict(enumerate(stage.layers for stage in self._plans.whole.main.stages)),
            ),
            moves=self._plans.moves,
            limit_s=self._options.planning_s,
            without_text=frozenset(name for name, report in said.items() if not report.has_text),
        )

    def _decided(self, epoch: "Epoch") -> Decision:
        """Return what the members of an epoch have decided with it, once nodes have the places that it gives them.

        Raises the error that they have agreed on.
        """
        decision = parse(Decision, dict(epoch.decision), "what the members agreed on", InputError)
        if decision.error is not None:
            raise error_elsewhere(decision.error, epoch.members[0].name)
        present = None if decision.pace_change is None else PlanSet.from_json(decision.plans)
        self._plans.take(PlanSet.from_json(decision.whole), present)
        return decision

    def _check_state(self, situation: Situation) -> None:
        """Raise where a stage is left to nodes that have come lately, and no way leads to a state of it."""
        if self._options.lost_stage != ("stop",):
            return
        for stage, held in enumerate(situation.plans.main.stages):
            there = [node for node in held.nodes if node in situation.members]
            if there and not situation.standing_nodes(stage):
                raise InfeasibleError(
                    f"stage {stage} is left to {there[0]} alone, which has come lately and has nothing of it; start "
                    "the run again from its last checkpoint"
                )


def _dumped(restored: RestoredStage | None) -> dict[str, Any] | None:
    return None if restored is None else restored.model_dump()
