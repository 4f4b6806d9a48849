"""Rows about experiments on clusters as people describe them: 8B on 100 nodes, 70B on 64, regions of the world."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from case import OVERTIME_S, Case, Measured, Row, gap, of_plan, peak_memory_gib, timed
from geography import regions_cluster
from instances import Shape, synthetic_problem

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_experiment
from skippipe.planning.experiment_plan import plan_experiment, plan_request
from skippipe_scheduler.analysis.jitter import sample_iterations, summarise
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.solver.planner import solve_with_baselines
from skippipe_scheduler.solver.solve import solve

MOST_OF_FULL = 0.65
"""Bar of the 8B model on 100 nodes: its iteration by the full pipeline's."""
MOST_ELSEWHERE = 0.75
"""The same where the work left out alone gives it."""
ONE_PIPELINE_S = 0.0925
"""Bar of 64 equal nodes: one pipeline in each region takes 0.092 s."""
SEEDS_OF_LIMIT: Mapping[float, int] = {2: 10, 4: 10, 15: 2, 60: 1}
"""From how many seeds the same is planned, by the time limit in seconds."""
LONGEST = Shape(num_nodes=128, num_stages=128, route_length=96, num_microbatches=256)
JITTER_SIGMA, JITTER_SAMPLES = 0.1, 10
REAL_SHARING: Mapping[str, Any] = {"contention": "shared", "card_gbit_per_s": 20}
"""Cards carry what the links within a region do."""


def experiment_of(case: Case, name: str, *overrides: str) -> Experiment:
    """Return one of the experiments in the data folder, with the row's time limit and seed."""
    planner = f"pipeline.planner.time_limit_s={case.time_limit_s}", f"pipeline.planner.seed={case.seed}"
    return load_experiment(case.data / "clusters" / f"{name}.yaml", [*planner, *overrides])


def on_100_nodes(case: Case, *overrides: str, links: Mapping[str, Any] | None = None) -> Measured:
    """Plan 8B on 100 nodes with its baselines, on links that are changed in some way."""
    content = yaml.safe_load((case.data / "clusters" / "c100.yaml").read_text())
    content["links"] |= links or {}
    with _file(content) as cluster:
        experiment = experiment_of(case, "n100", *overrides, f"cluster={cluster}")
        return against_full_pipeline(case, experiment, MOST_OF_FULL)


def across_regions(case: Case, num_nodes: int, num_stages: int) -> Measured:
    """Plan 8B on nodes in real regions with its baselines, and simulate the plan with jitter."""
    made = regions_cluster(case.data / "traces" / "skyplane" / "regions.csv", num_nodes, case.seed)
    with _file(made.model_dump(mode="json", by_alias=True, exclude_none=True)) as cluster:
        sizes = f"pipeline.num_stages={num_stages}", f"training.num_microbatches={2 * num_nodes}"
        experiment = experiment_of(case, "n100", *sizes, f"cluster={cluster}")
        return against_full_pipeline(case, experiment, MOST_ELSEWHERE, jitter=True)


def against_full_pipeline(case: Case, experiment: Experiment, most: float, *, jitter: bool = False) -> Measured:
    """Divide a plan's iteration by that of the full pipeline, found beside it in the same time."""
    request = plan_request(experiment, quiet=True)
    begin_s = time.perf_counter()
    found = solve_with_baselines(request)
    wall_s = time.perf_counter() - begin_s
    validate(found.plan)
    plan, full = found.plan.predicted, found.full_pipeline.predicted
    note = (
        f"{plan.iteration_s:.2f} s beside {full.iteration_s:.2f} s of the full pipeline; reductions that nothing hides "
        f"{plan.reduce_exposed_s:.2f} and {full.reduce_exposed_s:.2f} s; {gap(found.plan)}"
    )
    if jitter:
        median_s = summarise(sample_iterations(found.plan, JITTER_SAMPLES, jitter_sigma=JITTER_SIGMA)).p50_s
        note += f"; with jitter of {JITTER_SIGMA:.0%} {median_s / plan.iteration_s:.2f} times as long"
    ratio = plan.iteration_s / full.iteration_s
    met = ratio <= most and wall_s <= case.time_limit_s + OVERTIME_S
    return Measured(ratio, "of the full pipeline", plan.lower_bound_s, wall_s, peak_memory_gib(), met, note)


def worst_of_seeds(case: Case, seeds: int, overrides: Sequence[str]) -> Measured:
    """Plan 64 equal nodes from several seeds; the worst of the plans."""
    seeds = 1 if case.quick else seeds
    experiments = [experiment_of(replace(case, seed=case.seed + number), "s16", *overrides) for number in range(seeds)]
    found = [of_plan(*timed(partial(plan_experiment, experiment))) for experiment in experiments]
    worst = max(found, key=lambda measured: measured.value)
    return replace(worst, met=worst.value <= ONE_PIPELINE_S, note=f"the worst of {seeds} seeds")


def in_time(case: Case, name: str) -> Measured:
    """Plan an experiment; what counts is that the time limit holds."""
    plan, wall_s = timed(lambda: plan_experiment(experiment_of(case, name)))
    return replace(of_plan(plan, wall_s), met=wall_s <= case.time_limit_s + OVERTIME_S, note=gap(plan))


def many_stages_in_time(case: Case) -> Measured:
    """Plan 128 stages on as many nodes; what counts is that the time limit holds."""
    problem = synthetic_problem(LONGEST, case.seed)
    plan, wall_s = timed(lambda: solve(problem, case.options()))
    return replace(of_plan(plan, wall_s), met=wall_s <= case.time_limit_s + OVERTIME_S, note=gap(plan))


@contextmanager
def _file(content: Mapping[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(yaml.safe_dump(dict(content)))
        yield path


def _equal_nodes(title: str, *overrides: str) -> Iterator[Row]:
    for limit_s, seeds in SEEDS_OF_LIMIT.items():
        measure = partial(worst_of_seeds, seeds=seeds, overrides=overrides)
        yield Row(f"64 equal nodes, {title} {limit_s:g} s", limit_s, f"≤ {ONE_PIPELINE_S} s", measure)


def _8b(title: str, *overrides: str, links: Mapping[str, Any] | None = None) -> Row:
    def measure(case: Case) -> Measured:
        return on_100_nodes(case, *overrides, links=links)

    return Row(f"8B on 100 nodes, {title} 60 s", 60, f"≤ {MOST_OF_FULL} of the full pipeline", measure)


def _geography(num_nodes: int, num_stages: int) -> Row:
    measure = partial(across_regions, num_nodes=num_nodes, num_stages=num_stages)
    return Row(f"8B across regions, {num_nodes} nodes 60 s", 60, f"≤ {MOST_ELSEWHERE} of the full pipeline", measure)


CLUSTER_ROWS = (
    _8b("each card carries one message at a time"),
    _8b("cards are shared", links=REAL_SHARING),
    _8b("cards are shared, reduction by region", "pipeline.reduction=hierarchical", links=REAL_SHARING),
    *_equal_nodes("no skips"),
    *_equal_nodes("a quarter skipped", "pipeline.skip_ratio=0.25"),
    Row("70B in 32 stages 30 s", 30, f"≤ {30 + OVERTIME_S:g} s of wall time", partial(in_time, name="l70")),
    Row("128 stages on 128 nodes 60 s", 60, f"≤ {60 + OVERTIME_S:g} s of wall time", many_stages_in_time),
    *(_geography(num_nodes, num_stages) for num_nodes, num_stages in ((24, 8), (72, 16), (144, 16), (300, 16))),
)
