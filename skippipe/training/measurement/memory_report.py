"""What the plan says each rank needs, checked before the run, and beside it what was measured."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch

from skippipe.config.experiment import Experiment
from skippipe.model.device import choose_device
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.planning.experiment_cluster import experiment_cluster
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.planning.workload.lighter_workloads import memory_advice
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.agreement import on_all_ranks
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.measurement.peak_memory import PeakMemory
from skippipe_scheduler.files import write_atomically
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.plan_memory import (
    MemoryEstimate,
    check_memory,
    given_limits,
    memory_of_one_process,
    plan_memory,
)
from skippipe_scheduler.problem.cluster import Device
from skippipe_scheduler.problem.memory import size_text

FILE_NAME = "memory.json"


def estimate_memory(
    experiment: Experiment, plans: PlanSet, device_types: Sequence[Device]
) -> tuple[MemoryEstimate, ...]:
    """Return the estimate for every process of the run, in rank order: of the plan that needs most there.

    `device_types` is what the ranks really compute on, whatever the cluster file says.
    """
    workload = experiment_workload(experiment)
    by_plan = [
        (memory_of_one_process(plan, workload, device_types[0]),)
        if len(device_types) == 1
        else plan_memory(plan, workload, dict(zip(plan.nodes, device_types, strict=True)))
        for _, plan in plans.items()
    ]
    return tuple(max(estimates, key=lambda estimate: estimate.total_bytes) for estimates in zip(*by_plan, strict=True))


def check_room(
    experiment: Experiment,
    plan: Plan,
    estimates: Sequence[MemoryEstimate],
    context: DistributedContext,
    device_types: Sequence[Device],
) -> None:
    """Raise an error on every rank where a node's given memory or a rank's own GPU has too little room.

    It is an `InfeasibleError` on the rank that has too little.
    """
    device = choose_device(experiment.training.device, context.local_rank)
    advice = memory_advice(experiment, plan, device_types)
    cluster = experiment_cluster(experiment)
    planned = cluster.devices()
    other = {
        node: f" (device {device}, the cluster file has it as {planned[node]}: correct it and plan again)"
        for node, device in zip(plan.nodes, device_types, strict=False)
        if planned.get(node, device) != device
    }
    check_memory(estimates, given_limits(cluster.members()), device_texts=other, advice=advice)

    def check_own() -> None:
        if device.type == "cuda":
            own = estimates[context.rank]
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            check_memory([own], {own.node: total_bytes}, named="the GPU's memory", advice=advice)

    on_all_ranks(context, Topic.ROOM, check_own)


class MemoryReport:
    """The peaks of all ranks beside their estimates."""

    def __init__(self, estimates: Sequence[MemoryEstimate], peak: PeakMemory) -> None:
        self.estimates = tuple(estimates)
        self.peak_bytes = [0] * len(estimates)
        self._peak = peak

    @classmethod
    def of_plans(
        cls, experiment: Experiment, plans: PlanSet, context: DistributedContext, device_types: Sequence[Device]
    ) -> Self:
        """Return the report of a run along these plans; `device_types` is as for `estimate_memory`."""
        device = choose_device(experiment.training.device, context.local_rank)
        return cls(estimate_memory(experiment, plans, device_types), PeakMemory(device))

    def of_ranks(self, estimates: Sequence[MemoryEstimate]) -> "MemoryReport":
        """Return the report of other ranks, of which this process is one; its own peak stays."""
        return MemoryReport(estimates, self._peak)

    def own(self) -> tuple[float, float, float]:
        """Return this rank's peak so far, and what its process and its GPU hold now, in bytes."""
        return float(self._peak.read()), float(self._peak.process_bytes()), float(self._peak.device_bytes())

    def metrics(self, peaks: Sequence[float]) -> StepMetrics:
        """Remember the peaks of all ranks; return the metrics of a step, for the rank with the highest peak."""
        self.peak_bytes = [round(peak) for peak in peaks]
        rank = max(range(len(peaks)), key=self.peak_bytes.__getitem__)
        return {
            Metric.PEAK_BYTES: self.peak_bytes[rank],
            Metric.ESTIMATED_BYTES: self.estimates[rank].total_bytes,
        }

    def write(self, run_dir: Path, check: Callable[[], None]) -> None:
        """Write the table for the report; raise `SkipPipeError` where that is impossible, or `check` raises it."""
        rows = [
            {
                "rank": rank,
                "node": estimate.node,
                "estimated_bytes": estimate.total_bytes,
                "state_bytes": estimate.state_bytes,
                "copy_bytes": estimate.copy_bytes,
                "activation_bytes": estimate.activation_bytes,
                "working_bytes": estimate.working_bytes,
                "message_bytes": estimate.message_bytes,
                "update_bytes": estimate.update_bytes,
                "peak_bytes": peak_bytes,
            }
            for rank, (estimate, peak_bytes) in enumerate(zip(self.estimates, self.peak_bytes, strict=True))
        ]
        write_atomically(run_dir / FILE_NAME, json.dumps({"ranks": rows}, indent=1) + "\n", check=check)

    def table(self) -> str:
        """Return a line a rank: estimate, its parts, and the peak where there is one."""
        measured = f"{'measured peak':>15}" if any(self.peak_bytes) else ""
        lines = [f"{'rank':>4}  {'node':20}{'memory by plan':>15}{measured}"]
        for rank, (estimate, peak_bytes) in enumerate(zip(self.estimates, self.peak_bytes, strict=True)):
            lines.append(
                f"{rank:>4}  {estimate.node:20}{size_text(estimate.total_bytes):>15}"
                f"{size_text(peak_bytes) if peak_bytes else '':>15}"
            )
        return "\n".join(lines)
