"""Is a plan ever worse than the baselines printed beside it? Random clusters, each planned as `skippipe plan` does.

    python benchmarks/scheduler/baselines.py [--clusters 300] [--first-seed 0] [--time-limit 2]

Results are kept in baselines.json and baselines.md after each cluster; those that are there are not planned again.
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from random_clusters import random_request

from common.command import write_whole
from common.table import machine
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.solver.planner import solve_with_baselines

HERE = Path(__file__).resolve().parent
SAME = 1 + 1e-9
"""Factor within which a plan is as good as a baseline: rounding."""
Row = dict[str, object]


@click.command()
@click.option("--clusters", type=int, default=300, show_default=True)
@click.option("--first-seed", type=int, default=0, show_default=True)
@click.option("--time-limit", "time_limit_s", type=float, default=2.0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE)
def main(clusters: int, first_seed: int, time_limit_s: float, out: Path) -> None:
    """Plan random clusters and compare each plan with the best baseline beside it."""
    path = out / "baselines.json"
    rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(first_seed, first_seed + clusters):
        if str(seed) in rows:
            continue
        rows[str(seed)] = compared(seed, time_limit_s)
        click.echo(f"{seed}: {rows[str(seed)]}", err=True)
        write_whole(path, json.dumps(rows, indent=1) + "\n")
        write_whole(out / "baselines.md", page(rows))
    click.echo(page(rows))


def compared(seed: int, time_limit_s: float) -> Row:
    """Plan one cluster; return what was asked and all iteration times."""
    request = random_request(seed, SolveOptions(time_limit_s=time_limit_s))
    problem, begin_s = request.problem, time.perf_counter()
    result = solve_with_baselines(request)
    wall_s = time.perf_counter() - begin_s
    validate(result.plan)
    best_s = min(baseline.predicted.iteration_s for baseline in result.baselines.values())
    iteration_s = result.plan.predicted.iteration_s
    return {
        "nodes": len(result.plan.nodes),
        "stages": len(result.plan.stages),
        "route_length": result.plan.rules.route_length,
        "contention": result.plan.costs.contention,
        "reduction": getattr(problem, "reduction", ""),
        "plan_s": iteration_s,
        **{f"{name.replace(' ', '_')}_s": plan.predicted.iteration_s for name, plan in result.baselines.items()},
        "reduction_exposed_s": result.plan.predicted.reduce_exposed_s,
        "bound_s": result.plan.predicted.lower_bound_s,
        "wall_s": round(wall_s, 1),
        "time_limit_s": time_limit_s,
        "no_worse": iteration_s <= best_s * SAME,
        "why_slower": result.why_slower,
        "commit": machine(HERE)["commit"],
    }


def page(rows: dict[str, Row]) -> str:
    """Return the summary, and every cluster on which the plan was worse."""
    worse = {seed: row for seed, row in rows.items() if not row["no_worse"]}
    shares = sorted(float(str(row["plan_s"])) / float(str(row["full_pipeline_s"])) for row in rows.values())
    lines = [
        "# Plans beside their baselines",
        "",
        f"{len(rows)} random clusters (`random_clusters.py`, seeds {min(map(int, rows))} to {max(map(int, rows))}), "
        f"`python benchmarks/scheduler/baselines.py`.",
        "",
        f"- worse than the best baseline: {len(worse)}",
        f"- iteration relative to the full pipeline: median {shares[len(shares) // 2]:.2f}, "
        f"best {shares[0]:.2f}, worst {shares[-1]:.2f}",
        f"- longest wall time: {max(float(str(row['wall_s'])) for row in rows.values()):.1f} s",
    ]
    for seed, row in worse.items():
        lines.append(f"- seed {seed}: {row['plan_s']} s against {row['full_pipeline_s']} s; {row['why_slower']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
