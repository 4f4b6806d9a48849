"""A start to which one host brings the experiment: `skippipe train --listen` there, `skippipe join` on all others."""

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from torch._C._distributed_c10d import Store

from skippipe.config.experiment import Experiment
from skippipe.data.kept_tokenizer import TOKENIZER, packed_tokenizer
from skippipe.errors import ConfigError, InputError
from skippipe.membership.addresses import Place
from skippipe.membership.download import Source, fetch
from skippipe.membership.exchange import PORT, Exchange
from skippipe.membership.keys import run_keys
from skippipe.membership.live_run import ANSWER_S, MOST_BYTES
from skippipe.membership.shared_secret import SECRET, own_secret
from skippipe.monitor.terminal import say
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.arrival import open_store
from skippipe.runtime.ranks.store_names import PLACE, store_of_run
from skippipe.training.joining.launched import train_launched
from skippipe.training.joining.meeting import next_free_rank, take_place
from skippipe.training.joining.received_experiment import received_experiment
from skippipe.training.recovery.run_facts import ToldExperiment
from skippipe.training.signals import StopSignal
from skippipe.training.startup import check_same_versions, installed_versions
from skippipe.training.trainer import TrainingSummary
from skippipe_scheduler.errors import nearest
from skippipe_scheduler.files import parse, parse_json
from skippipe_scheduler.problem.cluster import load_cluster

START: Final = "start"
"""Under which name the first host has what the others need for a start."""


class StartFacts(ToldExperiment):
    """What the first host of a start tells the others."""

    nodes: tuple[str, ...]
    """Those of the cluster, in the order of their ranks."""
    store_port: int
    """Where its store is."""


def train_listening(
    experiment: Experiment, plan_path: Path | None, place: Place, stop: StopSignal | None = None
) -> TrainingSummary:
    """Wait at `place` for the processes of all other nodes, tell them the experiment, and train with them.

    This process is the first node of the cluster. Raises `ConfigError` where a launcher gave it another place, or the
    port is taken; else as `train_experiment`.
    """
    if "RANK" in os.environ:
        raise ConfigError("--listen is for processes that no launcher has started; leave it out, or unset RANK")
    nodes = tuple(node.name for node in load_cluster(Path(experiment.cluster)).members())
    secret, shown = own_secret(), "..."
    if secret is None:
        secret = shown = secrets.token_hex(32)
    experiment.run_path.mkdir(parents=True, exist_ok=True)
    store_port = _free_port()
    facts = StartFacts(**ToldExperiment.of(experiment).model_dump(), nodes=nodes, store_port=store_port)
    take_place(0, len(nodes), Place(place.host, store_port))
    os.environ |= {SECRET: secret, PORT: str(place.port)}
    with closing(Exchange(run_keys(secret))) as exchange:
        exchange.offer(TOKENIZER, packed_tokenizer(experiment.data, experiment.run_path))
        exchange.offer(START, facts.model_dump_json().encode())
        say(f"{len(nodes) - 1} more to come, by: {SECRET}={shown} skippipe join {place.host}:{place.port}")
        return train_launched(experiment, plan_path, stop, time_limits.INVITED_S, when_met=exchange.close)


def invited(place: Place, secret: str) -> StartFacts | None:
    """Return what is told at `place` for a start, None where none is prepared there.

    Raises `CommunicationError` where nobody of that secret answers, `InputError` where it is another version's.
    """
    told = fetch(Source(*place), run_keys(secret), START, ANSWER_S, most_bytes=MOST_BYTES)
    if told is None:
        return None
    return parse(StartFacts, parse_json(told, "what the first host tells", InputError), "the first host", InputError)


def train_invited(
    place: Place, secret: str, facts: StartFacts, node: str | None, overrides: Sequence[str], stop: StopSignal
) -> TrainingSummary:
    """Begin to train with the process at `place`, as one of its nodes: the next one that is free where None is named.

    Raises as `train_experiment`, and `ConfigError` where there is no such node, or none is free.
    """
    check_same_versions(installed_versions(), "this host", facts.model_dump(), place.host)
    tokenizer = fetch(Source(*place), run_keys(secret), TOKENIZER, ANSWER_S, most_bytes=MOST_BYTES)
    experiment = received_experiment(facts, tokenizer or b"", overrides)
    store_place, nodes = Place(place.host, facts.store_port), facts.nodes
    take_place(1, len(nodes), store_place)
    store = store_of_run(open_store(os.environ, 1, experiment.comm.timeout_s))
    os.environ["RANK"] = str(free_rank(store, nodes, node))
    return train_launched(experiment, None, stop, time_limits.INVITED_S)


def free_rank(store: Store, nodes: Sequence[str], node: str | None) -> int:
    """Return the rank of a node that this process has from now on: `node`, or the next one that nobody has taken.

    The first belongs to the host that brings the experiment. A node that is named is taken in any case: its process may
    have been started again.
    """
    if node is not None:
        if node not in nodes[1:]:
            if node in nodes:
                raise ConfigError(f"--node: {node!r} is the node that brings the experiment; name another one")
            raise ConfigError(f"--node: the run has no node {node!r}; {nearest(node, [*nodes])}")
        rank = nodes.index(node)
        store.set(f"{PLACE}/{rank}", "named")
        return rank
    free = next_free_rank(store, len(nodes))
    if free is not None:
        return free
    raise ConfigError(
        f"all {len(nodes)} nodes have a process; start one again by --node NAME, or give the cluster file more"
    )


def _free_port() -> int:
    """Return a port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
