"""How a process becomes a member of a run: all of a start together, or one that comes later alone."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from skippipe.config.experiment import Experiment
from skippipe.errors import PeerLostError
from skippipe.membership.addresses import own_address
from skippipe.membership.shared_secret import own_secret
from skippipe.runtime.epochs.agreed_secret import agreed_secret
from skippipe.runtime.epochs.epoch_store import EpochStore
from skippipe.runtime.epochs.first_epoch import begin_together
from skippipe.runtime.epochs.freed_memory import keep_loaded_objects
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.recovery.run_recovery import RunRecovery

if TYPE_CHECKING:
    from skippipe.membership.exchange import Exchange
    from skippipe.membership.membership import Membership


@contextmanager
def open_recovery(experiment: Experiment, plans: PlanSet, context: DistributedContext) -> Iterator[RunRecovery]:
    """Make all ranks members of the run while entered; they enter together.

    Raises `PeerLostError` on all where one has died before it was in the run.
    """
    assert context.store is not None
    host = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    secret = agreed_secret(context, Topic.MEMBERSHIP_KEY, own_secret())
    with open_membership(experiment, plans.main.nodes[context.rank], host, secret) as (membership, exchange):
        faults = Faults(experiment.emulation.faults, membership.own.name)
        begin_together(membership, context, context.timeout_s, faults=faults)
        if membership.ending is not None:
            raise PeerLostError(f"{membership.ending} before the run began; start it again")
        recovery = RunRecovery(experiment, plans, context, membership, exchange, secret)
        with in_membership(context, membership), closing(recovery):
            context.store = EpochStore(context.store, context.timeout_s, lambda: membership.ending)
            if context.watch is not None:
                context.watch.follow(context.store)
            yield recovery
            membership.leave()


@contextmanager
def open_membership(
    experiment: Experiment, name: str, host: str, secret: str
) -> "Iterator[tuple[Membership, Exchange]]":
    """Give the membership of one process, which has not begun, and its exchange."""
    from skippipe.membership.exchange import Exchange
    from skippipe.membership.keys import run_keys
    from skippipe.membership.membership import Membership

    keep_loaded_objects()
    with (
        closing(Exchange(run_keys(secret))) as exchange,
        closing(
            Membership.open(name, host, secret, experiment.recovery.silence_s, data_port=exchange.port)
        ) as membership,
    ):
        yield membership, exchange


@contextmanager
def in_membership(context: DistributedContext, membership: "Membership") -> Iterator[None]:
    """Let a rank's waits end with the epochs of a membership."""
    context.membership = membership
    try:
        yield
    finally:
        context.membership = None
