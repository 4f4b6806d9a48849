"""Dynamic against static executor under jitter, with emulated tasks and links, in real processes on one machine.

    python benchmarks/runtime/jitter.py --sigma 0 --sigma 0.6

Plans are solved for random clusters of 6 nodes in 3 regions. Both executors run in the same processes, in turn, and
meet the same jitter. Printed is static over dynamic time of an iteration: above 1 the dynamic executor is faster.
"""

import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "scheduler"))

from instances import Shape, synthetic_problem

from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan, parse_plan
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.solver.solve import solve

NUM_NODES = 6
EXECUTORS = ("static", "dynamic")


def make_plan(seed: int, time_scale: float, time_limit_s: float) -> Plan:
    """Return a plan of 24 microbatches, in which every third or fourth stage is left out, with all times scaled."""
    num_stages = 3 + seed % 2
    shape = Shape(
        num_nodes=NUM_NODES,
        num_stages=num_stages,
        route_length=num_stages - 1,
        num_microbatches=24,
        num_regions=3,
        speeds=((1.0, 1.5), (1.0,), (1.0,))[seed % 3],
        least_memory=3,
        most_memory=6,
    )
    problem = synthetic_problem(shape, seed)
    scaled = problem.model_copy(update={"costs": scaled_costs(problem.costs, time_scale)})
    return solve(scaled, SolveOptions(time_limit_s=time_limit_s, seed=seed))


def scaled_costs(costs: Costs, factor: float) -> Costs:
    """Return costs with every time multiplied by `factor`."""
    times = {
        name: {node: time_s * factor for node, time_s in getattr(costs, name).items()}
        for name in ("forward_s", "backward_s", "loss_s")
    }
    transfer_s = {a: {b: time_s * factor for b, time_s in row.items()} for a, row in costs.transfer_s.items()}
    overhead_s = costs.task_overhead_s * factor
    return costs.model_copy(update={**times, "transfer_s": transfer_s, "task_overhead_s": overhead_s})


def run_rank(rank: int, port: int, folder: str, sigmas: tuple[float, ...], iterations: int) -> None:
    """Run all plans as one rank; rank 0 writes the iterations' durations."""
    variables = {"RANK": rank, "WORLD_SIZE": NUM_NODES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    from skippipe.runtime.ranks.context import DistributedContext

    torch.set_num_threads(1)
    context = DistributedContext.from_environment(timeout_s=60)
    for path in sorted(Path(folder).glob("*.plan.json")):
        measured = {str(sigma): measure(parse_plan(path), sigma, iterations, context) for sigma in sigmas}
        if rank == 0:
            path.with_suffix("").with_suffix(".times.json").write_text(json.dumps(measured))
    context.close()


def measure(plan: Plan, sigma: float, iterations: int, context: object) -> dict[str, list[float]]:
    """Return the durations of the iterations of each executor; the first, which warms up, is left out."""
    import torch

    from skippipe.config.experiment import Experiment
    from skippipe.model.architecture import build_config
    from skippipe.runtime.runner_factory import make_runner

    config = build_config(
        "llama",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_hidden_layers": plan.num_layers,
        },
    )
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    runners = {}
    for executor in EXECUTORS:
        experiment = Experiment.model_validate(
            {
                "cluster": "none.yaml",
                "data": {"source": "python_stdlib"},
                "training": {"micro_batch_size": 1, "sequence_length": 8, "device": "cpu", "threads": 1},
                "comm": {"executor": executor},
                "emulation": {"links": True, "compute": True, "jitter_sigma": sigma},
            }
        )
        runners[executor] = make_runner(experiment, plan, config, context)  # type: ignore[arg-type]
    durations_s: dict[str, list[float]] = {executor: [] for executor in EXECUTORS}
    for iteration in range(iterations + 1):
        for executor, runner in runners.items():
            result = runner.train_iteration(lambda _: (tokens, tokens), lambda r=runner: r.sum_over_ranks([1.0]))  # type: ignore[misc]
            if iteration:
                durations_s[executor].append(result.duration_s)
    for runner in runners.values():
        runner.close()
    return durations_s


def report(folder: Path, sigmas: tuple[float, ...]) -> None:
    """Print a row for each plan and sigma, and the median over all plans."""
    click.echo("| sigma | plan | planned s | static s | dynamic s | static / dynamic |\n|---|---|---|---|---|---|")
    for sigma in sigmas:
        ratios = []
        for path in sorted(folder.glob("*.times.json")):
            times = json.loads(path.read_text())[str(sigma)]
            planned_s = parse_plan(path.with_suffix("").with_suffix(".plan.json")).predicted.iteration_s
            ratio = statistics.median(a / b for a, b in zip(times["static"], times["dynamic"], strict=True))
            ratios.append(ratio)
            medians = " | ".join(f"{statistics.median(times[executor]):.3f}" for executor in EXECUTORS)
            click.echo(f"| {sigma:g} | {path.name.split('.')[0]} | {planned_s:.3f} | {medians} | {ratio:.3f} |")
        click.echo(
            f"| {sigma:g} | all | | | | {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f}) |"
        )


@click.command()
@click.option("--sigma", "sigmas", type=float, multiple=True, default=(0.0, 0.6), show_default=True)
@click.option("--plans", "num_plans", type=int, default=4, show_default=True)
@click.option("--iterations", type=int, default=10, show_default=True)
@click.option("--time-scale", type=float, default=0.06, show_default=True, help="1 makes a forward 0.44 s.")
@click.option("--time-limit", type=float, default=5.0, show_default=True, help="Seconds to solve each plan.")
def main(sigmas: tuple[float, ...], num_plans: int, iterations: int, time_scale: float, time_limit: float) -> None:
    """Compare the two executors; see the top of this file."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        for seed in range(num_plans):
            make_plan(seed, time_scale, time_limit).save(Path(folder) / f"plan-{seed}.plan.json")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        start = multiprocessing.get_context("spawn").Process
        ranks = [start(target=run_rank, args=(rank, port, folder, sigmas, iterations)) for rank in range(NUM_NODES)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise click.ClickException("a rank failed; its message is above")
        report(Path(folder), sigmas)


if __name__ == "__main__":
    main()
