"""The first epoch of a run: all ranks of a start become its members together."""

from typing import TYPE_CHECKING

from skippipe.errors import InputError
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.files import parse

if TYPE_CHECKING:
    from skippipe.membership.membership import Membership


def begin_together(
    membership: "Membership", context: DistributedContext, limit_s: float, first: int = 0, faults: Faults | None = None
) -> None:
    """Connect this process to the members of all ranks; all of them call this together.

    They are in rank order, but for the one that is `first`. The epoch has ended already where one of them has died
    since all told who they are, which is where `faults` have their `START`.

    Raises `CommunicationError` where one of them does not come within `limit_s`.
    """
    from skippipe.membership.epoch import Member

    told = all_gather_json(context, Topic.MEMBERS, lambda: membership.own.model_dump(mode="json"))
    members = [parse(Member, each, "members", InputError) for each in told]
    members.insert(0, members.pop(first))
    if faults is not None:
        faults.reached("START", 1)
    membership.begin(members, limit_s)
