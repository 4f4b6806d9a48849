"""`skippipe simulate`: replay a plan exactly, or with jitter and slow nodes."""

import json
from pathlib import Path

import click

from skippipe.errors import ConfigError


@click.command("simulate")
@click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--trace", type=click.Path(path_type=Path), help="Chrome/Perfetto trace to write.")
@click.option("--jitter", "jitter_sigma", type=click.FloatRange(min=0), default=0.0, help="Sigma of lognormal jitter.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the jitter.")
@click.option("--slow", multiple=True, metavar="NODE=FACTOR", help="A node that computes FACTOR times as long.")
def command(
    plan_path: Path, as_json: bool, trace: Path | None, jitter_sigma: float, seed: int, slow: tuple[str, ...]
) -> None:
    """Replay the plan file PLAN and show iteration time, utilisation and memory of each node."""
    from skippipe_scheduler.files import write_atomically
    from skippipe_scheduler.simulate import simulate
    from skippipe_scheduler.trace import to_chrome_trace
    from skippipe_scheduler.validate import load_plan

    plan = load_plan(plan_path)
    slowdown = dict(_slow_node(entry, plan.nodes) for entry in slow)
    timeline = simulate(plan, slowdown=slowdown, jitter_sigma=jitter_sigma, seed=seed)
    if trace is not None:
        write_atomically(trace, json.dumps(to_chrome_trace(timeline)))
    nodes = {
        node: {
            "stage": plan.stage_of[node],
            "busy_s": timeline.busy_s[node],
            "utilisation": timeline.busy_s[node] / timeline.iteration_s,
            "peak_memory": timeline.peak_memory[node],
        }
        for node in plan.nodes
    }
    summary = {
        "iteration_s": timeline.iteration_s,
        "pipeline_s": timeline.pipeline_s,
        "reduce_exposed_s": timeline.reduce_exposed_s,
        "bubble_fraction": timeline.bubble_fraction,
        "nodes": nodes,
    }
    if as_json:
        click.echo(json.dumps(summary))
        return
    click.echo(
        f"iteration {timeline.iteration_s:.4f} s (pipeline {timeline.pipeline_s:.4f} s, reduction not hidden "
        f"{timeline.reduce_exposed_s:.4f} s), bubble {timeline.bubble_fraction:.1%}"
    )
    for node, facts in nodes.items():
        click.echo(
            f"  {node:20} stage {facts['stage']:<3} busy {facts['utilisation']:>6.1%}"
            f"   at most {facts['peak_memory']} microbatches of {plan.costs.memory[node]}"
        )


def _slow_node(entry: str, nodes: tuple[str, ...]) -> tuple[str, float]:
    node, _, factor = entry.partition("=")
    if node not in nodes:
        raise ConfigError(f"--slow {entry}: the plan has no node {node!r}; it has {', '.join(nodes)}")
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--slow {entry}: expected NODE=FACTOR with a positive factor")
    return node, value
