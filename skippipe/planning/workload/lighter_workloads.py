"""What an experiment could change to need less memory: only what it has not done yet, and only what would do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from skippipe.config.experiment import Experiment
from skippipe.model.activations.activation_checkpointing import MODES
from skippipe.planning.workload.changed_experiment import Changes, changed, is_possible
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.plan_memory import MemoryEstimate, memory_of_one_process, plan_memory
from skippipe_scheduler.problem.cluster import Device
from skippipe_scheduler.problem.workload import LighterWorkload, LighterWorkloads, Workload

SHORTEST_SAMPLE = 256
"""Tokens below which shorter samples are no longer advised."""


def lighter_workloads(experiment: Experiment) -> LighterWorkloads:
    """Return what would take less memory, the mildest change of each kind first; at last resort everything together."""
    groups = [list(_possible(experiment, group)) for group in _groups(experiment)]
    strongest = [group[-1] for group in groups if group]
    together = {key: value for changes in strongest for key, value in changes.items()}
    last_resort = list(_possible(experiment, [together])) if len(strongest) > 1 else []
    return LighterWorkloads(
        [[_lighter(experiment, changes) for changes in group] for group in groups],
        [_lighter(experiment, changes) for changes in last_resort],
    )


def memory_advice(
    experiment: Experiment, plan: Plan, device_types: Sequence[Device]
) -> Callable[[MemoryEstimate, int], Iterable[str]]:
    """Return what `check_memory` asks which changes make the plan fit; `device_types` are those of its processes."""

    def needed_bytes(workload: Workload, node: str) -> int:
        if len(device_types) == 1:
            return memory_of_one_process(plan, workload, device_types[0]).total_bytes
        estimates = plan_memory(plan, workload, dict(zip(plan.nodes, device_types, strict=True)))
        return next(estimate.total_bytes for estimate in estimates if estimate.node == node)

    def advice(estimate: MemoryEstimate, limit_bytes: int) -> Iterable[str]:
        def suffices(workload: Workload) -> bool:
            return needed_bytes(workload, estimate.node) <= limit_bytes

        return lighter_workloads(experiment).that_suffice(suffices)

    return advice


def _groups(experiment: Experiment) -> Iterator[list[Changes]]:
    training, optimizer = experiment.training, experiment.optimizer
    yield [{"training.micro_batch_size": size} for size in _halves(training.micro_batch_size, 1)]
    stronger = MODES[MODES.index(training.activation_checkpointing) + 1 :]
    yield [
        {"training.activation_checkpointing": mode}
        for mode in stronger
        if not (training.compile and mode == "selective")
    ]
    if not optimizer.traits.shards_state:
        yield [{"optimizer.backend": "zero_redundancy"}]
    elif optimizer.traits.is_deepspeed and not optimizer.offload:
        yield [{"optimizer.offload": True}]
    if training.dtype == "float32":
        yield [{"training.dtype": "bfloat16"}]
    if training.micro_batch_size == 1:
        yield [{"training.sequence_length": length} for length in _halves(training.sequence_length, SHORTEST_SAMPLE)]


def _halves(value: int, least: int) -> Iterator[int]:
    """Yield a half, a quarter and so on, none below `least`."""
    while (value := value // 2) >= least:
        yield value


def _possible(experiment: Experiment, group: Sequence[Changes]) -> Iterator[Changes]:
    """Yield the changes that go with the rest of the experiment."""
    return (changes for changes in group if is_possible(experiment, changes))


def _lighter(experiment: Experiment, changes: Changes) -> LighterWorkload:
    @cache
    def workload() -> Workload:
        return experiment_workload(changed(experiment, changes))

    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return LighterWorkload(" and ".join(f"set {key} to {value}" for key, value in values.items()), workload)
