"""Reading a pretrained model: a Hugging Face directory with safetensors, or a GGUF file."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from skippipe.checkpoint.huggingface.gguf_tensors import check_all_used
from skippipe.checkpoint.huggingface.stored_tensors import check_not_quantised, dtype_that_holds, name_some
from skippipe.errors import InputError
from skippipe.model.architecture_traits import traits_of
from skippipe.model.skeleton import build_skeleton
from skippipe_scheduler.files import read_json

GGUF_NEEDS = ("gguf", "accelerate")
NUMBERED_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class WeightSource:
    """Where a pretrained model lies: its directory and, for GGUF, the file in it."""

    folder: Path
    gguf_file: str | None = None

    def __str__(self) -> str:
        """Describe it for messages."""
        return str(self.folder / self.gguf_file if self.gguf_file else self.folder)


def find_source(path: Path) -> WeightSource:
    """Return what `path` names: a .gguf file, a directory with one, or one with config.json and safetensors.

    Raises `InputError` saying what is missing.
    """
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory or .gguf file; a model of the hub is fetched before, with "
            "`hf download NAME --local-dir DIR`"
        )
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{path}: no *.safetensors beside config.json; other formats run code and are not read")
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path}: it holds an adapter beside the weights, which is not read; merge it into them")
        return WeightSource(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        found = f"{len(files)} .gguf files; name one of them" if files else "neither config.json nor a .gguf file"
        raise InputError(f"{path}: {found}")
    return _gguf(files[0])


def load_pretrained(source: WeightSource) -> PreTrainedModel:
    """Return the whole model on the CPU in the dtype that holds all it is stored in, GGUF dequantised to fp32.

    What dtype config.json says is not asked: files in another one are published.

    A head that the file has beside the embedding and that differs from it is used, as transformers does, whatever the
    configuration says: it is corrected then.

    Raises `InputError` where it cannot be read, is quantised, or lacks or has tensors that the model does not; and
    `ConfigError` where its architecture cannot be split into stages.
    """
    dtype = torch.float32
    if source.gguf_file is None:
        stored = check_not_quantised(source.folder)
        traits_of(str(read_json(source.folder / "config.json", InputError).get("model_type")), str(source))
        _check_experts(source, stored)
        dtype = dtype_that_holds(stored)
    model: PreTrainedModel
    found: dict[str, Any]
    with _quiet():
        options = {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, found = _load(AutoModelForCausalLM, source, **options, **_only_safe(source))
    traits_of(model.config.model_type, str(source))
    _check_complete(source, found)
    if source.gguf_file:
        check_all_used(source.folder / source.gguf_file, model)
    if model.config.tie_word_embeddings and not is_tied(model):
        model.config.tie_word_embeddings = False
    return model


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def load_tokenizer(source: WeightSource) -> Any:
    """Return the tokenizer of the library; raise `InputError` where there is none."""
    return _load(AutoTokenizer, source)


def plain_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the model's configuration without the traces of a quantised file."""
    content = model.config.to_dict()
    content.pop("quantization_config", None)
    config: PretrainedConfig = type(model.config)(**content)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    return config


def _check_experts(source: WeightSource, stored: Iterable[str]) -> None:
    """Raise `InputError` where some expert of a mixture is not there: transformers would close the ranks."""
    found = {_from_layer(name) for name in stored if NUMBERED_EXPERT.search(name)}
    if found:
        model = build_skeleton(_load(AutoConfig, source), torch.float32).model
        names = revert_weight_conversion(model, model.state_dict())
        expected = {_from_layer(name) for name in names if NUMBERED_EXPERT.search(name)}
        missing, unexpected = expected - found, found - expected
        _check_complete(source, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": ()})


def _from_layer(name: str) -> str:
    """Return a name without what stands before the layers: files of a base model lack it."""
    return name[max(name.find("layers."), 0) :]


def _check_complete(source: WeightSource, found: Mapping[str, Any]) -> None:
    """Raise `InputError` naming the tensors where model and file do not have the same ones."""
    shapes = [f"{name} {tuple(stored)} instead of {tuple(wanted)}" for name, stored, wanted in found["mismatched_keys"]]
    faults = {
        "the file lacks tensors of the model": sorted(found["missing_keys"]),
        "the file has tensors that the model does not": sorted(found["unexpected_keys"]),
        "tensors have another shape than the model's": sorted(shapes),
    }
    told = [f"{words}: {name_some(names)}" for words, names in faults.items() if names]
    if told:
        raise InputError(f"{source}: {'; '.join(told)}; config.json and weights must be of one model: fetch them again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing its own report of what it loaded: what is wrong is raised here."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _gguf(path: Path) -> WeightSource:
    missing = [name for name in GGUF_NEEDS if find_spec(name) is None]
    if missing:
        raise InputError(f"{path}: reading GGUF needs {' and '.join(missing)}; pip install 'skippipe[gguf]'")
    return WeightSource(path.parent, path.name)


def _only_safe(source: WeightSource) -> dict[str, Any]:
    return {} if source.gguf_file else {"use_safetensors": True}


def _load(library: Any, source: WeightSource, **options: Any) -> Any:
    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    try:
        return library.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as reason:  # the library raises errors of many kinds on files that it cannot read
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise InputError(f"{source}: cannot be loaded ({first_line})") from None
