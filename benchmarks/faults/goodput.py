"""A run that loses nodes all the time: its useful steps, those of checkpoint-restart, and what `simulate` predicts.

Tasks and transfers take as long as the plan says (`emulation`), so that seven processes on a few cores are seven nodes.
"""

import csv
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from lossy_run import LIMIT_S, NUM_NODES, Processes, lines_of, make_experiment, wait_for
from outcomes import Row, median

from common.one_machine import CLUSTER
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.planning.churn.churn_costs import best_interval_s

REJOIN_S = 20.0
ENDLESS = 1_000_000
TFLOP_PER_S = 0.0002
"""Of each node: an iteration takes some tenths of a second, most of which the processors rest."""
UNDISTURBED_S = 20.0
WARM_STEPS = 20
RARE = 1_000_000
PLANNING_S = 0.5
SIMULATED: Final = ("in the run", "checkpoint-restart", "checkpoint-restart, all nodes")
"""What `skippipe simulate` calls the ways."""


class Change(NamedTuple):
    """A node is lost, or its process is started again, so many seconds after the beginning."""

    time_s: float
    node: str
    back: bool


def drawn(nodes: Sequence[str], mtbf_s: float, duration_s: float, seed: int) -> list[Change]:
    """Return losses, one in `mtbf_s` on the mean, of nodes that are there, each followed by a return."""
    generator, changes, time_s = random.Random(seed), list[Change](), 0.0
    until_s = dict.fromkeys(nodes, -math.inf)
    while (time_s := time_s + generator.expovariate(1 / mtbf_s)) < duration_s:
        node = generator.choice([name for name in nodes if until_s[name] < time_s])
        until_s[node] = time_s + REJOIN_S
        changes += [Change(time_s, node, back=False), Change(time_s + REJOIN_S, node, back=True)]
    return sorted(change for change in changes if change.time_s < duration_s)


def save_trace(changes: Sequence[Change], duration_s: float, path: Path) -> None:
    """Write the trace as `skippipe simulate --churn` reads it."""
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("time_s", "node", "event"))
        rows.writerows((f"{time_s:.2f}", node, "back" if back else "lost") for time_s, node, back in changes)
        rows.writerow((f"{duration_s:.2f}", "", "end"))


def goodput(folder: Path, out: Path, mtbf_s: float, duration_s: float, seed: int) -> Row:
    """Train through the same losses in three ways; return shares of the undisturbed throughput, and the prediction."""
    from skippipe.planning.experiment_plan import plan_experiment

    (folder / "slow.yaml").write_text(
        CLUSTER.replace("count: 4", f"count: {NUM_NODES}").replace("0.05, mem", f"{TFLOP_PER_S}, mem")
    )
    plan = folder / "slow.plan.json"
    whole = plan_experiment(_experiment(folder, "planned", RARE, recovers=True))
    whole.save(plan)
    changes, trace = drawn(whole.nodes, mtbf_s, duration_s, seed), out / f"goodput-{mtbf_s:g}-s.trace.csv"
    save_trace(changes, duration_s, trace)
    ours = in_the_run(folder, plan, whole.rank_of, changes, duration_s)
    restarts = Restarts(folder, plan, ours.pace, mtbf_s)
    others = {f"restart on {on}": restarts.replay(on, changes, duration_s) for on in ("those left", "all nodes")}
    restarted = others["restart on those left"]
    costs = {"groups": ours.pause_s, "agreement": 0.0, "planning": 0.0, "restart": restarted.pause_s}
    costs["checkpoint"] = restarted.checkpoint_s
    predicted = _predicted(plan, trace, costs)
    row: Row = {
        "MTBF s": mtbf_s,
        "duration s": duration_s,
        "losses": sum(not change.back for change in changes),
        "undisturbed, steps/s": round(ours.pace, 3),
    }
    ways = {"in the run": ours, **others}
    shares = {name: way.useful / ours.pace / duration_s for name, way in ways.items()}
    for name, method in zip(ways, SIMULATED, strict=True):
        row |= {name: round(shares[name], 3), f"{name}, predicted": round(predicted[method]["goodput"], 3)}
    for name in others:
        row[f"in the run / {name}"] = round(shares["in the run"] / shares[name], 2) if shares[name] else math.inf
    return row | {
        "checkpoint every s": round(restarted.interval_s, 2),
        "median pause s": round(ours.pause_s, 2),
        "median restart s": round(restarted.pause_s, 2),
        "failed": ours.failed,
    }


class Replayed(NamedTuple):
    """What a way made of the trace."""

    useful: int
    """Steps that count at the end, from the begin of the trace on."""
    pace: float
    """Undisturbed steps in a second."""
    pause_s: float
    interval_s: float
    checkpoint_s: float
    failed: Sequence[str]


def _experiment(folder: Path, name: str, interval: int, *, recovers: bool) -> Experiment:
    return make_experiment(
        folder,
        name,
        ENDLESS,
        emulation={"compute": True, "links": True},
        evaluation={"interval": 0},
        checkpoint={"interval": interval},
        recovery={"enabled": recovers, "planning_s": PLANNING_S},
    ).model_copy(update={"cluster": str(folder / "slow.yaml")})


def in_the_run(
    folder: Path, plan: Path, rank_of: dict[str, int], changes: Sequence[Change], duration_s: float
) -> Replayed:
    """Let the run itself go on; an undisturbed time before gives the throughput."""
    experiment = _experiment(folder, "lossy", RARE, recovers=True)
    metrics, events = experiment.run_path / "metrics.jsonl", experiment.run_path / "events.jsonl"
    processes = Processes(experiment, plan)
    newest = dict(enumerate(processes))
    wait_for(metrics, WARM_STEPS, time.monotonic() + LIMIT_S)
    pace = _pace(metrics)
    begun_s, before = time.monotonic(), _count(metrics)
    for change in _in_time(changes, begun_s):
        rank = rank_of[change.node]
        if change.back:
            processes.begin(rank)
            newest[rank] = processes[-1]
        else:
            newest[rank].kill()
    time.sleep(max(0.0, begun_s + duration_s - time.monotonic()))
    useful = _count(metrics) - before
    _kill(processes)
    pauses = [event["total_s"] for event in lines_of(events)]
    lost = [node for event in lines_of(events) for node in event["lost"]]
    wanted = sorted(change.node for change in changes if not change.back)
    failed = [] if sorted(lost) == wanted else [f"lost {lost}, not {wanted}"]
    return Replayed(useful, pace, median(pauses) or 0.0, 0.0, 0.0, failed)


class Restarts:
    """Checkpoint-restart at its best: all start again at once, from processes that have imported everything.

    On those left, as nobody else has it for pipelines: nodes that are back are taken in by a stop that saves, and a
    restart. Or on all nodes, as pipelines are started elsewhere: the others wait until the lost ones are back. A change
    that comes during a restart waits for its end.
    """

    def __init__(self, folder: Path, plan: Path, pace: float, mtbf_s: float) -> None:
        from skippipe.runtime.plans.plan_set import PlanSet
        from skippipe_scheduler.plan.validate import load_plan

        self._folder, self._pace, self._mtbf_s = folder, pace, mtbf_s
        self._plans = PlanSet(load_plan(plan))
        self._starts = 0
        self._checkpoint_s = self._measured_checkpoint_s()

    def replay(self, on: Literal["those left", "all nodes"], changes: Sequence[Change], duration_s: float) -> Replayed:
        """Train through the losses of a trace."""
        nodes = frozenset(self._plans.main.nodes)
        interval_s, pauses_s = best_interval_s(self._checkpoint_s, self._mtbf_s), list[float]()
        interval = max(1, round(interval_s * self._pace))
        experiment = _experiment(self._folder, f"restarted-on-{on.replace(' ', '-')}", interval, recovers=False)
        metrics = experiment.run_path / "metrics.jsonl"
        processes: Processes | None = self._start(experiment, nodes)
        wait_for(metrics, WARM_STEPS, time.monotonic() + LIMIT_S)
        present, begun_s, before = nodes, time.monotonic(), _count(metrics)
        for change in _in_time(changes, begun_s):
            changed_s = time.monotonic()
            if processes is not None and change.back:
                processes[0].terminate()
                processes.finish()
            elif processes is not None:
                _kill(processes)
            present = present | {change.node} if change.back else present - {change.node}
            processes = self._start(experiment, present) if on == "those left" or present == nodes else None
            if processes is not None and _goes_on(metrics, begun_s + duration_s):
                pauses_s.append(time.monotonic() - changed_s - 1 / self._pace)
        time.sleep(max(0.0, begun_s + duration_s - time.monotonic()))
        useful = _count(metrics) - before
        if processes is not None:
            _kill(processes)
        return Replayed(useful, self._pace, median(pauses_s) or 0.0, interval_s, self._checkpoint_s, [])

    def _measured_checkpoint_s(self) -> float:
        """Return for how long training stands still for a checkpoint, in a run that saves often."""
        experiment = _experiment(self._folder, "saving", 2, recovers=False)
        metrics = experiment.run_path / "metrics.jsonl"
        processes = self._start(experiment, frozenset(self._plans.main.nodes))
        wait_for(metrics, WARM_STEPS, time.monotonic() + LIMIT_S)
        _kill(processes)
        entries = lines_of(metrics)
        blocked_s = [float(entry[Metric.BLOCKED_S]) for entry in entries if Metric.BLOCKED_S in entry]
        return max(0.001, sum(blocked_s) / max(1, len(blocked_s)))

    def _start(self, experiment: Experiment, present: Collection[str]) -> Processes:
        """Start one process for each node that is there."""
        from skippipe.planning.surviving_plans import plans_without

        self._starts += 1
        missing = [node for node in self._plans.main.nodes if node not in present]
        plans = plans_without(self._plans, missing, time_limit_s=0.1) if missing else self._plans
        path = self._folder / f"start-{self._starts}.plan.json"
        plans.main.save(path)
        return Processes(experiment, path, num_ranks=len(plans.main.nodes))


def _kill(processes: Processes) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _in_time(changes: Sequence[Change], begun_s: float) -> Iterator[Change]:
    """Yield each change when it is due."""
    for change in changes:
        time.sleep(max(0.0, begun_s + change.time_s - time.monotonic()))
        yield change


def _goes_on(metrics: Path, until_s: float) -> bool:
    """Wait for the next step; a run that begins again first takes the steps after its checkpoint out of the file."""
    least = _count(metrics)
    while time.monotonic() < until_s:
        count = _count(metrics)
        least = min(least, count)
        if count > least:
            return True
        time.sleep(0.02)
    return False


def _count(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0


def _pace(metrics: Path) -> float:
    """Return the steps in a second, over an undisturbed time."""
    begun_s, before = time.monotonic(), _count(metrics)
    time.sleep(UNDISTURBED_S)
    return (_count(metrics) - before) / (time.monotonic() - begun_s)


def _predicted(plan: Path, trace: Path, costs: dict[str, float]) -> dict[str, Any]:
    """Return what `skippipe simulate --churn` says of each method on the same trace."""
    named = [part for name, cost_s in costs.items() for part in ("--cost", f"{name}={cost_s:.3f}")]
    command = [sys.executable, "-m", "skippipe", "simulate", str(plan), "--churn", str(trace), "--json", *named]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    methods: dict[str, Any] = json.loads(done.stdout)["churn"]["methods"]
    return methods
