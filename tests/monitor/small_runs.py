"""Makes a small plan, and run directories as `skippipe train` and `skippipe evaluate` leave them."""

import json
import math
from pathlib import Path

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment
from skippipe_scheduler.plan.plan import Plan, PlanStage, Predicted, Route, Solver, Task
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.rules import Rules

STAGES = (("ams-0", "nyc-0"), ("nyc-1",), ("ams-1",), ("ams-2", "nyc-2"))
ROUTES = (
    ("ams-0", "nyc-1", "ams-1"),
    ("ams-0", "nyc-1", "nyc-2"),
    ("nyc-0", "ams-1", "ams-2"),
    ("nyc-0", "ams-1", "nyc-1"),  # swapped: stage 2 before stage 1
)
STEPS = 24


def make_plan(stages: tuple[tuple[str, ...], ...], routes: tuple[tuple[str, ...], ...]) -> Plan:
    """Return a valid plan that runs all forwards hop by hop, then all losses, then all backwards."""
    nodes = tuple(sorted(node for stage in stages for node in stage))
    order: dict[str, list[Task]] = {node: [] for node in nodes}
    length = max(len(route) for route in routes)
    numbered = tuple(enumerate(routes))
    for hop in range(length):
        for microbatch, route in numbered:
            order[route[hop]].append(Task("F", microbatch))
    for microbatch, route in numbered:
        order[route[0]].append(Task("L", microbatch))
    for hop in reversed(range(length)):
        for microbatch, route in numbered:
            order[route[hop]].append(Task("B", microbatch))
    plan = Plan(
        nodes=nodes,
        regions=tuple(node.split("-")[0] for node in nodes),
        stages=tuple(PlanStage(layers=(2 * index, 2 * index + 2), nodes=stage) for index, stage in enumerate(stages)),
        microbatches=tuple(Route(id=microbatch, route=route) for microbatch, route in numbered),
        order={node: tuple(tasks) for node, tasks in order.items()},
        costs=Costs(
            forward_s=dict.fromkeys(nodes, 0.1),
            backward_s=dict.fromkeys(nodes, 0.2),
            loss_s=dict.fromkeys(nodes, 0.03),
            transfer_s={
                source: {
                    target: 0.01 if source.split("-")[0] == target.split("-")[0] else 0.08
                    for target in nodes
                    if target != source
                }
                for source in nodes
            },
            memory=dict.fromkeys(nodes, len(routes)),
            reduce_s=tuple(0.15 if len(stage) > 1 else 0.0 for stage in stages),
        ),
        rules=Rules(num_stages=len(stages), route_length=length),
        predicted=Predicted(iteration_s=0.0, pipeline_s=0.0, reduce_exposed_s=0.0, lower_bound_s=0.0),
        solver=Solver(name="by hand", version="1", seed=0, time_limit_s=0.0, wall_s=0.0),
    )
    timeline = simulate(plan)
    predicted = Predicted(
        iteration_s=timeline.iteration_s,
        pipeline_s=timeline.pipeline_s,
        reduce_exposed_s=timeline.iteration_s - timeline.pipeline_s,
        lower_bound_s=0.8 * timeline.pipeline_s,
    )
    return plan.model_copy(update={"predicted": predicted})


def write_run(folder: Path, plan: Plan, name: str) -> Path:
    """Write a run directory with trace and evaluation; a crash cut its last line of metrics short."""
    folder.mkdir()
    plan.save(folder / "plan.json")
    content = {"name": name, "cluster": "cluster.yaml", "data": {"source": "python_stdlib"}, "run_dir": str(folder)}
    save_experiment(Experiment.model_validate(content), folder / "config.yaml")
    predicted_s = plan.predicted.iteration_s
    lines = [json.dumps(metrics(step, predicted_s)) for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 25, "train/lo')
    results = [
        {
            "policy": "random",
            "keep": keep,
            "kept_stages": round(4 * keep),
            "kept_layers": 4 * keep,
            "share_computed": keep,
            "perplexity": 3.2 / keep,
            "perplexity_std": 0.1 * (1 - keep),
            "samples": 4,
        }
        for keep in (1.0, 0.75, 0.5)
    ]
    evaluation = {
        "model": name,
        "checkpoint": "step-00000024",
        "tokens": 4096,
        "policies": ["random"],
        "results": results,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_trace(folder / "trace", plan)
    return folder


def metrics(step: int, predicted_s: float) -> dict[str, float]:
    """Return one line of metrics.jsonl: iterations take 2 % longer than predicted, the first far longer."""
    duration_s = predicted_s * (5.0 if step <= 2 else 1.02 + 0.01 * math.sin(step))
    loss = 2.0 + 2.0 * math.exp(-step / 8)
    validation = {"val/loss": loss + 0.1, "val/perplexity": math.exp(loss + 0.1)} if step % 8 == 0 else {}
    return {
        "step": step,
        "train/loss": loss,
        "train/grad_norm": 1.0,
        "train/lr": 1e-3,
        "perf/iteration_s": duration_s,
        "perf/tokens_per_s": 4096 / duration_s,
        "perf/elapsed_s": predicted_s * (1.02 * step + 8),
        "pipeline/predicted_s": predicted_s,
        "pipeline/bubble_fraction": 0.3,
        "tokens": 4096 * step,
    } | validation


def write_trace(folder: Path, plan: Plan) -> None:
    """Write what the nodes measured in steps 10 and 20: the simulated tasks, each a little later."""
    folder.mkdir()
    tasks = simulate(plan).tasks
    for node in plan.nodes:
        lines = [
            json.dumps(
                {
                    "step": step,
                    "node": node,
                    "operation": task.operation,
                    "microbatch": task.microbatch,
                    "start_s": task.start_s * stretch,
                    "end_s": task.end_s * stretch,
                }
            )
            for step, stretch in ((10, 1.02), (20, 1.03))
            for task in tasks
            if task.node == node
        ]
        (folder / f"{node}.jsonl").write_text("\n".join(lines) + "\n")
