"""Two, four and seven ranks on one card, over gloo with tensors of the card, beside one process; and emulated links."""

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from setting import Bar, Figures, make_experiment, plans_of

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

NUM_RANKS = (2, 4, 7)
STEPS = 4
LOSS_BAR, NORM_BAR = Bar(at_most=1e-4), Bar(at_most=1e-3)
"""Relative. Sums over ranks are made in another order than in one process."""
PREDICTED_BAR = Bar.near_one(0.1)
EMULATED_TFLOP_PER_S, REHEARSED_TFLOP_PER_S = 3.0, 0.001
"""Of each node. Chosen: seven that share a card of 67 TFLOP/s in fp32, or two cores, keep up with emulated tasks."""


def experiments(folder: Path, *, rehearse: bool) -> list[Experiment]:
    """Return one for each number of ranks, in fp32 so that results can be compared; a third of it is skipped."""
    return [_experiment(folder, count, rehearse=rehearse) for count in NUM_RANKS]


def measure(figures: Figures, folder: Path, carried: Path | None) -> None:
    """Train a few steps on several ranks, with the plan's links and tasks emulated, and in one process."""
    for experiment, count in zip(experiments(folder, rehearse=figures.rehearse), NUM_RANKS, strict=True):
        plan = plans_of(experiment, carried).main
        path = folder / f"{experiment.name}.json"
        plan.save(path)
        together = train(renamed(experiment, "emulated", emulation={"links": True, "compute": True}), path, count)
        alone = train(renamed(experiment, "alone"), path, 1)
        for key, what, bar in (
            (Metric.TRAIN_LOSS, "losses", LOSS_BAR),
            (Metric.GRADIENT_NORM, "gradient norms", NORM_BAR),
        ):
            pairs = [(a[key], b[key]) for a, b in zip(together, alone, strict=True)]
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            label = f"{count} ranks: {what} beside one process, largest difference"
            figures.add(label, worst, "relative", bar)
        predicted_s = plan.predicted.iteration_s
        ratio = statistics.median(entry[Metric.ITERATION_S] for entry in together[1:]) / predicted_s
        figures.add(f"{count} ranks: emulated iteration to predicted ({predicted_s:.3f} s)", ratio, "", PREDICTED_BAR)


def train(experiment: Experiment, plan: Path, count: int) -> list[dict[str, Any]]:
    """Train along a plan on `count` ranks; return the metrics of every step."""
    config = plan.with_name(f"{experiment.name}.yaml")
    save_experiment(experiment, config)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"] if count > 1 else []
    command = [sys.executable, "-m", *launcher, "skippipe", "train", "--config", str(config), "--plan", str(plan)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{experiment.name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return read_metrics(experiment.run_path / "metrics.jsonl")


def _experiment(folder: Path, count: int, *, rehearse: bool) -> Experiment:
    num_stages = min(count, 6)
    return make_experiment(
        folder,
        f"ranks-{count}",
        "124M",
        rehearse=rehearse,
        num_nodes=count,
        tflop_per_s=REHEARSED_TFLOP_PER_S if rehearse else EMULATED_TFLOP_PER_S,
        pipeline={"num_stages": num_stages, "skip_ratio": 0.34 if num_stages > 2 else 0},
        training={
            "max_steps": STEPS,
            "num_microbatches": 8,
            "micro_batch_size": 1 if rehearse else 2,
            "dtype": "float32",
            "threads": 1,
        },
        comm={"backend": "gloo"},
    )


def renamed(experiment: Experiment, what: str, **sections: dict[str, object]) -> Experiment:
    """Return the same experiment as another run, with keys of `sections` replaced."""
    name = f"{experiment.name}-{what}"
    content = experiment.model_dump() | {"name": name, "run_dir": str(experiment.run_path.with_name(name))}
    for section, given in sections.items():
        content[section] |= given
    return Experiment.model_validate(content)
