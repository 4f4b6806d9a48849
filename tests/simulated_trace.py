"""What the ranks of a run record, from the exact simulator and on clocks that differ."""

from collections.abc import Sequence

from skippipe.cluster.run_trace import MeasuredTask, MeasuredWait, Trace
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate


def simulated_trace(plan: Plan, steps: Sequence[int] = (4, 5)) -> Trace:
    """Return what ranks with clocks of their own would record of these iterations."""
    timeline = simulate(plan)
    trace = Trace()
    for step in steps:
        zero_s = {node: 0.3 * step * index for index, node in enumerate(plan.nodes)}
        started_s = {}
        free_s = dict.fromkeys(plan.nodes, 0.0)
        ready_s = {}
        for task in timeline.tasks:
            shift_s = zero_s[task.node]
            key = task.operation, task.microbatch
            trace.tasks.append(MeasuredTask(step, task.node, *key, task.start_s + shift_s, task.end_s + shift_s))
            started_s[task.node, *key] = task.start_s
            ready_s[task.node, *key] = free_s[task.node]
            free_s[task.node] = task.end_s + plan.costs.task_overhead_s
        trace.tasks += [MeasuredTask(step, node, "REDUCE", -1, free_s[node], free_s[node] + 9.0) for node in plan.nodes]
        for transfer in timeline.transfers:
            ready = ready_s[transfer.destination, transfer.user, transfer.microbatch]
            shift_s = zero_s[transfer.destination]
            wait = MeasuredWait(
                step,
                transfer.source,
                transfer.destination,
                transfer.microbatch,
                transfer.direction,
                ready + shift_s,
                max(ready, transfer.end_s) + shift_s,
            )
            trace.waits.append(wait)
    return trace
