"""The ways in which the pretrained model is trained on: with adapters or all weights, and what is left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skippipe.checkpoint.huggingface.healing import healing_pipeline
from skippipe.checkpoint.layer_choice import read_choice
from skippipe.config.experiment import Experiment
from skippipe.model.device import check_dtype

NUM_STAGES = 6
LAYERS_OF_TINY = 2 * NUM_STAGES
CLUSTER = """
format: skippipe.cluster/1
name: one process
nodes:
  - {{name: node, count: {count}, region: here, compute_tflop_per_s: 0.3, memory_gib: 8}}
links:
  contention: none
  within_region: {{latency_ms: 0.1, gbit_per_s: 10}}
"""
"""Nodes to plan for; one process runs them all."""


@dataclass(frozen=True)
class HealingWay:
    """What differs from one way to another; `lr` is the peak learning rate."""

    lr: float = 1e-3
    lora: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=lambda: {"skip_ratio": 0})
    recipe: Mapping[str, Any] = field(default_factory=dict)
    chosen: bool = False
    """Stages and routes are those of `skippipe import --heal`, along what `best` runs of the model as it comes."""


ADAPTERS: dict[str, Any] = {"r": 16, "lora_alpha": 32}
LAYERS_AND_BLOCKS: dict[str, Any] = {
    "layer_dropout": {"probability": 0.3, "over_depth": "linear", "unit": "microbatch"},
    "ffn_dropout": {"probability": 0.15, "over_depth": "linear", "unit": "microbatch"},
}
"""`best` leaves out attentions and feed-forward blocks of single layers, so single ones are left out in training."""
ROUTES: dict[str, Any] = {"route_lengths": {6: 1, 5: 2, 4: 1}, "max_forward_jump": NUM_STAGES - 1}
WAYS: dict[str, HealingWay] = {
    "adapters, dropout": HealingWay(lora=ADAPTERS, recipe=LAYERS_AND_BLOCKS),
    "adapters, chosen layers": HealingWay(lora=ADAPTERS, recipe={"redrawn_routes": 4}, chosen=True),
    "adapters, routes": HealingWay(lora=ADAPTERS, pipeline=ROUTES, recipe={"redrawn_routes": 8}),
    "all weights, dropout": HealingWay(1e-4, recipe=LAYERS_AND_BLOCKS),
    "all weights, chosen layers": HealingWay(2e-4, recipe={"redrawn_routes": 4}, chosen=True),
}


def healing_experiment(
    way: HealingWay, folder: Path, *, steps: int, quick: bool, choice: Path | None = None
) -> Experiment:
    """Return the experiment that trains in `folder` until so many steps; its rate is constant, so any step may be last.

    A way along the chosen layers needs their file.
    Raises `ConfigError` where the cluster file cannot be read, `InputError` where the choice cannot.
    """
    along = {} if choice is None else healing_pipeline(read_choice(choice), choice)
    pipeline = {"num_stages": NUM_STAGES, **way.pipeline, **along}
    (folder / "cluster.yaml").write_text(CLUSTER.format(count=pipeline["num_stages"]))
    is_slow = check_dtype(torch.device("cpu"), torch.bfloat16, "training.dtype") is not None
    content: dict[str, Any] = {
        "name": "healed",
        "run_dir": str(folder / "run"),
        "cluster": str(folder / "cluster.yaml"),
        "data": {"source": "python_stdlib", "max_bytes": 200_000 if quick else 8_000_000},
        "pipeline": {"planner": {"max_evaluations": 200}, **pipeline},
        "recipe": way.recipe,
        "training": {
            "max_steps": steps,
            "num_microbatches": 6 if quick else 8,
            "micro_batch_size": 1,
            "sequence_length": 32 if quick else 256,
            "dtype": "float32" if quick or is_slow else "bfloat16",
            "device": "cpu",
        },
        "lora": way.lora,
        "optimizer": {"lr": way.lr, "fused": True},
        "lr_scheduler": {"warmup_steps": 2 if quick else 8, "min_lr_ratio": 1.0},
        "checkpoint": {"interval": 0, "keep_last": 1, "asynchronous": False},
        "evaluation": {"interval": 0},
        "logging": {"interval": 1, "wandb": {"mode": "disabled"}},
    }
    return Experiment.model_validate(content)
