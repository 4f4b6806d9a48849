"""One run that changes its place: 4 stages on 4 processes, 2 on 2, 1 process, 2 stages with 2 replicas each, back to 4.

With sharded optimizer state and without; the losses stay those of the run that was never interrupted.
"""

from pathlib import Path
from typing import Any

import pytest
from random_plans import random_plan
from training_runs import losses, make_experiment, train_alone, train_on_ranks

from skippipe.checkpoint.reader import checkpoint_path, complete_checkpoints
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics_file import read_metrics
from skippipe_scheduler.plan.plan import Plan

STEPS, LEG = 20, 4
"""Steps compared after each load, and steps after which the next place takes over."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


def full_pipeline(num_nodes: int, num_stages: int) -> Plan:
    """Return a plan in which every microbatch visits all stages in order, so that no split changes what is computed."""
    return random_plan(
        3,
        num_nodes=num_nodes,
        num_stages=num_stages,
        route_length=num_stages,
        num_microbatches=4,
        layers_per_stage=4 // num_stages,
        swaps=0,
    )


def experiment(
    folder: Path, name: str, last_step: int, before: tuple[str, int] | None, **sections: object
) -> Experiment:
    resume = "never" if before is None else str(checkpoint_path(folder / before[0], before[1]))
    model = make_experiment(folder).model.options | {"num_hidden_layers": 4}
    return make_experiment(
        folder,
        name,
        model={"options": model},
        training={"max_steps": last_step},
        checkpoint={"interval": LEG // 2 if before is None else LEG, "keep_last": 20, "resume": resume},
        lr_scheduler={"warmup_steps": 2, "min_lr_ratio": 1.0},  # the rate does not depend on the last step
        evaluation={"interval": 0},
        **sections,
    )


def continued(run_dir: Path, first_step: int) -> list[float]:
    entries = read_metrics(run_dir / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(first_step + 1, first_step + STEPS + 1))
    return [entry["train/loss"] for entry in entries]


def test_a_run_goes_on_in_any_place(tmp_path: Path) -> None:
    four, two, replicas = full_pipeline(4, 4), full_pipeline(2, 2), full_pipeline(4, 2)
    sharded = {"optimizer": {"lr": 3e-3, "backend": "zero_redundancy"}}
    train_alone(experiment(tmp_path, "whole", 4 * LEG + STEPS, None), full_pipeline(2, 2))
    expected = losses(tmp_path / "whole")

    logs = train_on_ranks(experiment(tmp_path, "begin", LEG, None), four, blocked_rank=2)
    # One rank's disk was full at the first checkpoint: nobody has it, training went on, the next one is complete.
    assert [path.name for path in complete_checkpoints(tmp_path / "begin")] == [f"step-{LEG:08d}"]
    assert f"step {LEG // 2}: no checkpoint could be saved (rank 2: [Errno 27] File too large" in logs[0]
    assert "no checkpoint could be saved ([Errno 27] File too large" in logs[2]
    assert not list((tmp_path / "begin" / "checkpoints").glob(".*"))
    assert losses(tmp_path / "begin") == pytest.approx(expected[:LEG], abs=1e-5)

    places: list[tuple[str, Plan | None, dict[str, Any]]] = [
        *(("two", two, {}), ("one", None, {}), ("replicas", replicas, sharded), ("four", four, {}))
    ]
    before = "begin"
    for leg, (name, plan, sections) in enumerate(places, start=1):
        chosen = experiment(tmp_path, name, leg * LEG + STEPS, (before, leg * LEG), **sections)
        if plan is None:
            train_alone(chosen, two)
        else:
            train_on_ranks(chosen, plan)
        assert continued(tmp_path / name, leg * LEG) == pytest.approx(
            expected[leg * LEG : leg * LEG + STEPS], abs=1e-5
        ), name
        before = name
    parts = sorted(path.name for path in checkpoint_path(tmp_path / "replicas", 4 * LEG).glob("optimizer-*"))
    assert len(parts) == 4
    assert all("-rank-" in name for name in parts)
