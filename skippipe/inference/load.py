"""The model of a run directory or of a Hugging Face directory, whole and in this process."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from transformers.utils import logging

from skippipe.config import Experiment, ModelOptions
from skippipe.config_file import load_experiment, load_run
from skippipe.errors import InputError
from skippipe.huggingface.source import find_source, load_model
from skippipe.inference.decoder import Bounds, Decoder
from skippipe.model.device import choose_device
from skippipe.model.skeleton import build_skeleton, find_parts, materialise
from skippipe.model.stage import Stage
from skippipe.planning import experiment_model
from skippipe.training.checkpoint import load_parameters, require_checkpoint
from skippipe_scheduler.validate import load_plan


@dataclass(frozen=True)
class LoadedModel:
    """A model, what it is called, and the experiment that says which text belongs to it."""

    decoder: Decoder
    name: str
    checkpoint: str
    experiment: Experiment
    run_dir: Path | None
    """None where it is a Hugging Face directory."""


def load(path: Path, *, device: str = "auto", num_stages: int | None = None) -> LoadedModel:
    """Load the newest checkpoint of a run, or a Hugging Face directory with safetensors.

    Stages are those of the run's plan; without a plan every layer is one, and `num_stages` asks for another split, as
    even as possible. Raises `InputError` where `path` is neither or is damaged.
    """
    chosen = choose_device(device)
    if not (path / "config.yaml").is_file() and (path.suffix == ".gguf" or (path / "config.json").is_file()):
        return _load_directory(path, chosen, num_stages)
    return _load_run(path, chosen, num_stages)


def even_bounds(num_layers: int, num_stages: int) -> list[Bounds]:
    """Return [first, last) layers of each stage; raise `InputError` where there are fewer layers than stages."""
    if not 1 <= num_stages <= num_layers:
        raise InputError(f"--stages {num_stages}: the model has {num_layers} layers, and a stage needs at least one")
    edges = [index * num_layers // num_stages for index in range(num_stages + 1)]
    return list(pairwise(edges))


def _load_run(run_dir: Path, device: torch.device, num_stages: int | None) -> LoadedModel:
    experiment = load_run(run_dir)
    checkpoint = require_checkpoint(run_dir)
    config = experiment_model(experiment)
    skeleton = build_skeleton(config, getattr(torch, experiment.training.dtype))
    materialise(skeleton, range(len(skeleton.layers)), ends=True, seed=experiment.seed, device=device)
    load_parameters(checkpoint, config, [Stage(skeleton, 0, len(skeleton.layers), ends=True)])
    bounds: Sequence[Bounds]
    nodes: list[tuple[str, ...]] = []
    if num_stages is None:
        plan = load_plan(run_dir / "plan.json")
        bounds, nodes = [stage.layers for stage in plan.stages], [tuple(stage.nodes) for stage in plan.stages]
    else:
        bounds = even_bounds(len(skeleton.layers), num_stages)
    return LoadedModel(Decoder(skeleton, bounds, nodes), experiment.name, checkpoint.name, experiment, run_dir)


def _load_directory(path: Path, device: torch.device, num_stages: int | None) -> LoadedModel:
    source = find_source(path)
    if source.gguf_file:
        raise InputError(f"{source}: a GGUF file has to be imported first: skippipe import {path} RUN")
    logging.disable_progress_bar()
    model = load_model(source).to(device)
    model.config.use_cache = False
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    skeleton = find_parts(model)
    bounds = even_bounds(len(skeleton.layers), num_stages or len(skeleton.layers))
    template = load_experiment(Path(str(files("skippipe.huggingface") / "imported.yaml")))
    folder = str(source.folder.resolve())
    data = template.data.model_copy(update={"tokenizer": folder})
    experiment = template.model_copy(update={"model": ModelOptions(directory=folder), "data": data})
    return LoadedModel(Decoder(skeleton, bounds), source.folder.resolve().name, "weights as they are", experiment, None)
