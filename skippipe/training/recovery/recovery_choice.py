"""Whether a run outlives its processes: as its settings say, and where they leave it open, as it is launched."""

import os
from collections.abc import Sequence
from typing import Final

from skippipe.config.experiment import Experiment
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.problem.cluster import Device

SIBLINGS: Final = "LOCAL_WORLD_SIZE"
"""Environment variable with the number of processes that one launcher runs on a host; where none is given, one."""


def may_find_a_run(experiment: Experiment) -> bool:
    """Whether this process may find a run under way that takes it in."""
    enabled = experiment.recovery.enabled
    if enabled != "auto":
        return enabled
    return _siblings() == "1" and not experiment.optimizer.traits.is_deepspeed


def why_off(experiment: Experiment, context: DistributedContext, device_types: Sequence[Device]) -> str | None:
    """Return why the run ends with any of its processes, None where it outlives them. All ranks call this together."""
    if context.store is None:
        return "one process runs all"
    obstacle = experiment.recovery_obstacle(context.world_size)
    if obstacle is not None or experiment.recovery.enabled is True:
        return obstacle
    if experiment.comm.backend != "gloo" and all(device == "cuda" for device in device_types):
        return "it has not been tried with NCCL (comm.backend: gloo allows it, recovery.enabled: true forces it)"
    counts = all_gather_json(context, Topic.SIBLINGS, _siblings)
    crowded = next((count for count in counts if count != "1"), None)
    if crowded is not None:
        return f"a launcher that runs {crowded} processes on a host ends all of them with one"
    return None


def _siblings() -> str:
    return os.environ.get(SIBLINGS, "1")
