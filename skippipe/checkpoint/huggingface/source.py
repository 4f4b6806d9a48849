"""Reading a pretrained model: a Hugging Face directory with safetensors, or a GGUF file."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from skippipe.errors import InputError
from skippipe.model.architecture_traits import traits_of

GGUF_NEEDS = ("gguf", "accelerate")


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
        raise InputError(f"{path}: no such directory or .gguf file")
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{path}: no *.safetensors beside config.json; other formats run code and are not read")
        return WeightSource(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        found = f"{len(files)} .gguf files; name one of them" if files else "neither config.json nor a .gguf file"
        raise InputError(f"{path}: {found}")
    return _gguf(files[0])


def load_pretrained(source: WeightSource) -> PreTrainedModel:
    """Return the whole model on the CPU in the dtype it is stored in, GGUF dequantised to fp32.

    Raises `InputError` where it cannot be read, `ConfigError` where its architecture cannot be split into stages.
    """
    model: PreTrainedModel = _load(AutoModelForCausalLM, source, dtype="auto", **_only_safe(source))
    traits_of(model.config.model_type, str(source))
    return model


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
