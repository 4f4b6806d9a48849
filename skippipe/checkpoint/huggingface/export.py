"""A checkpoint as a Hugging Face directory: weights, configuration and tokenizer."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME

from skippipe.checkpoint.huggingface.fewer_layers import LayerNames, kept_layers_of
from skippipe.checkpoint.huggingface.new_directory import check_unused, new_directory
from skippipe.checkpoint.huggingface.weight_shards import WeightShards
from skippipe.checkpoint.model_tensors import plain_stages
from skippipe.checkpoint.reader import (
    check_model,
    checkpoint_path,
    read_metadata,
)
from skippipe.checkpoint.soundness import require_sound_checkpoint
from skippipe.config.experiment_file import load_run
from skippipe.data.kept_tokenizer import kept_options, tokenizer_of_run
from skippipe.data.tokenizer import TOKENIZER_FILE, save_for_transformers
from skippipe.errors import CheckpointError, InputError
from skippipe.model.architecture import experiment_model, num_layers
from skippipe.model.device import torch_dtype
from skippipe.model.skeleton import build_skeleton, find_parts, shortened
from skippipe_scheduler.files import read_json

logger = logging.getLogger(__name__)


def export_run(
    run_dir: str | Path,
    target: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    choice: str | Path | None = None,
) -> Path:
    """Write a checkpoint of a run as a Hugging Face directory.

    `AutoModelForCausalLM.from_pretrained(target)` and `AutoTokenizer` load the result. One stage at a time is in
    memory.

    Args:
        run_dir: The run's directory.
        target: The directory to write; it must not exist, or be empty.
        step: The optimizer step of the checkpoint; the newest one where not given.
        dtype: What the weights are converted to, as `torch` names it (`"bfloat16"`); as trained where not given.
        choice: File of the layers to export, as `evaluate --save-choice` writes it; all where not given.

    Returns:
        The directory of the checkpoint that was read.

    Raises:
        InputError: `run_dir` is no run, `target` is in use, or the Hugging Face format cannot say what `choice` leaves
            out.
        CheckpointError: There is no such checkpoint, or it is damaged.
        StorageError: `target` cannot be written; then nothing is left there.

    Examples:
        >>> export_run(Path("runs/tiny"), Path("exported"), dtype="bfloat16").name
        'step-00000002'
        >>> [path.name for path in Path("exported").glob("*.safetensors")]
        ['model.safetensors']
    """
    run_dir = Path(run_dir)
    target = Path(target)
    choice = None if choice is None else Path(choice)
    experiment = load_run(run_dir)
    checkpoint = require_sound_checkpoint(run_dir) if step is None else checkpoint_path(run_dir, step)
    check_unused(target)
    kept = experiment.model_copy(update={"data": kept_options(experiment.data, run_dir)})
    config, metadata = experiment_model(kept), read_metadata(checkpoint)
    check_model(checkpoint, metadata, config)
    layers = kept_layers_of(choice, config) if choice is not None else tuple(range(num_layers(config)))
    stored = torch_dtype(dtype or metadata.dtype)
    model = build_skeleton(shortened(config, layers), stored).model
    tokenizer = tokenizer_of_run(experiment.data, experiment.seed, run_dir, metadata.data.get("tokens"))
    with new_directory(target) as aside:
        _write_weights(checkpoint, model, aside, layers)
        _write_config(experiment.model.directory, model, tokenizer.eos_id, aside, layers)
        save_for_transformers(kept.data, tokenizer, aside)
        _tell_another_tokenizer(aside, target)
    return checkpoint


def _tell_another_tokenizer(folder: Path, target: Path) -> None:
    """Warn where `AutoTokenizer` reads another tokenizer from `folder` than was written.

    For some architectures (qwen2) it takes a class of its own, which splits text its own way, whatever the files say.
    """
    written = read_json(folder / TOKENIZER_FILE, InputError)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    read = json.loads(loaded.backend_tokenizer.to_str())
    if any(written.get(part) != read.get(part) for part in ("normalizer", "pre_tokenizer")):
        logger.warning(
            "%s: AutoTokenizer reads its tokenizer as %s, which splits text otherwise than in training; "
            "load it with transformers.PreTrainedTokenizerFast.from_pretrained",
            target,
            type(loaded).__name__,
        )


def _write_weights(checkpoint: Path, model: PreTrainedModel, folder: Path, layers: Sequence[int]) -> None:
    """Write the weights under the names and into the files of `save_pretrained`; one stage is in memory at a time."""
    skeleton = find_parts(model)
    renamed = LayerNames(skeleton.layers_prefix, layers)
    shape_of = {name: parameter.shape for name, parameter in model.named_parameters()}
    found: set[str] = set()
    expected = revert_weight_conversion(model, dict(model.named_parameters()))
    with WeightShards(folder, expected) as shards:
        for path, stored in plain_stages(checkpoint, skeleton.traits):
            tensors = renamed.of(stored)
            for key, tensor in tensors.items():
                if shape_of.get(key) != tensor.shape or key in found:
                    raise CheckpointError(f"{path}: {key}: not a parameter of the model, or there twice")
                found.add(key)
            for key, tensor in revert_weight_conversion(model, tensors).items():
                shards.put(key, tensor)
        missing = sorted(shape_of.keys() - found)
        if missing:
            raise CheckpointError(f"{checkpoint}: {missing[0]}: missing")
        shards.finish(model.num_parameters())


def _write_config(
    directory: str | None, model: PreTrainedModel, eos_id: int, folder: Path, layers: Sequence[int]
) -> None:
    """Write what `save_pretrained` would: of an imported model what came in, whatever training turned off."""
    generation = Path(directory or "") / GENERATION_CONFIG_NAME
    if directory is not None:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        config = shortened(config, layers)
        config.dtype = model.dtype
    else:
        config = model.config
        config.use_cache = True
        if config.eos_token_id is None:
            config.eos_token_id = eos_id
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if directory is not None and generation.is_file():
        shutil.copy(generation, folder)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
