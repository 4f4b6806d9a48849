"""The plan's estimate of memory beside the peak, for three sizes and every kind of activation checkpointing."""

import gc
from pathlib import Path

import torch
from setting import ALONE, SIZES, Bar, Figures, make_experiment, plans_of

from skippipe.config.experiment import Experiment
from skippipe.model.activations.activation_checkpointing import MODES
from skippipe.training.loop import open_trainer
from skippipe.training.signals import StopSignal

BAR = Bar.near_one(0.05)
MICRO_BATCH_SIZES = {"124M": 16, "350M": 8, "1.3B": 2}
"""As much as fits beside the state of each without checkpointing, on a card of 80 GiB."""


def experiments(folder: Path, *, rehearse: bool) -> list[Experiment]:
    """Return one for each size and kind of checkpointing."""
    return [
        make_experiment(
            folder,
            f"memory-{size}-{mode}",
            size,
            rehearse=rehearse,
            training={
                "activation_checkpointing": mode,
                "micro_batch_size": 1 if rehearse else MICRO_BATCH_SIZES[size],
                "num_microbatches": 4,
            },
        )
        for size in SIZES
        for mode in MODES
    ]


def measure(figures: Figures, folder: Path, carried: Path | None) -> None:
    """Train each for two steps; the second has the moments, too."""
    for experiment in experiments(folder, rehearse=figures.rehearse):
        label = experiment.name.removeprefix("memory-").replace("-", ", checkpointing ")
        with StopSignal() as stop, open_trainer(experiment, plans_of(experiment, carried), ALONE) as trainer:
            for _ in range(2):
                trainer.one_step(stop)
            peak, estimate = trainer.state.memory.peak_bytes[0], trainer.state.memory.estimates[0].total_bytes
        figures.add(f"{label}: measured to estimated ({estimate / 2**30:.2f} GiB)", peak / estimate, "", BAR)
        del trainer
        gc.collect()
        if figures.device.type == "cuda":
            torch.cuda.empty_cache()
