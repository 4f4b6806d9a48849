"""Reading checkpoints. Tensors are found by name, so that any plan, stage split or number of ranks can load them.

checkpoints/step-00001000/
model-stage-<s>.safetensors       parameters under their Hugging Face names
optimizer-stage-<s>.safetensors   <parameter>.exp_avg, .exp_avg_sq, .step, and .master where there is one
                                  (a file -rank-<r> for each replica where the state is sharded)
metadata.json                     written last: what the checkpoint belongs to, size and SHA-256 of the files
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from skippipe.errors import CheckpointError
from skippipe.model.stage import Stage
from skippipe_scheduler.files import Count, Seconds, StrictModel, parse, read_json

FORMAT: Final = "skippipe.checkpoint/1"
METADATA = "metadata.json"
DIRECTORY = re.compile(r"step-(\d{8,})")
NOT_THE_MODEL = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Keys of a Hugging Face configuration that say nothing about shapes or values."""

TensorFileKind = Literal["model", "optimizer"]
FileName = Annotated[str, Field(pattern=r"^(model|optimizer)-stage-\d+(-rank-\d+)?\.safetensors$")]


class FileRecord(StrictModel):
    """What a complete file looks like."""

    size_bytes: Count
    sha256: str


class Metadata(StrictModel):
    """What a checkpoint belongs to and where its run stands."""

    format: Literal["skippipe.checkpoint/1"] = FORMAT
    step: Count
    tokens: Count
    elapsed_s: Seconds
    """Seconds of training so far, without validation and saving."""
    seed: int
    dtype: str
    model: dict[str, Any]
    """The Hugging Face configuration, as far as it determines the model."""
    data: dict[str, Any]
    """The cursor of `skippipe.data.samples.SampleOrder`."""
    plan_hash: str
    wandb_id: str | None = None
    files: dict[FileName, FileRecord]


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder that holds a run's checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of one checkpoint."""
    return checkpoints_folder(run_dir) / f"step-{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first: metadata is there and all files have their sizes."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := DIRECTORY.fullmatch(path.name))]
    return [path for _, path in sorted(named) if _is_complete(path)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    return next(reversed(complete_checkpoints(run_dir)), None)


def require_checkpoint(run_dir: Path) -> Path:
    """Return the newest complete checkpoint; raise `CheckpointError` saying what is wrong where there is none."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None:
        return checkpoint
    damaged = max((path for path in checkpoints_folder(run_dir).glob("step-*") if path.is_dir()), default=None)
    if damaged is not None:
        read_metadata(damaged)
    raise CheckpointError(f"{run_dir}: there is no checkpoint; train it first")


def read_metadata(directory: Path) -> Metadata:
    """Return a checkpoint's metadata; raise `CheckpointError` where there is none or a file is missing or truncated."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    path = directory / METADATA
    metadata = parse(Metadata, read_json(path, CheckpointError), str(path), CheckpointError)
    for name, record in metadata.files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the checkpoint is incomplete, use another one")
        if (size_bytes := file.stat().st_size) != record.size_bytes:
            raise CheckpointError(
                f"{file}: {size_bytes} bytes, {record.size_bytes} when it was saved; "
                "the file is truncated or was changed, use another checkpoint"
            )
    return metadata


def load_parameters(directory: Path, config: PretrainedConfig, stages: Iterable[Stage]) -> Metadata:
    """Load a checkpoint's parameters into `stages`, whatever their split, and return its metadata.

    Raises `CheckpointError` where a file is missing, truncated or edited, or where the checkpoint is of another model.
    """
    metadata = read_metadata(directory)
    check_model(directory, metadata, config)
    for stage in stages:
        tensors = load_tensors(directory, metadata, "model", stage.global_parameters())
        try:
            stage.load_global(tensors)
        except CheckpointError as reason:
            raise CheckpointError(f"{directory}: {reason}") from None
    return metadata


def load_tensors(
    directory: Path, metadata: Metadata, kind: TensorFileKind, parameters: Iterable[str]
) -> dict[str, Tensor]:
    """Return the tensors of the named parameters from the files of `kind`, after checking those files' hashes.

    In optimizer files a tensor belongs to a parameter where its name is the parameter's plus one more part.
    """
    wanted = set(parameters)
    tensors: dict[str, Tensor] = {}
    for name, record in sorted(metadata.files.items()):
        if not name.startswith(kind):
            continue
        path = directory / name
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if _parameter_of(key, kind) in wanted]  # noqa: SIM118
                if keys:
                    _check_hash(path, record)
                tensors |= {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as reason:
            raise CheckpointError(f"{path}: cannot be read ({reason}); use another checkpoint") from None
    return tensors


def load_file(directory: Path, metadata: Metadata, name: str) -> dict[str, Tensor]:
    """Return all tensors of one file of a checkpoint, after checking its hash."""
    path = directory / name
    try:
        _check_hash(path, metadata.files[name])
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as reason:
        raise CheckpointError(f"{path}: cannot be read ({reason}); use another checkpoint") from None


def model_identity(config: PretrainedConfig) -> dict[str, Any]:
    """Return the part of a Hugging Face configuration that determines the model."""
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if key not in NOT_THE_MODEL}


def check_model(directory: Path, metadata: Metadata, config: PretrainedConfig) -> None:
    """Raise `CheckpointError` naming the first difference where the checkpoint is of another model."""
    expected = model_identity(config)
    for key in sorted(metadata.model.keys() | expected.keys()):
        stored, wanted = metadata.model.get(key), expected.get(key)
        if stored != wanted:
            raise CheckpointError(
                f"{directory}: the checkpoint's model has {key} {stored!r}, this run's {wanted!r}; "
                "use the same model section, or another run_dir"
            )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parameter_of(key: str, kind: TensorFileKind) -> str:
    return key if kind == "model" else key.rpartition(".")[0]


def _check_hash(path: Path, record: FileRecord) -> None:
    if file_sha256(path) != record.sha256:
        raise CheckpointError(f"{path}: its content is not what was saved (SHA-256 differs); use another checkpoint")


def _is_complete(directory: Path) -> bool:
    try:
        read_metadata(directory)
    except CheckpointError:
        return False
    return True
