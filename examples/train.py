"""Train from Python: the same experiment as `skippipe train`, and its metrics afterwards.

python examples/train.py EXPERIMENT.yaml [key=value ...]
torchrun --nproc-per-node 4 examples/train.py EXPERIMENT.yaml [key=value ...]
"""

import sys
from pathlib import Path

from skippipe import load_experiment, read_metrics, train_experiment


def main(path: Path, overrides: list[str]) -> None:
    """Train, then print how the loss fell and what a step took."""
    experiment = load_experiment(path, overrides)
    summary = train_experiment(experiment)
    if summary.rank:
        return
    records = read_metrics(experiment.run_path / "metrics.jsonl")
    for record in (records[0], records[-1]):
        print(f"step {record['step']}: loss {record['train/loss']:.3f}, {record['perf/iteration_s']:.3f} s")
    print(f"{summary.tokens} tokens, saved {summary.checkpoint}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
