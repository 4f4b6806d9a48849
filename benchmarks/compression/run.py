"""What compressed traffic does to the loss, in one command; see benchmarks/README.md.

    python benchmarks/compression/run.py [--steps N] [--seed N ...] [--only NAME ...] [--out FOLDER]

Four processes (2 stages of 2 replicas, gloo) train a small byte-level model on Python's own documentation strings and
sources, once for each row and seed.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from table import markdown

from common.one_machine import CLUSTER, free_port
from skippipe.config.experiment import Experiment
from skippipe_scheduler.plan.plan import Plan

HERE = Path(__file__).parent
WORLD_SIZE = 4
REPLICAS = 2
ROWS: dict[str, dict[str, Any]] = {
    "all fp32": {},
    "activations bf16": {"activation_dtype": "bfloat16"},
    "activations int8": {"activation_compression": "int8"},
    "gradients bf16": {"gradient_dtype": "bfloat16"},
    "gradients int8": {"gradient_compression": "int8"},
    "gradients int8, no error feedback": {"gradient_compression": "int8", "error_feedback": False},
    "gradients PowerSGD, rank 4": {"gradient_compression": "powersgd"},
    "gradients PowerSGD, rank 1": {"gradient_compression": "powersgd", "powersgd": {"rank": 1}},
    "both int8": {"activation_compression": "int8", "gradient_compression": "int8"},
}


@click.command()
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--only", multiple=True, help="Rows whose names contain this; may be repeated.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE, help="Folder of the results.")
def main(steps: int, seeds: tuple[int, ...], only: tuple[str, ...], out: Path) -> None:
    """Measure the rows of the table; write it and print it. What is not measured now stays as it was."""
    names = [name for name in ROWS if not only or any(part in name for part in only)]
    if not names:
        raise click.UsageError(f"no row's name contains {' or '.join(map(repr, only))}; rows: {', '.join(ROWS)}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in seeds:
        with TemporaryDirectory() as folder:
            measured = measure(Path(folder), names, seed, steps)
        results = {name: {**results.get(name, {}), **measured.get(name, {})} for name in ROWS}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (out / "results.md").write_text(markdown(results))
    click.echo((out / "results.md").read_text())


def measure(folder: Path, names: list[str], seed: int, steps: int) -> dict[str, dict[str, Any]]:
    """Train every row in one set of processes; return bytes and the loss under this seed."""
    from skippipe.monitor.metrics import Metric
    from skippipe.monitor.metrics_file import read_metrics
    from skippipe.planning.experiment_plan import plan_experiment

    (folder / "cluster.yaml").write_text(CLUSTER)
    experiments = [experiment_of(folder, str(row), ROWS[name], seed, steps) for row, name in enumerate(names)]
    plan = plan_experiment(experiments[0])
    fork = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [fork.Process(target=train_all, args=(experiments, plan, rank, port)) for rank in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise click.ClickException("a rank failed; its message is above")
    results = {}
    for name, experiment in zip(names, experiments, strict=True):
        entries = read_metrics(experiment.run_path / "metrics.jsonl")
        losses = {str(seed): {"steps": steps, "loss": entries[-1][Metric.VALIDATION_LOSS]}}
        results[name] = {**bytes_per_step(experiment, plan), **losses}
    return results


def experiment_of(folder: Path, name: str, comm: Mapping[str, Any], seed: int, steps: int) -> Experiment:
    """Return the experiment of one row."""
    options = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    content = {
        "name": name,
        "run_dir": str(folder / name),
        "seed": seed,
        "cluster": str(folder / "cluster.yaml"),
        "model": {"options": options | {"num_key_value_heads": 4}},
        "data": {"source": "python_stdlib", "max_bytes": 2_000_000},
        "pipeline": {"num_stages": 2, "skip_ratio": 0, "stage_sizes": [2, 2], "planner": {"max_evaluations": 200}},
        "training": {"max_steps": steps, "num_microbatches": 4, "micro_batch_size": 4, "sequence_length": 64}
        | {"device": "cpu", "threads": 1},
        "optimizer": {"lr": 3e-3},
        "lr_scheduler": {"warmup_steps": min(20, steps)},
        "checkpoint": {"interval": 0},
        "evaluation": {"interval": steps, "batches": 16},
        "logging": {"interval": steps, "wandb": {"mode": "disabled"}},
        "comm": comm,
        "recovery": {"enabled": False},
    }
    return Experiment.model_validate(content)


def train_all(experiments: list[Experiment], plan: Plan, rank: int, port: int) -> None:
    """Train all experiments, one after another, as one rank."""
    from skippipe.runtime.ranks.context import DistributedContext
    from skippipe.training.loop import train

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the training's own lines
    context = DistributedContext.from_environment(120.0)
    for experiment in experiments:
        train(experiment, plan, context)
    context.close()


def bytes_per_step(experiment: Experiment, plan: Plan) -> dict[str, int]:
    """Return the bytes that all ranks together send in an iteration, activations and gradients apart.

    Activations as the programs say. A sum over R replicas sends 2 (R - 1) times the gradients' bytes, in a ring too.
    """
    from skippipe.planning.workload.experiment_workload import experiment_workload
    from skippipe.runtime.program.program import Opcode, compile_programs

    workload = experiment_workload(experiment)
    programs = compile_programs(plan, workload.activation_bytes)
    activations = sum(instruction.size_bytes for program in programs for instruction in program.select(Opcode.SEND))
    gradients = workload.layer_gradient_bytes * workload.num_layers + workload.embedding_and_head_gradient_bytes
    return {"activation_bytes": activations, "gradient_bytes": 2 * (REPLICAS - 1) * gradients}


if __name__ == "__main__":
    main()
