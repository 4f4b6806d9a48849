"""A small experiment on the text of a few files, which several benchmarks train over processes of one machine."""

from pathlib import Path
from typing import Any

from common.one_machine import CLUSTER
from skippipe.config.experiment import Experiment

NUM_NODES = 4
"""Nodes of `CLUSTER`."""


def small_experiment(folder: Path, name: str, num_nodes: int = NUM_NODES, **sections: Any) -> Experiment:
    """Return an experiment in `folder`, where its text and cluster are written; `sections` are laid over it."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        (folder / "cluster.yaml").write_text(CLUSTER.replace(f"count: {NUM_NODES}", f"count: {num_nodes}"))
        for number in range(12):
            words = [f"line {line} of text {number} has {line * number} words\n" for line in range(60)]
            (text / f"{number}.txt").write_text("".join(words))
    content: dict[str, Any] = {
        "name": name,
        "run_dir": str(folder / name),
        "seed": 3,
        "cluster": str(folder / "cluster.yaml"),
        "model": {
            "options": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
            | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}
        },
        "data": {"source": "text", "paths": [str(text)], "cache_dir": str(folder / "cache")},
        "pipeline": {"num_stages": 3},
        "training": {
            "num_microbatches": 4,
            "micro_batch_size": 2,
            "sequence_length": 16,
            "device": "cpu",
            "threads": 1,
        },
        "checkpoint": {"interval": 5},
        "logging": {"wandb": {"mode": "disabled"}},
    }
    for section, given in sections.items():
        content[section] = content.get(section, {}) | given
    return Experiment.model_validate(content)
