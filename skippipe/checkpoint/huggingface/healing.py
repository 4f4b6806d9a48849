"""Training on that heals a model along a choice of its layers: what will run is what is trained.

A quarter of the layers left out costs a pretrained model several times its perplexity. Routes that run the chosen
layers, and all others now and then, bring that back within some 150,000 tokens, and keep the whole model as good
(benchmarks/healing/results.md). Routes that leave out layers at random heal more slowly, and cost the whole model more.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

from skippipe.checkpoint.layer_choice import LayerChoice
from skippipe.errors import InputError

ROUTES_OF_EIGHT = {"whole": 1, "between": 2, "chosen": 5}
"""Of eight routes one runs all layers, two about half of those left out, five the chosen ones alone. Chosen: most of
the training for what will run, and enough for the whole model to stay as good."""


def healing_pipeline(choice: LayerChoice, place: Path) -> dict[str, Any]:
    """Return the keys of `pipeline` with which an experiment trains along a choice, which stands in the file `place`.

    Neighbouring layers that run, or that are left out, make a stage. Every route begins with layer 0.
    Raises `InputError` where of a layer only a half runs, and where nothing is left out.
    """
    kept = {0, *choice.whole_layers(place)}
    stages = [(runs, len([*layers])) for runs, layers in groupby(range(choice.num_layers), kept.__contains__)]
    if len(stages) == 1:
        raise InputError(f"{place}: no layer is left out, so there is nothing to heal; choose with a --keep below 1")
    protected = [stage for stage, (runs, _) in enumerate(stages) if runs and stage > 0]
    lengths = {"whole": len(stages), "between": (len(stages) + len(protected) + 1) // 2, "chosen": len(protected) + 1}
    shares: dict[int, int] = {}
    for name, length in lengths.items():
        shares[length] = shares.get(length, 0) + ROUTES_OF_EIGHT[name]
    return {
        "num_stages": len(stages),
        "layers_per_stage": [count for _, count in stages],
        "protected_stages": protected,
        "route_lengths": shares,
    }


def healing_overrides(choice: LayerChoice, place: Path) -> tuple[str, ...]:
    """Return `healing_pipeline` as overrides of an experiment, and raise as it does."""
    return tuple(f"pipeline.{key}={value}" for key, value in healing_pipeline(choice, place).items())
