"""A pretrained model as a run that has not begun: evaluate it, or train on from its weights."""

import logging
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from skippipe.checkpoint.huggingface.healing import healing_overrides
from skippipe.checkpoint.huggingface.loss_check import check_same_loss
from skippipe.checkpoint.huggingface.new_directory import check_unused
from skippipe.checkpoint.huggingface.peft_adapter import PeftAdapter, read_adapter
from skippipe.checkpoint.huggingface.source import (
    WeightSource,
    find_source,
    load_pretrained,
    load_tokenizer,
    plain_config,
)
from skippipe.checkpoint.huggingface.stored_tensors import name_some
from skippipe.checkpoint.layer_choice import read_choice
from skippipe.checkpoint.reader import Metadata, model_identity
from skippipe.checkpoint.writer import write_stages
from skippipe.config.experiment import Experiment, ModelOptions
from skippipe.config.experiment_file import load_experiment, save_experiment
from skippipe.config.lora_options import LoraOptions
from skippipe.errors import InputError, StorageError
from skippipe.model.architecture import LONGEST_CONTEXT, experiment_model, num_layers
from skippipe.model.linear.lora import STORED_PREFIX
from skippipe.model.skeleton import build_skeleton, is_layer_of
from skippipe.planning.experiment_plan import plan_experiment
from skippipe_scheduler.plan.plan import Plan

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
FEWEST_TO_SKIP = 3
"""Stages of which a third can be left out: one goes, and another beside the first stays."""
TEMPLATES = Path(str(files("skippipe.checkpoint.huggingface")))


def import_model(
    path: str | Path,
    run_dir: str | Path,
    *,
    config_path: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    adapter: str | Path | None = None,
    heal: str | Path | None = None,
) -> int:
    """Make a run that has not begun from a pretrained model.

    The run gets the model's configuration and tokenizer (RUN/model), its weights as the checkpoint of step 0, and a
    plan. The whole model is in memory once.

    Args:
        path: A Hugging Face directory with safetensors, or a GGUF file.
        run_dir: The run's directory; it must not exist, or be empty.
        config_path: The experiment of the run, whose model and tokenizer are replaced by those at `path`; where not
            given, one for one machine.
        overrides: `key.sub=value` each, as on the command line.
        adapter: A directory with an adapter as peft writes it, to train on; it sets `lora`, but for a dropout that is
            given.
        heal: A choice of layers, as `skippipe evaluate --save-choice` writes it, along which to train; it sets stages
            and routes, over which `overrides` win.

    Returns:
        The number of the model's parameters.

    Raises:
        InputError: `path` cannot be read, is quantised, lacks tensors of the model, or would compute something else
            than in transformers; `adapter` or `heal` is none of that model; or `run_dir` is in use; also what planning
            raises. Nothing is left then.
        InfeasibleError: No plan of the experiment can exist. Nothing is left then.
        StorageError: `run_dir` cannot be written. Nothing is left then.

    Examples:
        >>> _ = export_run(Path("runs/tiny"), Path("pretrained"))
        >>> overrides = ("pipeline.planner.max_evaluations=200",)
        >>> import_model(Path("pretrained"), Path("runs/imported"), overrides=overrides)
        279488
    """
    path, run_dir = Path(path), Path(run_dir)
    config_path = None if config_path is None else Path(config_path)
    adapter = None if adapter is None else Path(adapter)
    heal = None if heal is None else Path(heal)
    check_unused(run_dir)
    source = find_source(path)
    if heal is not None:
        choice = read_choice(heal)
        overrides = (*healing_overrides(choice, heal), *overrides)
    experiment = _experiment(config_path, overrides, run_dir)
    model, tokenizer = load_pretrained(source), load_tokenizer(source)
    if config_path is None:
        experiment = _experiment(None, (*_fitting(experiment, model.config), *overrides), run_dir)
    _check_tokenizer(tokenizer, model, source)
    if heal is not None:
        choice.require_depth(num_layers(model.config), heal)
    complete = False
    try:
        _write_model(source, model, tokenizer, run_dir / MODEL_FOLDER)
        if config_path is None:
            _write_cluster(run_dir / "cluster.yaml", experiment.pipeline.num_stages)
        check_same_loss(experiment_model(experiment), model, path)
        given = None if adapter is None else read_adapter(adapter, experiment_model(experiment))
        if given is not None:
            experiment = _with_adapter(experiment, given.options)
        plan = plan_experiment(experiment)
        _write_checkpoint(experiment, plan, model, run_dir, given)
        plan.save(run_dir / "plan.json")
        save_experiment(experiment, run_dir / "config.yaml")
        complete = True
    except OSError as reason:
        raise StorageError(f"{run_dir}: cannot be written ({reason.strerror or reason})") from None
    finally:
        if not complete:
            shutil.rmtree(run_dir, ignore_errors=True)
    return sum(parameter.numel() for parameter in model.parameters())


def _experiment(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path) -> Experiment:
    given = load_experiment(config_path or TEMPLATES / "imported.yaml", overrides)
    folder = str((run_dir / MODEL_FOLDER).resolve())
    update = {
        "run_dir": str(run_dir),
        "model": ModelOptions(directory=folder),
        "data": given.data.model_copy(update={"tokenizer": folder}),
    }
    if config_path is None:
        update["cluster"] = str((run_dir / "cluster.yaml").resolve())
    return given.model_copy(update=update)


def _fitting(experiment: Experiment, config: PretrainedConfig) -> Iterator[str]:
    """Yield overrides of an experiment for which the model is too small."""
    layers = num_layers(config)
    if layers < experiment.pipeline.num_stages:
        yield f"pipeline.num_stages={layers}"
    if layers < FEWEST_TO_SKIP:
        yield "pipeline.skip_ratio=0"
    context = getattr(config, LONGEST_CONTEXT)
    if context < experiment.training.sequence_length:
        yield f"training.sequence_length={context}"


def _write_cluster(path: Path, num_nodes: int) -> None:
    """Write the cluster of one machine with a process for each stage."""
    path.write_text(Template((TEMPLATES / "cluster.yaml").read_text()).substitute(num_nodes=num_nodes))


def _with_adapter(experiment: Experiment, options: LoraOptions) -> Experiment:
    """Return the experiment with an adapter's options; a dropout that was asked for stays."""
    before = experiment.lora
    kept = {"lora_dropout": before.lora_dropout} if "lora_dropout" in before.model_fields_set else {}
    return experiment.model_copy(update={"lora": options.model_copy(update=kept)})


def _check_tokenizer(tokenizer: Any, model: PreTrainedModel, source: WeightSource) -> None:
    """Raise `InputError` where the tokenizer can make tokens of text for which the model has no row.

    Special tokens beyond the rows are only told: text does not become one of them unless it spells it.
    """
    rows = model.get_input_embeddings().num_embeddings
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    beyond = {token: name for name, token in tokenizer.get_vocab().items() if token >= rows}
    ordinary = sorted(beyond.keys() - special)
    if ordinary:
        raise InputError(
            f"{source}: the tokenizer has {len(ordinary)} tokens for which the model has no row (the first is "
            f"{ordinary[0]}, {beyond[ordinary[0]]!r}; the model has {rows} rows); take the model's own tokenizer, or "
            "resize its embedding"
        )
    if beyond:
        logger.warning("%s: the model has no row for special tokens: %s", source, name_some(sorted(beyond.values())))


def _write_model(source: WeightSource, model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    plain_config(model).save_pretrained(folder)
    generation = source.folder / GENERATION_CONFIG_NAME
    if source.gguf_file is None and generation.is_file():
        shutil.copy(generation, folder)  # as it is: transformers refuses to write some that are published
    else:
        GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_checkpoint(
    experiment: Experiment, plan: Plan, model: PreTrainedModel, run_dir: Path, adapter: PeftAdapter | None
) -> None:
    """Write the weights as the checkpoint of step 0, with the files that the plan's stages would write."""
    config = experiment_model(experiment)
    metadata = Metadata(
        step=0,
        tokens=0,
        elapsed_s=0.0,
        seed=experiment.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        model=model_identity(config),
        data={},
        plan_hash=plan.hash,
        lora=None if adapter is None else adapter.options.identity(),
        files={},
    )
    skeleton = build_skeleton(config, model.dtype)
    stages: list[dict[str, Tensor]] = [{} for _ in plan.stages]
    stage_of_layer = {layer: index for index, stage in enumerate(plan.stages) for layer in range(*stage.layers)}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if adapter is not None:
        tensors |= adapter.tensors  # in the dtype it came in: peft trains in fp32 beside weights in bfloat16
    for name, tensor in tensors.items():
        layer = is_layer_of(name.removeprefix(STORED_PREFIX), skeleton)
        stages[0 if layer is None else stage_of_layer[layer]][name] = tensor
    write_stages(run_dir, metadata, stages)
