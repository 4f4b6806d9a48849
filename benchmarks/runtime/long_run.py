"""A long training run as users start it, its processes watched from outside."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from setting import Setting, best_plan, skip_shapes

from skippipe.config.experiment_file import save_experiment
from skippipe.monitor.metrics_file import read_metrics

SAMPLE_S = 0.5
PORT = 29590
SILENCE_S = 60.0
"""A run without a new step for so long hangs."""
ALLOWED_GROWTH = {"memory": 0.02, "descriptors": 0.0, "threads": 0.0}


@dataclass(frozen=True)
class Growth:
    """Medians in the first and last quarter of a run, summed over its processes, with their unit."""

    steps: int
    wall_s: float
    medians: dict[str, tuple[float, float, str]]
    details: dict[str, Any]

    @property
    def flat(self) -> bool:
        """Whether nothing grew by more than what is allowed."""
        return all(last <= first * (1 + ALLOWED_GROWTH[name]) for name, (first, last, _) in self.medians.items())


def train_long(folder: Path, *, steps: int, world_size: int, interval: int) -> Growth:
    """Train a small model with a third of the stages skipped and checkpoints every `interval` steps."""
    setting = Setting(
        world_size=world_size,
        num_layers=world_size,
        hidden_size=64,
        vocabulary=512,
        num_microbatches=6,
        micro_batch_size=1,
        sequence_length=32,
    )
    alike = [{"FORWARD": 0.001, "LOSS": 0.001, "BACKWARD": 0.002}] * world_size
    best_plan(setting, folder, alike, skip_shapes(setting)[-1:]).save(folder / "plan.json")
    experiment = setting.experiment(folder, checkpoint={"interval": interval}, training={"max_steps": steps})
    save_experiment(experiment.model_copy(update={"run_dir": str(folder / "run")}), folder / "experiment.yaml")
    begin_s = time.monotonic()
    processes = [_start(folder, rank, world_size) for rank in range(world_size)]
    try:
        samples = _watch(processes, folder / "run" / "metrics.jsonl")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    wall_s = time.monotonic() - begin_s
    entries = read_metrics(folder / "run" / "metrics.jsonl")
    return Growth(len(entries), wall_s, _quarters(samples), {"samples": samples})


def _start(folder: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    environment: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    command = [sys.executable, "-m", "skippipe", "train", "--config", str(folder / "experiment.yaml")]
    with (folder / f"rank-{rank}.log").open("w") as log:
        return subprocess.Popen(
            [*command, "--plan", str(folder / "plan.json")],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdout=log,
            stderr=log,
        )


def _watch(processes: Sequence[subprocess.Popen[bytes]], metrics: Path) -> list[dict[str, float]]:
    """Sample all processes until they end; raise `RuntimeError` where one fails or no step is made any more."""
    watched = [psutil.Process(process.pid) for process in processes]
    samples: list[dict[str, float]] = []
    size, changed_s = 0, time.monotonic()
    while any(process.poll() is None for process in processes):
        time.sleep(SAMPLE_S)
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed:
            raise RuntimeError(f"rank {failed[0]} ended with exit code {processes[failed[0]].returncode}")
        grown = metrics.stat().st_size if metrics.exists() else 0
        if grown != size:
            size, changed_s = grown, time.monotonic()
            try:
                samples.append(_sample(watched))
            except psutil.Error:
                continue  # a process has just ended
        elif time.monotonic() - changed_s > SILENCE_S:
            raise RuntimeError(f"no step for {SILENCE_S:g} s")
    return samples


def _sample(processes: Sequence[psutil.Process]) -> dict[str, float]:
    return {
        "memory": sum(process.memory_info().rss for process in processes) / 2**20,
        "descriptors": sum(process.num_fds() for process in processes),
        "threads": sum(process.num_threads() for process in processes),
    }


def _quarters(samples: Sequence[dict[str, float]]) -> dict[str, tuple[float, float, str]]:
    """Return the medians of the first and the last quarter; the very first samples see the start and are left out."""
    settled = samples[len(samples) // 10 :]
    quarter = max(1, len(settled) // 4)
    units = {"memory": "MiB", "descriptors": "", "threads": ""}
    return {
        name: (
            statistics.median(sample[name] for sample in settled[:quarter]),
            statistics.median(sample[name] for sample in settled[-quarter:]),
            unit,
        )
        for name, unit in units.items()
    }
