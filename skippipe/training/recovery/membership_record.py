"""What is kept of a change of membership: one line on the terminal, one event, and the plan that began with it."""

import logging
import re
from pathlib import Path

from skippipe.errors import InputError, SkipPipeError
from skippipe.monitor.run_events import MembershipChange, read_changes
from skippipe.runtime.plans.plan_set import PlanSet

logger = logging.getLogger(__name__)
Incarnations = dict[str, str]
"""The members of an epoch by name, and which process each of them is."""
KNOWN_EPOCHS = 20
"""As many at the end are known; those of which no change is recorded are one or two."""
_PLAN_NAME = re.compile(r"epoch-(\d+)\.[a-z]+\.json")


class KnownEpochs:
    """Who was in the last epochs: the first rank of one may die before it has recorded what changed with it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._members: dict[int, Incarnations] = {}

    def add(self, number: int, members: Incarnations) -> None:
        """Take the members of an epoch that ends."""
        self._members[number] = members
        for old in sorted(self._members)[:-KNOWN_EPOCHS]:
            del self._members[old]

    def before_change(self, *, is_shared: bool) -> Incarnations:
        """Return who was in the epoch of the last change that is recorded, else in the last epoch.

        What others have recorded is seen where all share the run directory; an earlier start of the run may have
        recorded other epochs.
        """
        last = self._members[max(self._members)]
        if not is_shared:
            return last
        try:
            changes = read_changes(self._run_dir)
        except InputError as reason:
            logger.warning("%s", reason)
            return last
        if not changes:
            return self._members.get(0, last)
        newest = changes[-1]
        number = newest.epoch if newest.epoch_of_start is None else newest.epoch_of_start
        return self._members.get(number, last)


def record(change: MembershipChange, plans: PlanSet, run_dir: Path) -> None:
    """Say and write down a change, and keep the plans that began with it; a failure to write is logged.

    Every start of a run counts its epochs from 1. What is kept counts on from the epochs that are kept already.
    """
    logger.warning("%s", change)
    folder = run_dir / "epochs"
    number = max(change.epoch, _last_kept(folder) + 1)
    try:
        folder.mkdir(exist_ok=True)
        plans.main.save(folder / f"epoch-{number:04d}.plan.json")
        if plans.joining is not None:
            plans.joining.save(folder / f"epoch-{number:04d}.joining.json")
    except (OSError, SkipPipeError) as reason:
        logger.warning("the plan of epoch %d is not kept (%s)", number, reason)
    change.model_copy(update={"epoch": number, "epoch_of_start": change.epoch}).append_to(run_dir)


def _last_kept(folder: Path) -> int:
    """Return the highest number of an epoch whose plan is kept, 0 where none is."""
    names = (_PLAN_NAME.fullmatch(path.name) for path in folder.glob("epoch-*.json"))
    return max((int(name[1]) for name in names if name), default=0)
