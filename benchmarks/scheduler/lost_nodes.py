"""How long a plan without a lost node takes, and what a little search makes of it.

    python benchmarks/scheduler/lost_nodes.py --nodes 20 --nodes 128 --nodes 1000

solves a synthetic problem of each size, loses nodes of its plan one at a time, and prints a table: seconds of the
mending (median and longest) and iteration times relative to the plan of all nodes, mended and after `--search` seconds.
"""

import random
import time
from statistics import median

import click
from instances import LARGE, Shape, synthetic_problem

from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.solver.lost_nodes import replan_without
from skippipe_scheduler.solver.solve import solve

SHAPES = {20: Shape(20, 6, 4, 40), 128: Shape(128, 16, 11, 500), 1000: LARGE}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--nodes", type=click.Choice([*map(str, SHAPES)]), multiple=True, default=("20", "128"))
@click.option("--losses", default=5, help="Nodes that are lost, one at a time.")
@click.option("--solve-limit", default=20.0, help="Seconds for the plan of all nodes.")
@click.option("--search", default=2.0, help="Seconds of search after a loss.")
@click.option("--seed", default=0)
def main(nodes: tuple[str, ...], losses: int, solve_limit: float, search: float, seed: int) -> None:
    """Print a row for each number of nodes."""
    click.echo("| nodes | microbatches | mended in, median (longest) | iteration, mended | after search |")
    click.echo("|---|---|---|---|---|")
    for count in map(int, nodes):
        plan = solve(synthetic_problem(SHAPES[count], seed), SolveOptions(time_limit_s=solve_limit, seed=seed))
        generator = random.Random(seed)
        lost = generator.sample([node for stage in plan.stages if len(stage.nodes) > 1 for node in stage.nodes], losses)
        _timed(plan, lost[0], 0.0)  # loads the compiled search
        mended = [_timed(plan, node, 0.0) for node in lost]
        searched = [_timed(plan, node, search) for node in lost]
        seconds = [taken_s for taken_s, _ in mended]
        click.echo(
            f"| {count} | {len(plan.microbatches)} | {median(seconds):.3f} s ({max(seconds):.3f} s) | "
            f"{median(slower for _, slower in mended):.2f} | {median(slower for _, slower in searched):.2f} |"
        )


def _timed(plan: Plan, node: str, limit_s: float) -> tuple[float, float]:
    """Return the seconds that a plan without `node` takes, and its iteration time relative to that of `plan`."""
    begun_s = time.perf_counter()
    found = replan_without(plan, [node], SolveOptions(time_limit_s=limit_s))
    taken_s = time.perf_counter() - begun_s
    validate(found)
    return taken_s, found.predicted.iteration_s / plan.predicted.iteration_s


if __name__ == "__main__":
    main()
