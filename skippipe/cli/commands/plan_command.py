"""`skippipe plan`: solve, show the result beside its baselines, write the plan file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click

from skippipe.cli.user_path import SEED, OutputFile, UserPath
from skippipe.errors import ConfigError

# What solves is imported where it is called, so that `skippipe plan --help` answers at once; types cost nothing.
if TYPE_CHECKING:
    from skippipe.config.experiment import Experiment
    from skippipe_scheduler.plan.plan import Plan
    from skippipe_scheduler.plan.plan_memory import MemoryEstimate
    from skippipe_scheduler.problem.problem import Problem
    from skippipe_scheduler.solver.plan_request import PlanRequest
    from skippipe_scheduler.solver.planner import PlanWithBaselines


_START_S = 1.0
"""Seconds for imports and reading that do not count. Chosen: a limit of a second is then one for the search."""
_LEAST_COMPARED = 0.5
"""Share of this plan's search time that the full pipeline gets at least, or it is said. Chosen."""
_SAME = 1e-6
"""Share by which two times may differ and count as the same: rounding."""
_REPORT_S = 2.0
"""Seconds that a report takes. Measured: 1.9 s for 64 nodes, 2.8 s for 128 and 12,000 tasks."""
_LEAST_SEARCH_PART = 0.5
"""Share of the time limit that the solves get at least. Chosen."""
_BOUNDS_S, _LEAST_BOUNDS_S = 2.0, 0.5
"""Seconds for the bounds that are explained, at most and at least. Chosen."""
_TRIED_PART, _LEAST_TRIED_S, _MOST_TRIED_PART = 0.2, 1.0, 0.5
"""Share of the time limit in which changes are tried that would help, seconds at least, and share at most. Chosen."""


@click.command("plan")
@click.option("--config", "config_path", type=UserPath(), help="Experiment YAML.")
@click.option("--problem", "problem_path", type=UserPath(), help="Resolved problem file (JSON).")
@click.option("--time-limit", "time_limit_s", type=float, help="Seconds for the plan, its two baselines and a report.")
@click.option("--seed", type=SEED, help="Seed of the search.")
@click.option("--warm", "warm_path", type=UserPath(), help="Plan file to begin the search at.")
@click.option("--out", type=OutputFile(), help="Plan file to write.")
@click.option("--report", type=OutputFile(), help="HTML page to write.")
@click.option("--explain", "with_explanation", is_flag=True, help="Say what the iteration time is made of.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.argument("overrides", nargs=-1)
def command(
    config_path: Path | None,
    problem_path: Path | None,
    time_limit_s: float | None,
    seed: int | None,
    warm_path: Path | None,
    out: Path | None,
    report: Path | None,
    with_explanation: bool,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Choose placement, routes and order for an experiment or a problem file.

    OVERRIDES are key.sub=value, as in the experiment's YAML. Ctrl-C ends the search early with the best plan so far.
    """
    begin_s = perf_counter()
    if (config_path is None) == (problem_path is None):
        raise ConfigError("give either --config (an experiment) or --problem (a resolved problem file)")
    if time_limit_s is not None and not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise ConfigError(f"--time-limit {time_limit_s}: expected a positive number of seconds")
    experiment = None if config_path is None else _read_experiment(config_path, overrides)
    request = _request(experiment, problem_path, overrides)
    if time_limit_s is not None:
        request = request.with_options(time_limit_s=time_limit_s)
    if seed is not None:
        request = request.with_options(seed=seed)
    limit_s = request.options.time_limit_s
    tried_s = 0.0
    if with_explanation and experiment is not None:
        tried_s = min(max(_LEAST_TRIED_S, _TRIED_PART * limit_s), _MOST_TRIED_PART * limit_s)
    request = request.with_options(
        time_limit_s=search_limit_s(limit_s - tried_s, perf_counter() - begin_s, report is not None)
    )
    result = _solve(request, warm_path)
    memory = "" if experiment is None else _check_room(experiment, result.plan)
    if out is not None:
        result.plan.save(out)
    binds = ""
    if report is not None or with_explanation:
        repeatable = request.options.max_evaluations is not None
        left_s = math.inf if repeatable else limit_s - (perf_counter() - begin_s)
        binds = what_binds(result.problem, result.plan, left_s)
    if report is not None:
        from skippipe.monitor.report import write_plan_report

        write_plan_report(report, result.plan, result.baselines, binds)
    explanation = _explanation(experiment, result, binds, tried_s) if with_explanation else []
    if as_json:
        explained = {"explanation": "\n".join(explanation)} if with_explanation else {}
        click.echo(json.dumps(_summary(result, out) | explained))
        return
    from skippipe.monitor.terminal import say

    say(plan_table(result))
    for text in (memory, *explanation):
        if text:
            say(text)
    for path in (out, report):
        if path is not None:
            click.echo(f"written: {path}")


def _explanation(experiment: "Experiment | None", result: "PlanWithBaselines", binds: str, tried_s: float) -> list[str]:
    """Return what the iteration time is made of, which bound binds, and what would help, tried out."""
    from skippipe_scheduler.analysis.explain import explain

    texts = [explain(result.plan), binds]
    if experiment is not None:
        from skippipe.planning.tried_changes import what_helps

        texts.append(what_helps(experiment, result.plan, result.problem, tried_s))
    return texts


def search_limit_s(limit_s: float, begun_s: float, writes_report: bool) -> float:
    """Return how long of a limit the solves may take, after `begun_s` seconds: the command as a whole is to keep it."""
    before_s = max(0.0, begun_s - _START_S)
    after_s = _REPORT_S if writes_report else 0.0
    return max(_LEAST_SEARCH_PART * limit_s, limit_s - before_s - after_s)


def _read_experiment(path: Path, overrides: tuple[str, ...]) -> "Experiment":
    from skippipe.config.experiment_file import load_experiment

    return load_experiment(path, overrides)


def _request(experiment: "Experiment | None", problem_path: Path | None, overrides: tuple[str, ...]) -> "PlanRequest":
    if experiment is not None:
        from skippipe.planning.experiment_plan import plan_request

        return plan_request(experiment)
    from skippipe_scheduler.problem.problem import load_problem
    from skippipe_scheduler.solver.plan_request import PlanRequest

    if overrides:
        raise ConfigError(f"{overrides[0]!r}: overrides need --config; a problem file is complete as it is")
    return PlanRequest(load_problem(problem_path or Path()))


def _check_room(experiment: "Experiment", plan: "Plan") -> str:
    """Return lines about the node with the least room left, without and with copies that outlive nodes.

    Raises `InfeasibleError` where a node has too little for the plan.
    """
    from skippipe.planning.copied_stages import copies_line
    from skippipe.planning.experiment_cluster import experiment_cluster
    from skippipe.planning.workload.experiment_workload import experiment_workload
    from skippipe.planning.workload.lighter_workloads import memory_advice
    from skippipe_scheduler.plan.plan_memory import check_memory, given_limits, plan_memory
    from skippipe_scheduler.problem.memory import device_text

    cluster, workload = experiment_cluster(experiment), experiment_workload(experiment)
    device_texts = {node.name: device_text(cluster, node, workload) for node in cluster.members()}
    estimates = plan_memory(plan, workload, cluster.devices())
    limits_bytes = given_limits(cluster.members())
    check_memory(
        estimates,
        limits_bytes,
        device_texts=device_texts,
        advice=memory_advice(experiment, plan, list(cluster.devices().values())),
    )
    left_bytes = {
        estimate.node: limits_bytes[estimate.node] - estimate.total_bytes
        for estimate in estimates
        if estimate.node in limits_bytes and cluster.devices()[estimate.node] == "cpu"
    }
    lines = (_fullest(estimates, limits_bytes, device_texts), copies_line(experiment, plan, left_bytes))
    return "\n".join(line for line in lines if line)


def _fullest(
    estimates: "Sequence[MemoryEstimate]", limits_bytes: "Mapping[str, int]", device_texts: "Mapping[str, str]"
) -> str:
    from skippipe_scheduler.problem.memory import size_text

    limited = [estimate for estimate in estimates if estimate.node in limits_bytes]
    if not limited:
        largest = max(estimates, key=lambda estimate: estimate.total_bytes)
        return (
            f"memory: not checked, as the cluster file gives max_in_flight in place of memory_gib; most is needed by "
            f"{largest.node}{device_texts[largest.node]}, {size_text(largest.total_bytes)} ({largest})"
        )
    fullest = max(limited, key=lambda estimate: estimate.total_bytes / limits_bytes[estimate.node])
    needed, limit = size_text(fullest.total_bytes), size_text(limits_bytes[fullest.node])
    return f"memory: fullest is {fullest.node}{device_texts[fullest.node]} with {needed} of {limit} ({fullest})"


def what_binds(problem: "Problem", plan: "Plan", left_s: float) -> str:
    """Return which lower bound binds and what would help, in words, with `left_s` seconds for better bounds.

    A plan with relays has bounds of its own: those of direct messages may lie above it.
    """
    from skippipe_scheduler.bounds import explain_bound, lower_bounds
    from skippipe_scheduler.solver.relays import with_best_ways
    from skippipe_scheduler.solver.split_backward import input_gradients_alone

    problem = with_best_ways(problem) if plan.has_relays else problem
    problem = input_gradients_alone(problem) if problem.costs.weight_s else problem
    return explain_bound(problem, lower_bounds(problem, min(_BOUNDS_S, max(_LEAST_BOUNDS_S, left_s))))


def _solve(request: "PlanRequest", warm_path: Path | None) -> "PlanWithBaselines":
    from skippipe.cli.search_display import SearchDisplay
    from skippipe_scheduler.plan.plan import parse_plan
    from skippipe_scheduler.solver.planner import solve_with_baselines

    warm = None if warm_path is None else parse_plan(warm_path)
    with SearchDisplay() as display:
        watched = replace(request, warm=warm).with_options(progress=display.update, stop=display.stop)
        return solve_with_baselines(watched, announce=display.begin)


def plan_table(result: "PlanWithBaselines") -> str:
    """Return the table of the plan and its baselines: predicted times, bound, gap, relative time."""
    plan = result.plan
    lines = [
        f"{len(plan.nodes)} nodes, {len(plan.stages)} stages of "
        f"{_per_stage([len(stage.nodes) for stage in plan.stages])} replicas and "
        f"{_per_stage(plan.layers_per_stage)} layers, "
        f"{len(plan.microbatches)} microbatches over {plan.rules.describe_lengths()} stages each, hash {plan.hash}",
        f"{'':23}{'iteration':>10}{'pipeline':>10}{'reduction':>10}{'bound':>9}{'gap':>7}{'relative':>10}",
    ]
    for name, shown in {"this plan": plan, **result.baselines}.items():
        predicted = shown.predicted
        gap = 1 - predicted.lower_bound_s / predicted.iteration_s
        lines.append(
            f"{name:23}{predicted.iteration_s:>8.3f} s{predicted.pipeline_s:>8.3f} s"
            f"{predicted.reduce_exposed_s:>8.3f} s{predicted.lower_bound_s:>7.3f} s{gap:>7.1%}"
            f"{predicted.iteration_s / result.full_pipeline.predicted.iteration_s:>10.2f}"
        )
    relayed = sum(bool(microbatch.relays) for microbatch in plan.microbatches)
    if relayed:
        lines.append(
            f"of {relayed} microbatches, nodes of stages that they leave out relay the messages and compute nothing"
        )
    other = result.full_pipeline.layers_per_stage
    if other != plan.layers_per_stage:
        lines.append(f"the full pipeline has stages of {_per_stage(other)} layers")
    if _was_hardly_searched(result):
        lines.append(
            f"the full pipeline was searched for {result.full_pipeline.solver.wall_s:.1f} s, this plan for "
            f"{plan.solver.wall_s:.1f} s: with more time it may be faster, and this plan less so beside it"
        )
    if result.why_slower:
        lines += [
            "this plan is slower than the full pipeline, which a skip ratio of 0 gives:",
            f"  {result.why_slower}",
        ]
    lines.append("relative time: iteration / full pipeline's; reduction: what is not hidden")
    return "\n".join(lines)


def _was_hardly_searched(result: "PlanWithBaselines") -> bool:
    """Return whether the full pipeline had far less time than this plan, and is not known to be the best."""
    plan, full = result.plan, result.full_pipeline
    is_best = full.predicted.iteration_s <= full.predicted.lower_bound_s * (1 + _SAME)
    return not is_best and full.solver.wall_s < _LEAST_COMPARED * plan.solver.wall_s


def _per_stage(counts: Sequence[int]) -> str:
    return "/".join(map(str, counts))


def _summary(result: "PlanWithBaselines", out: Path | None) -> dict[str, object]:
    plans = {"plan": result.plan, **{name.replace(" ", "_"): plan for name, plan in result.baselines.items()}}
    return {
        "predicted": {name: plan.predicted.model_dump() for name, plan in plans.items()},
        "layers_per_stage": {name: plan.layers_per_stage for name, plan in plans.items()},
        "hash": result.plan.hash,
        "plan_file": str(out) if out is not None else None,
    }
