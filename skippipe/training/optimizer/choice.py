"""The optimizer that an experiment asks for, on what a runner holds."""

import logging
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import ProcessGroup

from skippipe.config.experiment import Experiment
from skippipe.runtime.runner import Runner
from skippipe.training.optimizer.adamw import AdamW
from skippipe.training.optimizer.deepspeed_setup import prepare
from skippipe.training.optimizer.interface import OptimizerBackend
from skippipe.training.optimizer.shared_adamw import SharedAdamW

logger = logging.getLogger(__name__)


def make_optimizer(experiment: Experiment, runner: Runner, *, outlives: bool = False) -> OptimizerBackend:
    """Return the optimizer of this rank's parameters; all ranks call this together.

    In a run that `outlives` its nodes, shared-out state has a second copy, unless `recovery.copy_interval` is 0.

    Where a stage has one replica there is nothing to share out: plain AdamW does the same, unless DeepSpeed keeps the
    state in host memory. Raises `ConfigError` where DeepSpeed cannot run here.
    """
    options, scheduler, max_steps = experiment.optimizer, experiment.lr_scheduler, experiment.training.max_steps
    replicas = runner.replicas
    if options.traits.is_deepspeed:
        prepare(experiment)
        if replicas is not None or options.offload:
            from skippipe.training.optimizer.zero import DeepSpeedZero

            group = replicas or _only_this_rank(experiment.comm.timeout_s)
            zero = DeepSpeedZero(runner.parameters(), options, scheduler, max_steps, group, runner.with_replicas)
            zero.connect()
            return zero
        logger.info("optimizer.backend: %s has nothing to share out here: one replica; plain AdamW", options.backend)
    parameters = runner.parameters()
    if not options.traits.shards_state or options.traits.is_deepspeed:
        return AdamW(parameters, options, scheduler, max_steps)
    guard = None if replicas is None else runner.with_replicas
    copies = outlives and experiment.recovery.copy_interval > 0
    return SharedAdamW(parameters, options, scheduler, max_steps, replicas, guard, keeps_copies=copies)


def _only_this_rank(timeout_s: float) -> ProcessGroup:
    """Return a group of this rank alone, which DeepSpeed needs to run at all."""
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=timeout)
    group: ProcessGroup = dist.new_group(
        [dist.get_rank()], timeout=timeout, backend="gloo", use_local_synchronization=True
    )
    return group
