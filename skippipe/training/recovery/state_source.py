"""Where a process that has got a stage finds its state: with a replica, in a copy, beside it, or in a checkpoint."""

import json
import time
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from skippipe.checkpoint.disks.disk_view import DiskView
from skippipe.checkpoint.disks.newest_part import NEWEST, bring_part, newest_part, newest_view
from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.model_tensors import load_model_tensors
from skippipe.checkpoint.reader import checkpoint_path, load_tensors
from skippipe.config.experiment import Experiment
from skippipe.errors import CheckpointError, EpochEndedError
from skippipe.membership.download import Source
from skippipe.runtime.ranks import time_limits
from skippipe.training.recovery.stage_copies import LABEL_OF, CopyLabel, kept_name
from skippipe.training.recovery.stage_state import STATE, StageState
from skippipe_scheduler.files import parse
from skippipe_scheduler.plan.plan import Plan

if TYPE_CHECKING:
    from skippipe.membership.epoch import Member
    from skippipe.membership.exchange import Exchange
    from skippipe.membership.membership import Membership


class WantedState(NamedTuple):
    """A stage whose state is sought."""

    stage: int
    parameters: tuple[str, ...]
    """Their names, as in the whole model."""
    plan: Plan
    """The main plan of the members."""
    standing: Collection[str]
    """Members that have the state of their stage in that plan, or will have it at once."""


class FoundState(NamedTuple):
    """The state of a stage, and what it was found in."""

    state: StageState
    place: Literal["a replica", "a copy", "its neighbours", "a checkpoint"]


class WayToState(Protocol):
    """Where else a state can come from; see `skippipe.training.recovery.lost_stage`."""

    def state(self, wanted: WantedState, source: "StateSource") -> FoundState | None:
        """Return the state, or None where there is none."""


class StateSource(NamedTuple):
    """Finds the state of a stage for a process that is a member and has not got it."""

    experiment: Experiment
    membership: "Membership"
    exchange: "Exchange"

    def find(self, wanted: WantedState, ways: Iterable[WayToState]) -> FoundState:
        """Return the state of a replica, else what the first of `ways` gives that gives any.

        Raises `EpochEndedError` where the epoch ends meanwhile, and `CheckpointError`, which ends this process and not
        the run, where nothing is left.
        """
        held = self.replica_of(wanted.stage, wanted)
        if held is not None:
            return FoundState(held, "a replica")
        for way in ways:
            found = way.state(wanted, self)
            if found is not None:
                return found
        raise CheckpointError(
            f"stage {wanted.stage}: no node holds it, and no way of recovery.lost_stage leads to a state of it "
            f"({', '.join(self.experiment.recovery.lost_stage)}); start the run again from the beginning"
        )

    def replica_of(self, stage: int, wanted: WantedState) -> StageState | None:
        """Return what another member has of a stage, once it is ready, or None where no other has it."""
        nodes = {node for node in wanted.plan.stages[stage].nodes if node in wanted.standing}
        own = self.membership.own.name
        holders = [member for member in self._members() if member.name in nodes and member.name != own]
        while holders:
            for member in holders:
                content = self._fetch(member, STATE)
                if content is not None:
                    return StageState.from_bytes(content)
            if self.membership.ending is not None:
                raise EpochEndedError(self.membership.ending)
            time.sleep(time_limits.STORE_POLL_S)
        return None

    def copy_of(self, stage: int) -> StageState | None:
        """Return the newest copy of a stage that a member has, this process included."""
        name, found = kept_name(stage), []
        for member in self._members():
            label = self._fetch(member, LABEL_OF + name)
            if label is not None:
                found.append((CopyLabel.from_bytes(label).step, member))
        if not found:
            return None
        _, newest = max(found, key=lambda entry: entry[0])
        content = self._fetch(newest, name)
        return None if content is None else StageState.from_bytes(content)

    def saved(self, wanted: WantedState) -> StageState | None:
        """Return a stage's part of the newest checkpoint that the members' disks have, or None where they have none.

        Files that are not on this disk come to it.
        """
        members, own = self._members(), self.membership.own.name
        views = {index: self._newest(member, is_own=member.name == own) for index, member in enumerate(members)}
        part = newest_part(
            {index: view for index, view in views.items() if view}, wanted.plan.stages[wanted.stage].layers
        )
        if part is None:
            return None
        checkpoint = checkpoint_path(self.experiment.run_path, part.metadata.step)
        here = next(index for index, member in enumerate(members) if member.name == own)
        places = tuple((member.host, member.data_port) for member in members)
        peers = PeerFiles(self.exchange, places, 2 * self.experiment.recovery.silence_s)
        bring_part(part, checkpoint, here, views[here], peers, lambda: self.membership.ending is None)
        model = load_model_tensors(checkpoint, wanted.parameters)
        optimizer = load_tensors(checkpoint, part.metadata, "optimizer", wanted.parameters)
        return StageState(part.metadata.step, part.metadata.elapsed_s, model, optimizer)

    def _newest(self, member: "Member", *, is_own: bool) -> DiskView | None:
        """Return what a member's disk has of the newest checkpoint."""
        if is_own:
            return newest_view(self.experiment.run_path)
        told = self._fetch(member, NEWEST)
        return None if told is None else parse(DiskView, json.loads(told), member.name, CheckpointError)

    def _members(self) -> list["Member"]:
        return [member for member in self.membership.members if member.data_port]

    def _fetch(self, member: "Member", name: str) -> bytes | None:
        """Return what a member has under a name, None where it has nothing.

        Raises `EpochEndedError` where the epoch ends meanwhile, as it does where the member is lost or silent.
        """
        place, silence_s = Source(member.host, member.data_port), 2 * self.experiment.recovery.silence_s
        content = self.exchange.fetch(place, name, silence_s, lambda: self.membership.ending is None)
        if content is None and (reason := self.membership.ending) is not None:
            raise EpochEndedError(reason)
        return content
