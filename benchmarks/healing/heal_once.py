"""One training in a process of its own, whose memory is measured: from the newest checkpoint to a step.

    python benchmarks/healing/heal_once.py FOLDER STEPS

Prints what it took as JSON.
"""

import json
import resource
from pathlib import Path

import click

from skippipe.config.experiment_file import load_run
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics
from skippipe.planning.sharing import choose_plans
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import train

KIB_IN_GIB = 2**20
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("steps", type=int)
def main(folder: Path, steps: int) -> None:
    """Train the run in FOLDER until STEPS are done."""
    run = load_run(folder / "run")
    run = run.model_copy(update={"training": run.training.model_copy(update={"max_steps": steps})})
    if train(run, choose_plans(run, None), ALONE).stopped:
        raise SystemExit(f"{folder}: stopped in the training; the same command continues there")
    last = read_metrics(run.run_path / "metrics.jsonl")[-1]
    result = {
        "steps": last[Metric.STEP],
        "trained": last[Metric.TOKENS],
        "minutes": last[Metric.ELAPSED_S] / 60,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_IN_GIB,
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
