"""`skippipe simulate`: replay a plan exactly, with jitter, slow and lost nodes, or a run of it over a failure trace."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skippipe.cli.churn import ChurnArguments, churn_options, simulate_churn
from skippipe.cli.user_path import SEED, OutputFile, UserPath
from skippipe.errors import ConfigError

if TYPE_CHECKING:
    from skippipe_scheduler.analysis.critical_path import CriticalPath
    from skippipe_scheduler.analysis.jitter import JitterSummary
    from skippipe_scheduler.analysis.node_loss import NodeLoss
    from skippipe_scheduler.analysis.usage import Analysis
    from skippipe_scheduler.plan.plan import Plan

MOST_JITTER = 5.0
"""Beyond this sigma one task in twenty takes more than 3,700 times its usual time."""
MOST_NUMBER = 1e9
"""No node is slower by a larger factor, or lost later."""


@click.command("simulate")
@click.argument("plan_path", metavar="PLAN", type=UserPath())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--trace", type=OutputFile(), help="Chrome/Perfetto trace to write.")
@click.option("--cluster", "cluster_path", type=UserPath(), help="Cluster file with other times.")
@click.option(
    "--jitter", "jitter_sigma", type=click.FloatRange(0, MOST_JITTER), default=0.0, help="Sigma of lognormal jitter."
)
@click.option("--samples", type=click.IntRange(min=1), help="Iterations with jitter to summarise.")
@click.option("--seed", type=SEED, default=0, help="Seed of jitter (its first sample), or of losses.")
@click.option("--slow", multiple=True, metavar="NODE=FACTOR", help="A node that computes FACTOR times as long.")
@click.option("--lose", multiple=True, metavar="NODE=SECONDS", help="A node that is gone from this second on.")
@churn_options
def command(
    plan_path: Path,
    as_json: bool,
    trace: Path | None,
    cluster_path: Path | None,
    jitter_sigma: float,
    samples: int | None,
    seed: int,
    slow: tuple[str, ...],
    lose: tuple[str, ...],
    **churn: Any,
) -> None:
    """Replay the plan file PLAN: iteration time, critical path, utilisation and memory of each node.

    With --churn or --mtbf, replay a run of many iterations that loses nodes: its goodput, and what takes the rest.
    """
    from skippipe_scheduler.plan.validate import load_plan

    if math.isnan(jitter_sigma):
        raise ConfigError(f"--jitter {jitter_sigma}: expected a number from 0 to {MOST_JITTER:g}")
    if samples is not None and jitter_sigma == 0:
        raise ConfigError(f"--samples {samples}: without jitter all iterations are equal; add --jitter SIGMA")
    if samples is not None and lose:
        raise ConfigError("--samples and --lose: an iteration that loses a node has no end; give one of the two")
    plan = load_plan(plan_path)
    if cluster_path is not None:
        from skippipe_scheduler.plan.recost import recost
        from skippipe_scheduler.problem.cluster import load_cluster

        plan = recost(plan, load_cluster(cluster_path))
    arguments = ChurnArguments(**churn)
    if arguments.wanted:
        if jitter_sigma or slow or lose or trace is not None:
            raise ConfigError(
                "--churn and --mtbf go without --jitter, --slow, --lose and --trace: they are of one iteration"
            )
        _print(*simulate_churn(plan, arguments, seed), as_json=as_json)
        return
    slowdown = _by_node("--slow", slow, plan.nodes, "FACTOR", least=None)
    conditions = {"slowdown": slowdown, "jitter_sigma": jitter_sigma, "seed": seed}
    if lose:
        lost_s = _by_node("--lose", lose, plan.nodes, "SECONDS", least=0.0)
        summary, text = _with_loss(plan, lost_s, conditions, trace)
    else:
        summary, text = _complete(plan, conditions, trace, samples)
    _print(summary, text, as_json=as_json)


def _print(summary: dict[str, Any], text: str, *, as_json: bool) -> None:
    from skippipe.monitor.terminal import say

    if as_json:
        click.echo(json.dumps(summary))
    else:
        say(text)


def _complete(
    plan: "Plan", conditions: dict[str, Any], trace: Path | None, samples: int | None
) -> tuple[dict[str, Any], str]:
    """Return what is said of an iteration that comes to its end, for programs and for people."""
    from skippipe_scheduler.analysis.chrome_trace import save_chrome_trace
    from skippipe_scheduler.analysis.critical_path import critical_path
    from skippipe_scheduler.analysis.explain import path_summary
    from skippipe_scheduler.analysis.jitter import sample_iterations, summarise
    from skippipe_scheduler.analysis.usage import analyse
    from skippipe_scheduler.plan.simulate import simulate

    timeline = simulate(plan, **conditions)
    if trace is not None:
        save_chrome_trace(trace, timeline)
    analysis, path = analyse(plan, timeline), critical_path(plan, timeline)
    spread = summarise(sample_iterations(plan, samples, **conditions)) if samples is not None else None
    lines = [*_table(analysis), *path_summary(plan, path), *_spread(spread, conditions["seed"])]
    return _summary(plan, analysis, path, spread), "\n".join(lines)


def _table(analysis: "Analysis") -> list[str]:
    lines = [
        f"iteration {analysis.iteration_s:.4f} s (pipeline {analysis.pipeline_s:.4f} s, reduction not hidden "
        f"{analysis.reduce_exposed_s:.4f} s), bubble {analysis.bubble_fraction:.1%}",
        f"  {'node':20} {'stage':>5} {'busy':>7} {'transfers':>10} {'waiting':>8} {'held':>8}",
    ]
    whole_s = analysis.iteration_s or 1.0
    lines += [
        f"  {node.node:20} {node.stage:>5} {node.utilisation:>7.1%} {node.exposed_communication_s / whole_s:>10.1%}"
        f" {node.waiting_s / whole_s:>8.1%} {f'{node.peak_held}/{node.memory}':>8}"
        for node in analysis.nodes
    ]
    return [*lines, "  transfers, waiting: idle, the next input on its way or not made yet; held: microbatches at most"]


def _spread(spread: "JitterSummary | None", seed: int) -> list[str]:
    if spread is None:
        return []
    return [
        f"{spread.samples} samples: mean {spread.mean_s:.4f} s, p50 {spread.p50_s:.4f} s, p95 {spread.p95_s:.4f} s, "
        f"max {spread.max_s:.4f} s; the tables above are of seed {seed}"
    ]


def _summary(
    plan: "Plan", analysis: "Analysis", path: "CriticalPath", spread: "JitterSummary | None"
) -> dict[str, Any]:
    from dataclasses import asdict

    content = asdict(analysis)
    content["nodes"] = {node.pop("node"): node | {"peak_memory": node["peak_held"]} for node in content["nodes"]}
    content["critical_path"] = {
        "by_kind": path.by_kind,
        "by_place": path.by_place,
        "by_region": path.by_region(plan),
        "segments": [segment._asdict() for segment in path.segments],
    }
    if spread is not None:
        content["samples"] = asdict(spread)
    return content


def _with_loss(
    plan: "Plan", lost_s: dict[str, float], conditions: dict[str, Any], trace: Path | None
) -> tuple[dict[str, Any], str]:
    """Return what is said of an iteration that loses nodes, for programs and for people."""
    from skippipe_scheduler.analysis.chrome_trace import save_chrome_trace
    from skippipe_scheduler.analysis.node_loss import simulate_loss

    loss = simulate_loss(plan, lost_s, **conditions)
    if trace is not None:
        save_chrome_trace(trace, loss.timeline)
    content = {
        "lost_s": loss.lost_s,
        "unfinished": loss.unfinished,
        "all_dry_s": loss.all_dry_s,
        "done_s": loss.done_s,
        "lost_work_s": loss.lost_work_s,
        "unfinished_work_s": loss.unfinished_work_s,
        "lost_gradient_s": loss.lost_gradient_s,
        "nodes": {
            node: {"dry_s": end_s, "open_tasks": loss.open_tasks[node], "stage": plan.stage_of[node]}
            for node, end_s in loss.dry_s.items()
        },
    }
    return {"loss": content}, "\n".join(_loss_table(plan, loss))


def _loss_table(plan: "Plan", loss: "NodeLoss") -> list[str]:
    lost = ", ".join(f"{node} at {second:.4f} s" for node, second in loss.lost_s.items())
    ids = ", ".join(str(microbatch) for microbatch in loss.unfinished[:20]) + (
        " ..." if len(loss.unfinished) > 20 else ""
    )
    share = loss.lost_work_s / loss.done_s if loss.done_s else 0.0
    return [
        f"lost: {lost}; "
        + (
            f"the iteration has ended before, at {loss.timeline.iteration_s:.4f} s"
            if loss.ended
            else f"the other nodes run dry by {loss.all_dry_s:.4f} s"
        ),
        f"{len(loss.unfinished)} of {len(plan.microbatches)} microbatches cannot finish{': ' if ids else ''}{ids}",
        f"{loss.lost_work_s:.4f} s of computation out of {loss.done_s:.4f} s ({share:.1%}) are lost: "
        f"{loss.unfinished_work_s:.4f} s for unfinished microbatches, {loss.lost_gradient_s:.4f} s for gradients that "
        "only a lost node had",
        f"  {'node':20} {'stage':>5} {'runs dry':>12} {'tasks left':>11}",
        *(
            f"  {node:20} {plan.stage_of[node]:>5} {end_s:>10.4f} s {loss.open_tasks[node]:>11}"
            for node, end_s in loss.dry_s.items()
        ),
    ]


def _by_node(
    option: str, entries: tuple[str, ...], nodes: tuple[str, ...], unit: str, *, least: float | None
) -> dict[str, float]:
    """Read entries as `_node_number` does; raise `ConfigError` where a node is there twice."""
    found: dict[str, float] = {}
    for entry in entries:
        node, number = _node_number(option, entry, nodes, unit, least=least)
        if node in found:
            raise ConfigError(f"{option} {node}={number:g}: {node} has {found[node]:g} already; give one of them")
        found[node] = number
    return found


def _node_number(
    option: str, entry: str, nodes: tuple[str, ...], unit: str, *, least: float | None
) -> tuple[str, float]:
    """Read NODE=NUMBER; the number is at least `least`, or positive where that is None."""
    node, equals, number = entry.rpartition("=")  # a name may have one, too
    node = node if equals else entry
    if node not in nodes:
        raise ConfigError(f"{option} {entry}: the plan has no node {node!r}; it has {', '.join(nodes)}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if math.isnan(value) or value > MOST_NUMBER or (value <= 0 if least is None else value < least):
        limit = "a positive number" if least is None else f"a number of at least {least:g}"
        raise ConfigError(f"{option} {entry}: expected NODE={unit} with {limit} and at most {MOST_NUMBER:g}")
    return node, value
