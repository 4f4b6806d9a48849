"""The model of a run directory or of a Hugging Face directory, whole and in this process."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import torch
from transformers.utils import logging

from skippipe.checkpoint.huggingface.source import find_source, load_pretrained
from skippipe.checkpoint.soundness import require_sound_checkpoint
from skippipe.config.experiment import Experiment, ModelOptions
from skippipe.config.experiment_file import load_experiment
from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.inference_run import InferenceRun, even_bounds, read_inference_run, stages_without
from skippipe.inference.task_progress import TaskProgress
from skippipe.model.architecture import turn_off_cache_and_router_logits
from skippipe.model.device import choose_device
from skippipe.model.skeleton import find_parts


@dataclass(frozen=True)
class LoadedModel:
    """A model, what it is called, and the experiment that says which text belongs to it.

    Examples:
        >>> model.name, model.checkpoint, model.experiment.data.tokenizer
        ('tiny', 'step-00000002', 'bytes')
        >>> model.decoder.stage_nodes[1]
        ('worker-2',)
    """

    decoder: Decoder
    """The layers, embedding and head."""
    name: str
    """Name of the run, or of the Hugging Face directory."""
    checkpoint: str
    """Name of the run's checkpoint; "weights as they are" for a Hugging Face directory."""
    experiment: Experiment
    """The run's experiment: whose tokenizer, text and lengths an evaluation takes."""
    run_dir: Path | None
    """Directory of the run; None where it is a Hugging Face directory."""
    progress: TaskProgress = field(default_factory=TaskProgress)
    """What is done of the task for which it was loaded; another process of several may go on with that."""


def load_model(
    path: str | Path, *, device: str = "auto", num_stages: int | None = None, absent: Collection[str] = ()
) -> LoadedModel:
    """Load the newest checkpoint of a run, or a Hugging Face directory with safetensors.

    Args:
        path: Directory of the run, or the Hugging Face directory.
        device: `"auto"` (a GPU where there is one), `"cpu"` or `"cuda"`.
        num_stages: Into how many stages the layers are cut, as evenly as possible. Where not given, stages are those of
            the run's plan, and in a Hugging Face directory every layer is one.
        absent: Nodes of the run's plan that are gone; the stages that no other node holds are left out.

    Returns:
        The model, whole and in this process but for absent stages.

    Raises:
        InputError: `path` is neither or is damaged, it has fewer layers than `num_stages`, `absent` names a node that
            the plan has not or leaves nobody for stage 0, or there is no such device.

    Examples:
        >>> model = load_model(Path("runs/tiny"), device="cpu")
        >>> model.decoder.num_layers, model.decoder.stages
        (6, ((0, 1), (2, 3), (4, 5)))
        >>> load_model(Path("runs/tiny"), absent=["worker-2"]).decoder.absence
        "stage 1 has no node left: answered at 2 of 3 stages (67% of the layers' compute)"
    """
    path = Path(path)
    chosen = choose_device(device)
    if is_directory(path):
        stages_without((), absent)
        return _load_directory(path, chosen, num_stages)
    run = replace(read_inference_run(path, num_stages), checkpoint=require_sound_checkpoint(path))
    gone = stages_without(run.stage_nodes, absent)
    skeleton = run.load_stages(set(range(len(run.bounds))) - gone, chosen)
    return loaded(run, Decoder(skeleton, run.bounds, run.stage_nodes, gone, run.protected_stages))


def is_directory(path: Path) -> bool:
    """Whether `path` is a model in the Hugging Face format rather than a run."""
    return not (path / "config.yaml").is_file() and (path.suffix == ".gguf" or (path / "config.json").is_file())


def loaded(run: InferenceRun, decoder: Decoder) -> LoadedModel:
    """Return a run with its decoder."""
    return LoadedModel(decoder, run.experiment.name, run.checkpoint.name, run.experiment, run.folder)


def _load_directory(path: Path, device: torch.device, num_stages: int | None) -> LoadedModel:
    source = find_source(path)
    if source.gguf_file:
        raise InputError(f"{source}: a GGUF file has to be imported first: skippipe import {path} RUN")
    logging.disable_progress_bar()
    model = load_pretrained(source).to(device)
    turn_off_cache_and_router_logits(model.config)
    skeleton = find_parts(model)
    bounds = even_bounds(len(skeleton.layers), num_stages or len(skeleton.layers))
    template = load_experiment(Path(str(files("skippipe.checkpoint.huggingface") / "imported.yaml")))
    folder = str(source.folder.resolve())
    data = template.data.model_copy(update={"tokenizer": folder})
    experiment = template.model_copy(update={"model": ModelOptions(directory=folder), "data": data})
    return LoadedModel(Decoder(skeleton, bounds), source.folder.resolve().name, "weights as they are", experiment, None)
