"""A process that comes into a run under way: it prepares by itself, is taken in, and trains with the others."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager

from skippipe.checkpoint.disks.run_disks import RunDisks
from skippipe.checkpoint.reader import latest_checkpoint, read_metadata
from skippipe.config.experiment import Experiment
from skippipe.data.kept_tokenizer import FOLDER, TOKENIZER, unpack_tokenizer
from skippipe.data.samples import RunText, SampleOrder
from skippipe.errors import CommunicationError, ConfigError, InputError, StoppedError
from skippipe.membership.addresses import own_address
from skippipe.membership.epoch import Epoch
from skippipe.membership.live_run import LiveRun, find_live_run
from skippipe.membership.membership import Membership
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner_factory import make_unconnected_runner
from skippipe.training.measurement.memory_report import MemoryReport
from skippipe.training.recovery.open_membership import in_membership, open_membership
from skippipe.training.recovery.run_facts import RunFacts
from skippipe.training.recovery.run_recovery import RunRecovery
from skippipe.training.run_owner import RunOwner
from skippipe.training.signals import StopSignal
from skippipe.training.startup import (
    agreed_settings,
    check_same_settings,
    check_same_versions,
    check_start,
    installed_versions,
    read_tokens,
    samples_of,
)
from skippipe.training.trainer import Trainer, TrainingSummary
from skippipe_scheduler.files import parse, parse_json

logger = logging.getLogger(__name__)


def train_newcomer(experiment: Experiment, context: DistributedContext, stop: StopSignal) -> TrainingSummary | None:
    """Join the run that `context.live_run` names and train with its members until its end.

    Returns None where the run has ended before this process was in it; else as `skippipe.training.loop.train`.
    """
    live = context.live_run
    assert live is not None
    facts = read_facts(live)
    plans = PlanSet.from_json(facts.plans)
    own = _own_node(plans, context.rank)
    _check_alike(experiment, facts, own)
    if not (experiment.run_path / FOLDER).is_dir():
        unpack_tokenizer(live.fetch(TOKENIZER) or b"", experiment.run_path, anew=True)
    host = own_address(live.members[0].host, live.members[0].port)
    with open_membership(experiment, own, host, live.secret) as (membership, exchange):
        recovery = RunRecovery(experiment, plans, context, membership, exchange, live.secret)
        with (
            in_membership(context, membership),
            closing(recovery),
            _trainer(experiment, facts, plans, context, recovery) as trainer,
        ):
            recoverable = trainer.recoverable
            assert recoverable is not None
            recoverable.arrive()
            logger.info("%s is ready, and asks to be taken in", own)
            epoch = _join(membership, live, stop)
            if epoch is None:
                return _finished(experiment, context)
            recovery.come(recoverable, epoch)
            summary = trainer.run(stop)
            context.finish()
        membership.leave()
    return summary


def read_facts(live: LiveRun) -> RunFacts:
    """Return what a member tells of a run; raise `InputError` where it is of another version."""
    content = parse_json(live.facts, "what the run tells", InputError)
    return parse(RunFacts, content, "what the run tells", InputError)


def _own_node(plans: PlanSet, rank: int) -> str:
    nodes = plans.main.nodes
    if rank >= len(nodes):
        raise ConfigError(f"this process is rank {rank}, the run under way has {len(nodes)} nodes: {', '.join(nodes)}")
    return nodes[rank]


def _check_alike(experiment: Experiment, facts: RunFacts, own: str) -> None:
    """Raise `ConfigError` where this process was started with something else than the run."""
    versions = {"skippipe": facts.skippipe, "torch": facts.torch}
    check_same_versions(installed_versions(), own, versions, "the run under way")
    theirs = agreed_settings(Experiment.model_validate(facts.experiment))
    check_same_settings(agreed_settings(experiment), f"on {own}", theirs, "in the run under way")


@contextmanager
def _trainer(
    experiment: Experiment, facts: RunFacts, plans: PlanSet, context: DistributedContext, recovery: RunRecovery
) -> Iterator[Trainer]:
    """Give the trainer of this process's node, which so far is connected to nobody and has no state."""
    own = plans.main.nodes[context.rank]
    device_type = check_start(experiment, plans.main, context).device_types[0]
    hardware = facts.trainer.hardware(plans.main.nodes, own, device_type)
    order = _samples(experiment, facts, own, reads=own in plans.main.stages[0].nodes)
    runner = make_unconnected_runner(experiment, plans, plans.main.stage_of[own], context)
    memory = MemoryReport.of_plans(experiment, plans, context, hardware.device_types)
    with (
        closing(RunOwner(experiment.run_path, RunDisks((0,), 0, facts.trainer.disk_nonce))) as owner,
        closing(Trainer(experiment, runner, order, context, hardware, memory, owner, recovery)) as trainer,
    ):
        trainer.records.wandb_id = facts.trainer.wandb_id
        yield trainer


def _samples(experiment: Experiment, facts: RunFacts, own: str, *, reads: bool) -> SampleOrder:
    """Return the samples of the run; only a node that begins microbatches needs the text."""
    cache, told = read_tokens(experiment) if reads else None, facts.trainer
    return samples_of(experiment, cache, RunText(told.fingerprint, told.num_tokens, told.own_texts), own)


def _join(membership: Membership, live: LiveRun, stop: StopSignal) -> Epoch | None:
    """Wait until the members take this process in, at the end of a step; return None where nobody is left of them."""
    contacts = [(member.host, member.port) for member in live.members]
    while True:
        try:
            return membership.join(contacts, time_limits.JOIN_LOOK_S)
        except CommunicationError as waiting:
            logger.info("%s", waiting)
        if stop.requested:
            raise StoppedError("stopped while it waited to be taken into the run")
        if find_live_run([live.contacts.model_dump_json()]) is None:
            return None


def _finished(experiment: Experiment, context: DistributedContext) -> TrainingSummary | None:
    """Return how the run ended, where it has done all its steps."""
    checkpoint = latest_checkpoint(experiment.run_path)
    if checkpoint is None or (metadata := read_metadata(checkpoint)).step < experiment.training.max_steps:
        return None
    step = metadata.step
    return TrainingSummary(step, step, metadata.tokens, None, False, None, None, context.rank)
