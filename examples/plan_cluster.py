"""Plan a cluster from Python: describe it, solve, look at what the plan's time is made of, draw it.

    python examples/plan_cluster.py OUT_DIR [SECONDS]

Needs the scheduler alone, and plotly for the picture.
"""

import sys
from pathlib import Path

import plotly.graph_objects as go

from skippipe_scheduler import (
    Cluster,
    ClusterLinks,
    Link,
    Node,
    Plan,
    Progress,
    RegionLink,
    SolveOptions,
    Timeline,
    Workload,
    build_problem,
    explain,
    sample_iterations,
    simulate,
    skip_rules,
    solve,
    solve_full_pipeline,
    summarise,
)

CLUSTER = Cluster(
    name="two cities",
    nodes=(
        Node(name="paris", count=3, region="Paris", compute_tflop_per_s=60, memory_gib=22),
        Node(name="turin", count=3, region="Turin", compute_tflop_per_s=40, memory_gib=22),
    ),
    links=ClusterLinks(
        within_region=Link(latency_ms=0.2, gbit_per_s=10),
        between_regions=(RegionLink(regions=("Paris", "Turin"), latency_ms=12, gbit_per_s=0.5),),
    ),
)

# A 24-layer model of 1,024 channels: one microbatch is 4 samples of 1,024 tokens in bfloat16.
TOKENS, CHANNELS, LAYER_PARAMETERS, VOCABULARY = 4 * 1024, 1024, 12 * 1024**2, 32_000
WORKLOAD = Workload(
    num_layers=24,
    layer_forward_flop=2 * TOKENS * LAYER_PARAMETERS,
    loss_flop=6 * TOKENS * CHANNELS * VOCABULARY,
    activation_bytes=2 * TOKENS * CHANNELS,
    layer_gradient_bytes=2 * LAYER_PARAMETERS,
    embedding_and_head_gradient_bytes=2 * CHANNELS * VOCABULARY,
    layer_state_bytes=16 * LAYER_PARAMETERS,
    embedding_and_head_state_bytes=16 * CHANNELS * VOCABULARY,
    layer_resident_bytes=34 * TOKENS * CHANNELS,
    embedding_and_head_resident_bytes=2 * TOKENS * CHANNELS,
)


def main(out: Path, time_limit_s: float) -> None:
    """Plan with a third of the stages left out, and the full pipeline beside it."""
    problem = build_problem(CLUSTER, WORKLOAD, skip_rules(3, 0.33, max_swaps=0), num_microbatches=12)
    plan = solve(problem, SolveOptions(time_limit_s=time_limit_s, progress=tell))
    full = solve_full_pipeline(problem, SolveOptions(time_limit_s=time_limit_s))
    ratio = plan.predicted.iteration_s / full.predicted.iteration_s
    print(f"{plan.predicted.iteration_s:.3f} s an iteration, {ratio:.2f} of the full pipeline's")
    print(explain(plan))

    under_jitter = summarise(sample_iterations(plan, 100, jitter_sigma=0.2))
    print(f"with 20% jitter on every task and transfer: {under_jitter.mean_s:.3f} s on the mean")

    out.mkdir(parents=True, exist_ok=True)
    plan.save(out / "plan.json")
    gantt(plan, simulate(plan)).write_html(out / "plan.html")


def tell(progress: Progress) -> None:
    """Print an improvement as the search finds it."""
    print(f"{progress.elapsed_s:6.2f} s: {progress.iteration_s:.3f} s, at least {progress.lower_bound_s:.3f} s")


def gantt(plan: Plan, timeline: Timeline) -> go.Figure:
    """Return what every node does when, one bar for each task."""
    figure = go.Figure()
    for operation in ("F", "L", "B"):
        tasks = [task for task in timeline.tasks if task.operation == operation]
        figure.add_bar(
            name={"F": "forward", "L": "loss", "B": "backward"}[operation],
            orientation="h",
            base=[task.start_s for task in tasks],
            x=[task.end_s - task.start_s for task in tasks],
            y=[task.node for task in tasks],
            text=[task.microbatch for task in tasks],
        )
    figure.update_layout(barmode="overlay", xaxis_title="seconds", yaxis={"categoryarray": list(plan.nodes)})
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 5.0)
