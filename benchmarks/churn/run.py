"""Goodput of four ways to live with losses, in simulation, over public failure traces and drawn ones.

    python benchmarks/churn/run.py [--traces FOLDER] [--nodes 18 --nodes 36 --nodes 64] [--only NAME] [--quick]

`FOLDER` holds traces of others: `bamboo/g4dn-trace.csv`, `bamboo/p3-trace.csv`, `sailor/a100_trace_original.json`.
Without it only the losses are replayed that are drawn here: of stages, at the rates of CheckFree, and of single nodes.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click

from common.small_experiment import small_experiment
from common.table import Columns, Result, machine, markdown, merged
from skippipe.planning.churn.churn_costs import ChurnCosts
from skippipe.planning.churn.comparison import ChurnOptions, compare_methods
from skippipe.planning.churn.failure_trace import FailureTrace, drawn_losses, drawn_stage_losses
from skippipe.planning.churn.surviving_paces import SurvivingPaces
from skippipe.planning.churn.trace_files import load_trace
from skippipe_scheduler.errors import InputError
from skippipe_scheduler.files import parse
from skippipe_scheduler.options import LostStage, SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.build import build_problem
from skippipe_scheduler.problem.cluster import Cluster
from skippipe_scheduler.problem.rules import skip_rules
from skippipe_scheduler.problem.workload import Workload
from skippipe_scheduler.solver.solve import solve
from skippipe_scheduler.yaml_file import read_yaml

HERE = Path(__file__).parent
CLUSTER = HERE.parents[1] / "configs" / "clusters" / "regions-12.yaml"
HIDDEN, MLP, LAYERS, VOCABULARY, TOKENS = 2048, 5632, 24, 32_000, 4096
"""The Llama of 1.5 billion parameters that the cluster file was measured for."""
LAYER_PARAMETERS = 4 * HIDDEN**2 + 3 * HIDDEN * MLP
PARAMETERS = LAYERS * LAYER_PARAMETERS + 2 * HIDDEN * VOCABULARY
NUM_STAGES = 8
FILES = {
    "Bamboo g4dn": "bamboo/g4dn-trace.csv",
    "Bamboo p3": "bamboo/p3-trace.csv",
    "Sailor A100": "sailor/a100_trace_original.json",
}
STAGE_RATES = (0.10, 0.16, 0.33)
"""Probabilities that a stage fails within an hour, as CheckFree has them."""
DRAWN_S = 100 * 3600.0
"""How long traces are that are drawn: at the lowest rate there are some ten losses."""
NEW_MACHINE_S = 120.0
"""Until others have taken the place of lost machines, in traces that are drawn. Chosen."""
SMALL_MTBF_S = (60.0, 30.0)
"""Of single nodes of the small experiment, each back after `SMALL_REJOIN_S`, for `SMALL_S`: the planned measurement of
goodput on one machine."""
SMALL_REJOIN_S, SMALL_S = 20.0, 600.0
SMALL_COSTS = ChurnCosts(planning=0.2)
"""As `benchmarks/faults` sets `recovery.planning_s`."""
WAYS: tuple[LostStage, ...] = ("routes_around", "stop")
WHOLE_PLAN = 30
"""The plan of all nodes has this many times the steps of search of one for the nodes that are left."""
SEEDS = 3
"""Each trace is put on the nodes this many times, by other draws; the results have the mean."""


def make_plan(num_nodes: int, evaluations: int) -> Plan:
    """Plan the Llama on so many nodes, dealt out over the regions of the cluster file."""
    content = read_yaml(CLUSTER, InputError)
    kinds = content["nodes"][:12]
    content["nodes"] = [
        kinds[index % 12] | {"name": f"{kinds[index % 12]['region'].lower()}-{index // 12}"}
        for index in range(num_nodes)
    ]
    cluster = parse(Cluster, content, str(CLUSTER), InputError)
    workload = Workload(
        num_layers=LAYERS,
        layer_forward_flop=2 * TOKENS * LAYER_PARAMETERS,
        loss_flop=6 * TOKENS * HIDDEN * VOCABULARY,
        activation_bytes=2 * TOKENS * HIDDEN,
        layer_gradient_bytes=2 * LAYER_PARAMETERS,
        embedding_and_head_gradient_bytes=2 * 2 * HIDDEN * VOCABULARY,
        layer_state_bytes=16 * LAYER_PARAMETERS,
        embedding_and_head_state_bytes=16 * 2 * HIDDEN * VOCABULARY,
        layer_resident_bytes=1,
        embedding_and_head_resident_bytes=1,
    )
    rules = skip_rules(NUM_STAGES, 0.33)
    problem = build_problem(cluster, workload, rules, num_microbatches=3 * num_nodes)
    return solve(problem, SolveOptions(max_evaluations=evaluations))


def make_small_plan() -> Plan:
    """Plan the small experiment that `benchmarks/faults` kills processes of."""
    from skippipe.planning.experiment_plan import plan_experiment

    with tempfile.TemporaryDirectory() as folder:
        sections = {
            "pipeline": {"stage_sizes": (3, 2, 2), "planner": {"max_evaluations": 200}},
            "training": {"num_microbatches": 6},
        }
        return plan_experiment(small_experiment(Path(folder), "planned", 7, **sections))


class Row(NamedTuple):
    """One trace on one plan."""

    name: str
    paces: Callable[[], SurvivingPaces]
    """Of the plan, which rows share."""
    trace: Callable[[Plan, int], FailureTrace]
    """Of a plan and a seed."""
    options: ChurnOptions


def all_rows(folder: Path | None, node_counts: Sequence[int], evaluations: int) -> Iterator[Row]:
    """Yield the rows of the table; those of files where there is a folder of them."""
    large = ChurnOptions(parameters=PARAMETERS, max_evaluations=evaluations)
    small = ChurnOptions(costs=SMALL_COSTS, max_evaluations=evaluations)
    for num_nodes in node_counts:
        paces = cache(partial(paces_of, partial(make_plan, num_nodes, WHOLE_PLAN * evaluations), evaluations))
        for title, file in FILES.items() if folder else ():
            yield Row(f"{title}, {num_nodes} nodes", paces, partial(trace_of_file, (folder or HERE) / file), large)
        for rate in STAGE_RATES:
            yield Row(f"stages, {rate:.0%} an hour, {num_nodes} nodes", paces, partial(trace_of_stages, rate), large)
    paces = cache(partial(paces_of, make_small_plan, evaluations))
    for mtbf_s in SMALL_MTBF_S:
        yield Row(f"one in {mtbf_s:g} s, 7 processes", paces, partial(trace_of_singles, mtbf_s), small)


def paces_of(make: Callable[[], Plan], evaluations: int) -> SurvivingPaces:
    """Return what a plan's nodes that are left can do, to be planned when it is asked for."""
    return SurvivingPaces(make(), max_evaluations=evaluations)


def trace_of_file(path: Path, plan: Plan, seed: int) -> FailureTrace:
    """Return the trace of a file on a plan's nodes."""
    return load_trace(path, plan, seed=seed)


def trace_of_stages(rate: float, plan: Plan, seed: int) -> FailureTrace:
    """Return losses of whole stages with this probability within an hour."""
    return drawn_stage_losses(plan, rate, DRAWN_S, rejoin_s=NEW_MACHINE_S, seed=seed)


def trace_of_singles(mtbf_s: float, plan: Plan, seed: int) -> FailureTrace:
    """Return losses of single nodes, one every `mtbf_s` on the mean."""
    return drawn_losses(plan.nodes, mtbf_s, SMALL_S, rejoin_s=SMALL_REJOIN_S, seed=seed)


def measure(row: Row, seeds: int) -> Result:
    """Replay the trace of a row, put on the nodes by several seeds."""
    paces = row.paces()
    plan = paces.plan
    goodputs: dict[str, list[float]] = {}
    traces = [row.trace(plan, seed) for seed in range(seeds)]
    for trace in traces:
        for way in WAYS:
            runs = compare_methods(plan, trace, replace(row.options, lost_stage=way), paces).runs
            for name, run in runs.items():
                title = f"{name}, {way}" if name == "in the run" else name
                goodputs.setdefault(title, []).append(run.goodput)
    return {
        "name": row.name,
        "iteration_s": plan.predicted.iteration_s,
        "hours": mean(trace.duration_s for trace in traces) / 3600,
        "losses": mean(trace.num_losses for trace in traces),
        "present": mean(trace.present_share(plan.nodes) for trace in traces),
        "goodput": {name: mean(values) for name, values in goodputs.items()},
        "spread": {name: (min(values), max(values)) for name, values in goodputs.items()},
    }


def share_cell(name: str) -> Callable[[Result], str]:
    """Return how a goodput is written: the mean, and the least and the most of the seeds."""

    def cell(result: Result) -> str:
        least, most = result["spread"][name]
        return f"{result['goodput'][name]:.1%} ({least:.1%} to {most:.1%})"

    return cell


COLUMNS: Columns = {
    "trace": lambda result: result["name"],
    "iteration": lambda result: f"{result['iteration_s']:.3g} s",
    "length": lambda result: f"{result['hours']:.1f} h",
    "losses": lambda result: f"{result['losses']:.0f}",
    "nodes there": lambda result: f"{result['present']:.0%}",
    **{f"ours: {way.replace('_', ' ')}": share_cell(f"in the run, {way}") for way in WAYS},
    "restart": share_cell("checkpoint-restart"),
    "restart with all nodes": share_cell("checkpoint-restart, all nodes"),
    "redundant": share_cell("redundant computation"),
    "rebuild": share_cell("stage rebuilding"),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traces", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of traces.")
@click.option("--nodes", type=int, multiple=True, default=(18, 36, 64), show_default=True)
@click.option("--only", multiple=True, help="Rows whose names contain this.")
@click.option("--quick", is_flag=True, help="One seed, hardly any search; writes to a temporary folder.")
def main(traces: Path | None, nodes: tuple[int, ...], only: tuple[str, ...], quick: bool) -> None:
    """Replay all rows and write results.json and results.md beside this file."""
    folder = Path(tempfile.mkdtemp()) if quick else HERE
    rows = [*all_rows(traces, nodes, 10 if quick else 300)]
    names = [row.name for row in all_rows(Path("."), (18, 36, 64), 0)]
    for row in rows:
        if only and not any(part in row.name for part in only):
            continue
        result = measure(row, 1 if quick else SEEDS)
        result |= {"quick": quick, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
        click.echo(f"{row.name}: {', '.join(f'{name} {share:.1%}' for name, share in result['goodput'].items())}")
        results = merged(folder / "results.json", result, names)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "results.md").write_text(markdown("Goodput of runs that lose nodes, simulated", COLUMNS, results))


if __name__ == "__main__":
    main()
