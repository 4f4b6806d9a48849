"""The trainings that are compared: a small byte-level model on Python's own sources, one recipe each."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from sizes import NUM_STAGES, QUICK, SIZES, Size

from skippipe.config.experiment import Experiment

LR = 2e-3
"""Peak learning rate. Other multiples of it are rows of their own."""
MULTIPLES = {0.5: "half", 2: "twice", 4: "four times", 8: "eight times"}
"""Multiples of the learning rate that rows may have beside 1, and how their names say it."""
RESULT = "result.json"
"""What a training that is done leaves in its folder."""
THIRD = 0.33
"""Skip ratio at which 4 of 6 stages are visited."""
SKIP: dict[str, Any] = {"skip_ratio": THIRD, "max_swaps": 0, "max_forward_jump": 5}
MIXED = SKIP | {"route_lengths": {6: 1, 4: 1, 3: 2}}
"""As many stages on the mean as `SKIP`."""
GROWING = [{"share": 1, "skip_ratio": ratio} for ratio in (0.66, THIRD, 0)]
"""A curriculum of routes that begins with 2 of 6 stages and ends with all."""
HALF_THEN_FULL = [{"share": 2, "skip_ratio": 0.5}, {"share": 3, "skip_ratio": 0}]
"""A curriculum of routes with four fifths of the stages on the mean, and the last three fifths of the steps whole."""
THIRD_THEN_FULL = [{"share": 3, "skip_ratio": 0.66}, {"share": 7, "skip_ratio": 0}]
"""The same compute with a shorter and shallower beginning."""
GROWING_THEN_FULL = [{"share": 1, "skip_ratio": 0.66}, {"share": 1, "skip_ratio": THIRD}, {"share": 3, "skip_ratio": 0}]
"""The same compute, and a beginning in two phases."""
CLUSTER = """
format: skippipe.cluster/1
name: one process
nodes:
  - {{name: node, count: {count}, region: here, compute_tflop_per_s: {tflop_per_s}, memory_gib: {memory_gib}}}
links:
  contention: none
  within_region: {{latency_ms: 0.1, gbit_per_s: 10}}
"""
"""Nodes to plan for; one process runs them all."""


@dataclass(frozen=True)
class Setup:
    """One row: what differs from normal training."""

    pipeline: Mapping[str, Any] = field(default_factory=lambda: {"skip_ratio": 0})
    recipe: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    length: Fraction = Fraction(1)
    """Steps, relative to normal training."""
    num_stages: int = NUM_STAGES
    lr: float = LR


def dropout(probability: float, **others: str) -> dict[str, Any]:
    """Return options of a dropout drawn for a whole microbatch, which has one sample here."""
    return {"probability": probability, "unit": "microbatch", **others}


def rates(name: str, setup: Setup, *multiples: float) -> dict[str, Setup]:
    """Return a row for each multiple of the learning rate."""
    return {
        name + (f", {MULTIPLES[multiple]} the learning rate" if multiple != 1 else ""): replace(setup, lr=multiple * LR)
        for multiple in multiples
    }


NORMAL, SHALLOWER = "normal", "normal, two thirds of the layers"
SETUPS: dict[str, Setup] = {
    **rates(NORMAL, Setup(), 1, 0.5, 2, 4, 8),
    **rates("normal, four fifths of the steps", Setup(length=Fraction(4, 5)), 1, 2, 4),
    "normal, two thirds of the steps": Setup(length=Fraction(2, 3)),
    SHALLOWER: Setup(num_stages=4),
    "skip": Setup(SKIP),
    "skip, swaps": Setup(SKIP | {"max_swaps": 1}),
    "skip, visits": Setup(SKIP, training={"gradient_normalization": "visits"}),
    "skip, redrawn routes": Setup(SKIP, {"redrawn_routes": 8}),
    "skip, full depth every 10th": Setup(SKIP, {"full_depth_interval": 10}),
    "skip, early exit 0.1": Setup(SKIP, {"early_exit_loss": 0.1}),
    "skip half, same compute": Setup(SKIP | {"skip_ratio": 0.5}, length=Fraction(4, 3)),
    "mixed 6 3 2, redrawn routes, same compute": Setup(
        SKIP | {"route_lengths": {6: 1, 3: 1, 2: 3}}, {"redrawn_routes": 8}, length=Fraction(4, 3)
    ),
    "mixed 5 3": Setup(SKIP | {"route_lengths": {5: 1, 3: 1}}),
    "mixed 6 4 3 3": Setup(MIXED),
    "mixed 6 5 3 2": Setup(SKIP | {"route_lengths": {6: 1, 5: 1, 3: 1, 2: 1}}),
    "mixed, redrawn routes": Setup(MIXED, {"redrawn_routes": 8}),
    "mixed, redrawn routes, swaps": Setup(MIXED | {"max_swaps": 1}, {"redrawn_routes": 8}),
    "mixed, redrawn, full depth every 10th": Setup(MIXED, {"redrawn_routes": 8, "full_depth_interval": 10}),
    "curriculum, deep to shallow": Setup(
        SKIP, {"depth_curriculum": [{"share": 1, "skip_ratio": ratio} for ratio in (0, THIRD, 0.66)]}
    ),
    **rates("curriculum, shallow to deep", Setup(SKIP, {"depth_curriculum": GROWING}), 1, 2),
    "curriculum, shallow to deep, rescaled": Setup(SKIP, {"depth_curriculum": GROWING, "rescale_stages": True}),
    **rates("curriculum, half depth, then full", Setup(SKIP, {"depth_curriculum": HALF_THEN_FULL}), 1, 2, 4),
    "curriculum, half depth, then full, rescaled": Setup(
        SKIP, {"depth_curriculum": HALF_THEN_FULL, "rescale_stages": True}
    ),
    **rates("curriculum, a third of the depth, then full", Setup(SKIP, {"depth_curriculum": THIRD_THEN_FULL}), 1, 2, 4),
    **rates("curriculum, shallow to deep, then full", Setup(SKIP, {"depth_curriculum": GROWING_THEN_FULL}), 1, 2, 4, 8),
    "skip, rescaled": Setup(SKIP, {"rescale_stages": True}),
    "mixed 6 3 2, redrawn routes, rescaled, same compute": Setup(
        SKIP | {"route_lengths": {6: 1, 3: 1, 2: 3}},
        {"redrawn_routes": 8, "rescale_stages": True},
        length=Fraction(4, 3),
    ),
    "layer dropout, LayerSkip": Setup(recipe={"layer_dropout": dropout(0.75)}),
    "layer dropout, uniform": Setup(recipe={"layer_dropout": dropout(1 / 3, over_depth="uniform")}),
    **rates(
        "layer dropout, linear, falling, rescaled",
        Setup(recipe={"layer_dropout": dropout(0.8, over_depth="linear", over_steps="falling") | {"rescale": True}}),
        1,
        2,
        4,
    ),
    "layer dropout, linear, falling": Setup(
        recipe={"layer_dropout": dropout(0.8, over_depth="linear", over_steps="falling")}
    ),
    "ffn dropout, uniform": Setup(recipe={"ffn_dropout": dropout(0.5, over_depth="uniform")}),
    "mixed, ffn dropout": Setup(MIXED, {"ffn_dropout": dropout(0.2, over_depth="uniform")}),
    "skip, as much compute as normal": Setup(SKIP, length=Fraction(3, 2)),
    "mixed, redrawn, swaps, as much compute as normal": Setup(
        MIXED | {"max_swaps": 1}, {"redrawn_routes": 8}, length=Fraction(3, 2)
    ),
}
NORMALS = [name for name in SETUPS if name.startswith(NORMAL) and name != SHALLOWER]
"""Trainings of all stages, at several learning rates and lengths."""


def size_of(size_name: str, *, quick: bool) -> Size:
    """Return a size; a quick one is tiny, on the same kind of text."""
    size = SIZES[size_name]
    return replace(QUICK, prose=size.prose) if quick else size


def experiment_of(
    name: str, size_name: str, seed: int, folder: Path, *, quick: bool, prose: Path | None = None
) -> Experiment:
    """Return the experiment of one row, which writes into `folder`; a quick one is tiny and means nothing.

    `prose` is the folder of the text files that a size on prose is trained on.
    """
    setup, size = SETUPS[name], size_of(size_name, quick=quick)
    text = {"source": "text", "paths": [str(prose)]} if size.prose else {"source": "python_stdlib"}
    steps = size.steps if quick else int(size.steps * setup.length)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(CLUSTER.format(count=6, tflop_per_s=0.02, memory_gib=4))
    content = {
        "name": folder.name,
        "run_dir": str(folder),
        "seed": seed,
        "cluster": str(folder / "cluster.yaml"),
        "model": {
            "options": {
                "hidden_size": size.hidden_size,
                "intermediate_size": size.intermediate_size,
                "num_hidden_layers": setup.num_stages * size.layers_per_stage,
                "num_attention_heads": 4,
                "tie_word_embeddings": True,
            }
        },
        "data": text | {"max_bytes": 500_000 if quick else 10_000_000},
        "pipeline": {"num_stages": setup.num_stages, "planner": {"max_evaluations": 2000 if not quick else 20}}
        | dict(setup.pipeline),
        "recipe": setup.recipe,
        "training": {
            "max_steps": steps,
            "num_microbatches": 20,  # every stage is visited equally often at every mean length used here
            "micro_batch_size": size.micro_batch_size,
            "sequence_length": 32 if quick else 128,
            "dtype": size.dtype,
            "device": "cpu",
            "threads": 1,
            "compile": "ffn_dropout" not in setup.recipe,  # not built for both; the same but for rounding
        }
        | dict(setup.training),
        "optimizer": {"lr": setup.lr},
        "lr_scheduler": {"warmup_steps": min(50, steps)},
        "checkpoint": {"interval": 100, "keep_last": 1},
        "evaluation": {"interval": 0},
        "logging": {"interval": 50, "wandb": {"mode": "disabled"}},
    }
    return Experiment.model_validate(content)


def finished(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """Return the result of a training of the same settings that is done already."""
    path = folder / RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["settings"] == settings_of(experiment) else None


def settings_of(experiment: Experiment) -> str:
    """Return a hash of all that an experiment asks for, wherever it lies."""
    content = experiment.model_dump_json(exclude={"name", "run_dir", "cluster"})
    return hashlib.sha256(content.encode()).hexdigest()[:16]
