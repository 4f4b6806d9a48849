"""Where a process that comes into a run gets the state of its stage: from a replica, a copy, or a checkpoint."""

import json
import time
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from skippipe.checkpoint.reader import latest_checkpoint, load_tensors, read_metadata
from skippipe.config.experiment import Experiment
from skippipe.errors import CheckpointError, EpochEndedError
from skippipe.membership.exchange import Source, fetch
from skippipe.membership.keys import run_keys
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks import time_limits
from skippipe.training.recovery.stage_copies import STEP_OF, kept_name
from skippipe.training.recovery.stage_state import STATE, StageState

if TYPE_CHECKING:
    from skippipe.membership.epoch import Member
    from skippipe.membership.membership import Membership


class FoundState(NamedTuple):
    """The state of a stage, and what it was found in."""

    state: StageState
    place: Literal["a replica", "a copy", "a checkpoint"]


class StateSource(NamedTuple):
    """Finds the state of this process's stage once it is a member."""

    experiment: Experiment
    membership: "Membership"
    plans: PlanSet
    """Those of all nodes."""
    secret: str

    def find(self, step: int, standing: Collection[str], parameters: Iterable[str]) -> FoundState:
        """Return the newest state of the stage, where the members `standing` are after `step`.

        Raises `EpochEndedError` where the epoch ends meanwhile, and `CheckpointError`, which ends this process and not
        the run, where nothing is left.
        """
        own, main = self.membership.own.name, self.plans.main
        stage = main.stage_of[own]
        others = [member for member in self.membership.members if member.name != own and member.data_port]
        holders = [member for member in others if member.name in standing and main.stage_of[member.name] == stage]
        if holders:
            return FoundState(self._of_holders(holders), "a replica")
        copied = self._of_keepers(stage, others)
        if copied is not None:
            return FoundState(copied, "a copy")
        saved = self._of_checkpoint(parameters)
        if saved is not None:
            return FoundState(saved, "a checkpoint")
        raise CheckpointError(
            f"stage {stage}: no node holds it after step {step}, none has a copy, and there is no checkpoint in "
            f"{self.experiment.run_path}; start the run again from the beginning"
        )

    def _fetch(self, member: "Member", name: str) -> bytes | None:
        silence_s = self.experiment.recovery.silence_s
        return fetch(Source(member.host, member.data_port), run_keys(self.secret), name, silence_s)

    def _of_holders(self, holders: Iterable["Member"]) -> StageState:
        """Wait for one that holds the stage to be ready."""
        while True:
            for member in holders:
                content = self._fetch(member, STATE)
                if content is not None:
                    return StageState.from_bytes(content)
            if self.membership.ending is not None:
                raise EpochEndedError(self.membership.ending)
            time.sleep(time_limits.STORE_POLL_S)

    def _of_keepers(self, stage: int, others: Iterable["Member"]) -> StageState | None:
        name, found = kept_name(stage), []
        for member in others:
            step = self._fetch(member, STEP_OF + name)
            if step is not None:
                found.append((int(json.loads(step)), member))
        if not found:
            return None
        _, newest = max(found, key=lambda entry: entry[0])
        content = self._fetch(newest, name)
        return None if content is None else StageState.from_bytes(content)

    def _of_checkpoint(self, parameters: Iterable[str]) -> StageState | None:
        checkpoint = latest_checkpoint(self.experiment.run_path)
        if checkpoint is None:
            return None
        names, metadata = tuple(parameters), read_metadata(checkpoint)
        model = load_tensors(checkpoint, metadata, "model", names)
        optimizer = load_tensors(checkpoint, metadata, "optimizer", names)
        return StageState(metadata.step, metadata.elapsed_s, model, optimizer)
