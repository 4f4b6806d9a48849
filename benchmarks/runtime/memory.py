"""Peak memory of every rank beside the plan's estimate, and the growth of memory over a long run.

    python benchmarks/runtime/memory.py [--only NAME ...] [--folder FOLDER]

Ranks are processes on this machine over gloo on the CPU. Their peak is the growth of resident memory, in which the C
library's allocator would hide what it keeps for later; so it is told to give large blocks back at once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

MIB = 2**20
WORLD_SIZE = 3
LONG_STEPS, SETTLED_STEP = 500, 100
CLUSTER = {
    "format": "skippipe.cluster/1",
    "device": "cpu",
    "name": "here",
    "nodes": [{"name": "node", "count": WORLD_SIZE, "region": "here", "compute_tflop_per_s": 0.02, "memory_gib": 4}],
    "links": {"contention": "none", "within_region": {"latency_ms": 0.05, "gbit_per_s": 20}},
}
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training": {"dtype": "bfloat16"}},
    "fp32, full checkpointing": {"training": {"activation_checkpointing": "full"}},
    "fp32, replicas share the state": {"pipeline": {"num_stages": 2}, "optimizer": {"backend": "zero_redundancy"}},
}


def experiment(folder: Path, name: str, model: dict[str, int], steps: int, **sections: dict[str, Any]) -> Path:
    """Write an experiment and what it needs; return its file."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for number in range(40):
            lines = (f"line {line} of text {number} has {line * number} words\n" for line in range(900))
            (text / f"{number}.txt").write_text("".join(lines))
        (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    content: dict[str, Any] = {
        "name": name,
        "run_dir": str(folder / name),
        "cluster": str(folder / "cluster.yaml"),
        "model": {"options": model},
        "data": {"source": "text", "paths": [str(text)], "cache_dir": str(folder / "cache")},
        "pipeline": {"num_stages": WORLD_SIZE, "skip_ratio": 0.0, "planner": {"time_limit_s": 1.0}},
        "training": {
            "max_steps": steps,
            "num_microbatches": 4,
            "micro_batch_size": 4,
            "sequence_length": 256,
            "device": "cpu",
            "threads": 1,
        },
        "checkpoint": {"interval": max(2, steps // 10), "keep_last": 1},
        "evaluation": {"interval": 0},
        "logging": {"interval": 100, "wandb": {"mode": "disabled"}},
    }
    for section, given in sections.items():
        content[section] = content.get(section, {}) | given
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(config: Path) -> None:
    """Train with one process for each node."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024), "MALLOC_ARENA_MAX": "1"}
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD_SIZE), "-m", "skippipe", "train"]
    subprocess.run(
        [sys.executable, "-m", *command, "--config", str(config)],
        env=os.environ | allocator,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def compare(folder: Path, name: str, number: int) -> None:
    """Train a model of more than 100 MB a rank for a few steps; print estimate and peak of every rank."""
    config = experiment(folder, f"run-{number}", LARGE, 5, **RUNS[name])
    train(config)
    for row in json.loads((folder / f"run-{number}" / "memory.json").read_text())["ranks"]:
        estimate, peak = row["estimated_bytes"], row["peak_bytes"]
        parts = "  ".join(
            f"{row[f'{part}_bytes'] / MIB:>8.1f}"
            for part in ("state", "copy", "activation", "working", "message", "update")
        )
        print(
            f"{name:32}{row['rank']:>5}{estimate / MIB:>10.1f}{peak / MIB:>10.1f}{peak / estimate:>8.3f}  {parts}",
            flush=True,
        )


def growth(folder: Path) -> None:
    """Train a small model for many steps with checkpoints; print how much the peak grew after it had settled."""
    config = experiment(folder, "long", SMALL, LONG_STEPS, training={"micro_batch_size": 1, "sequence_length": 32})
    train(config)
    peaks = {entry[Metric.STEP]: entry[Metric.PEAK_BYTES] for entry in read_metrics(folder / "long" / "metrics.jsonl")}
    grown = (peaks[LONG_STEPS] - peaks[SETTLED_STEP]) / MIB
    print(
        f"growth of the highest peak from step {SETTLED_STEP} to {LONG_STEPS}: {grown:.1f} MiB of "
        f"{peaks[LONG_STEPS] / MIB:.1f} MiB, {LONG_STEPS // 50} checkpoints"
    )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*RUNS, "growth"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--folder", type=Path, help="Where runs are written; a temporary folder where not given.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if set(arguments.only) - {"growth"}:
            print(
                f"{'MiB':32}{'rank':>5}{'estimate':>10}{'measured':>10}{'ratio':>8}  "
                + "  ".join(f"{part:>8}" for part in ("state", "copy", "kept", "work", "message", "update"))
            )
        for number, name in enumerate(RUNS):
            if name in arguments.only:
                compare(folder, name, number)
        if "growth" in arguments.only:
            growth(folder)


if __name__ == "__main__":
    main()
