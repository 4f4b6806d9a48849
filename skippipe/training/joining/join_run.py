"""Coming into a run from its members' contacts alone: `skippipe join`."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from skippipe.data.kept_tokenizer import TOKENIZER
from skippipe.errors import CommunicationError, ConfigError, InputError
from skippipe.membership.addresses import Place
from skippipe.membership.live_run import MEMBERS_FILE, Contacts, LiveRun, ask_member, find_live_run
from skippipe.membership.shared_secret import SECRET, own_secret
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.watch import open_watch
from skippipe.training.joining.invitation import StartFacts, invited, train_invited
from skippipe.training.joining.newcomer import read_facts, train_newcomer
from skippipe.training.joining.received_experiment import received_experiment
from skippipe.training.signals import StopSignal
from skippipe.training.trainer import TrainingSummary
from skippipe_scheduler.errors import nearest
from skippipe_scheduler.files import parse, read_json

logger = logging.getLogger(__name__)


def join_run(place: str, node: str | None, overrides: Sequence[str], stop: StopSignal) -> TrainingSummary:
    """Join the run at `place` as one of its nodes, before its start or later, and train until its end.

    Args:
        place: HOST:PORT of a member (the secret is in the environment), a run directory or a file of contacts.
        node: Name of the node; one that is missing at present where None.
        overrides: `key.sub=value` for what differs on this host.
        stop: What says that a signal came.

    Returns:
        How the training ended.

    Raises:
        InputError: There is no such place, node or file.
        CommunicationError: No member answers, or the run ended before this process was in it.
    """
    address = None if Path(place).exists() else Place.of(place)
    if address is None:
        live = _kept_run(Path(place))
    else:
        secret = own_secret()
        if secret is None:
            raise ConfigError(f"{SECRET} is not set; the run's secret is in RUN/{MEMBERS_FILE} on its members' hosts")
        found = _ask(address, secret, stop)
        if isinstance(found, StartFacts):
            return train_invited(address, secret, found, node, overrides, stop)
        live = found
    return _join(place, live, node, overrides, stop)


def _join(place: str, live: LiveRun, node: str | None, overrides: Sequence[str], stop: StopSignal) -> TrainingSummary:
    facts = read_facts(live)
    experiment = received_experiment(facts, live.fetch(TOKENIZER) or b"", overrides)
    nodes = PlanSet.from_json(facts.plans).main.nodes
    own = _missing_node(live, nodes) if node is None else node
    if own not in nodes:
        raise ConfigError(f"--node: the run has no node {own!r}; {nearest(own, [*nodes])}")
    timeout_s, local_rank = experiment.comm.timeout_s, int(os.environ.get("LOCAL_RANK", "0"))
    watch = open_watch(None, 0, os.environ, timeout_s, under_agent="TORCHELASTIC_RUN_ID" in os.environ)
    with DistributedContext(nodes.index(own), 1, local_rank, timeout_s, watch=watch, live_run=live) as context:
        summary = train_newcomer(experiment, context, stop)
    if summary is None:
        raise CommunicationError(f"{place}: the run has ended before this process was in it")
    return summary


def _ask(place: Place, secret: str, stop: StopSignal) -> LiveRun | StartFacts:
    """Return the run at a place, or what it tells before its start; wait a while for one that is about to come."""
    deadline_s = time.monotonic() + time_limits.CALLED_S
    while True:
        try:
            return invited(place, secret) or ask_member(*place, secret)
        except CommunicationError as reason:
            if time.monotonic() > deadline_s or stop.requested:
                raise
            logger.warning("%s; asking again for at most %.0f s", reason, deadline_s - time.monotonic())
        time.sleep(time_limits.WATCH_S)


def _kept_run(path: Path) -> LiveRun:
    path = path / MEMBERS_FILE if path.is_dir() else path
    found = find_live_run([read_contacts(path).model_dump_json()])
    if found is None:
        raise CommunicationError(f"{path}: no member of that run answers; it has ended, or cannot be reached from here")
    return found


def read_contacts(path: Path) -> Contacts:
    """Return what the members of a run left in a file; raise `InputError` where it is no such file."""
    return parse(Contacts, read_json(path, InputError), str(path), InputError)


def _missing_node(live: LiveRun, nodes: Sequence[str]) -> str:
    """Return a node that is not in the run; the members need a moment to notice and say that one is lost."""
    deadline_s = time.monotonic() + time_limits.NOTICED_LOSS_S
    known: LiveRun | None = live
    while known is not None:
        present = {member.name for member in read_facts(known).members}
        missing = next((node for node in nodes if node not in present), None)
        if missing is not None:
            return missing
        if time.monotonic() > deadline_s:
            raise ConfigError(f"all {len(nodes)} nodes of the run are in it; --node takes the place of one by name")
        time.sleep(time_limits.FILE_POLL_S)
        known = find_live_run([live.contacts.model_dump_json()])
    raise CommunicationError("no member of the run answers any more; it has ended")
