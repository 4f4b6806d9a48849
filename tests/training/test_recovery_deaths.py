"""Deaths at each point of a recovery, one behind the other, and at the start: the others go on, or end at once."""

import signal
from collections.abc import Mapping
from pathlib import Path

from processes import free_port, preloaded
from random_plans import random_plan
from recovering_ranks import STEP, recover
from training_runs import CLUSTER, make_experiment

from skippipe.monitor.run_events import read_changes
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe_scheduler.plan.plan import Plan

LIMIT_S = 100.0
FIRST_POINTS = ("BEGIN", "VOTE", "DECISION")
"""Those of the first nodes in order: the first that lives decides."""
OTHER_POINTS = ("AGREED", "GROUPS", "EPOCH", "TAKE_STATE")
"""Those of any nodes."""


def plan_of(num_nodes: int) -> Plan:
    """Return a plan of two stages."""
    return random_plan(1, num_nodes=num_nodes, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=3)


def run_with(folder: Path, plan: Plan, faults: Mapping[str, str], lacking: frozenset[str] = frozenset()) -> list[str]:
    """Let one process for each node be in a run in which these die; return what each of the others has written."""
    planned = [{"node": node, "step": 1 if at == "START" else STEP + 1, "at": at} for node, at in faults.items()]
    experiment = make_experiment(
        folder,
        emulation={"faults": planned},
        comm={"timeout_s": LIMIT_S},
        recovery={"enabled": True, "planning_s": 0, "plans_ahead": False, "copy_interval": 0},
    )
    experiment.run_path.mkdir()
    (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {len(plan.nodes)}"))
    port, processes = free_port(), {}
    for rank, node in enumerate(plan.nodes):
        values = {"RANK": rank, "WORLD_SIZE": len(plan.nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place = {name: str(value) for name, value in values.items()}
        arguments = (experiment, PlanSet.of(plan), place, len(plan.nodes) - len(faults), folder / node)
        processes[node] = preloaded().Process(target=recover, args=arguments, kwargs={"lacks_state": node in lacking})
        processes[node].start()
    for process in processes.values():
        process.join(LIMIT_S)
    codes = {node: process.exitcode for node, process in processes.items()}
    assert codes == {node: -signal.SIGKILL if node in faults else 0 for node in plan.nodes}
    return [(folder / node).read_text() for node in plan.nodes if node not in faults]


def test_deaths_at_every_point_of_a_recovery_are_outlived(tmp_path: Path) -> None:
    plan = plan_of(11)
    nodes, num_first = plan.nodes, len(FIRST_POINTS)
    faults = dict(zip(nodes, FIRST_POINTS, strict=False))
    giver, taker, other, *_ = [node for node in nodes[num_first:] if plan.stage_of[node] == 1]
    elsewhere = next(node for node in nodes[num_first:] if plan.stage_of[node] == 0)
    left = {taker, other, elsewhere}
    mortal = [node for node in nodes[num_first:] if node not in left and node != giver]
    faults |= {giver: "GIVE_STATE"} | dict(zip(mortal, OTHER_POINTS, strict=True))
    told = run_with(tmp_path, plan, faults, frozenset({taker, mortal[-1]}))
    assert told == [" ".join(node for node in nodes if node in left)] * len(left)
    changes = read_changes(tmp_path / "run")
    assert sorted(node for change in changes for node in change.lost) == sorted(faults)
    assert {change.step for change in changes} == {STEP}
    assert {change.num_nodes for change in changes} == {len(nodes)}


def test_a_process_that_dies_before_it_has_said_hello_is_named_at_once(tmp_path: Path) -> None:
    told = run_with(tmp_path, plan_of(3), {"node-1": "START"})
    assert told == ["PeerLostError: node-1 lost (connection closed) before the run began; start it again"] * 2
