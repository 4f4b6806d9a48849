"""Reading checkpoints. Tensors are found by name, so that any plan, stage split or number of ranks can load them.

checkpoints/step-00001000/
model-stage-<s>.safetensors       parameters under their Hugging Face names; with adapters what is trained, as in
                                  peft, and the checkpoint of step 0 beside it has the rest
optimizer-stage-<s>.safetensors   <parameter>.exp_avg, .exp_avg_sq, .step, and .master where there is one
                                  (a file -rank-<r> for each replica where the state is sharded)
metadata.json                     written last: what the checkpoint belongs to, size and SHA-256 of the files; its own
held.json                         only where hosts share no disk: which of the files lie here (`held_files`)
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from skippipe.checkpoint.held_files import FileName, held_files
from skippipe.errors import CheckpointError, SkipPipeError
from skippipe.model.architecture_traits import traits_of
from skippipe_scheduler.files import Count, Seconds, StrictModel, parse, read_json, read_text, write_atomically

logger = logging.getLogger(__name__)
FORMAT: Final = "skippipe.checkpoint/1"
METADATA = "metadata.json"
LATEST: Final = "latest"
"""File of a run directory with the name of the checkpoint that was completed last: what is gone can be told by it."""
DIRECTORY = re.compile(r"step-(\d{8,})")
NO_DIRECTORY: Final = "no such checkpoint directory"
NOT_THE_MODEL = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Keys of a Hugging Face configuration that say nothing about shapes or values."""

TensorFileKind = Literal["model", "optimizer"]


class FileRecord(StrictModel):
    """What a complete file looks like."""

    size_bytes: Count
    sha256: str


class BaseCheckpoint(StrictModel):
    """Another checkpoint in the same folder, with the parameters that training does not change."""

    name: Annotated[str, Field(pattern=DIRECTORY.pattern)]
    sha256: str
    """Of its metadata (`metadata_sha256`), which has the hashes of its files."""


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
    settings: dict[str, Any] | None = None
    """What the last steps were trained with (`skippipe.training.startup.trained_settings`); None in files of earlier
    versions."""
    lora: dict[str, Any] | None = None
    """What determines the adapters among its tensors (`LoraOptions.identity`); None where there are none."""
    base: BaseCheckpoint | None = None
    """Where the parameters are that are not in its files; None where all are."""
    layers: tuple[tuple[Count, Count], ...] | None = None
    """First and last layer, the latter not included, of each stage that files are named by; None in files of earlier
    versions."""
    files: dict[FileName, FileRecord]
    sha256: str | None = None
    """Of all the rest (`metadata_sha256`); None in files of earlier versions."""


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder that holds a run's checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of one checkpoint."""
    return checkpoints_folder(run_dir) / f"step-{step:08d}"


def found_checkpoints(run_dir: Path) -> list[Path]:
    """Return every directory that has the name of a checkpoint, sound or not, oldest first.

    Raises `CheckpointError` where the folder that holds them cannot be read.
    """
    folder = checkpoints_folder(run_dir)
    try:
        if not folder.exists():
            return []
        named = [(int(match[1]), path) for path in folder.iterdir() if (match := DIRECTORY.fullmatch(path.name))]
    except OSError as reason:
        raise CheckpointError(
            f"{folder}: cannot be read ({reason.strerror or reason}); it is the folder of the run's checkpoints: make "
            "it readable, or choose another run_dir"
        ) from None
    return [path for _, path in sorted(named)]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first: metadata is there and all files have their sizes."""
    return [path for path in found_checkpoints(run_dir) if _is_complete(path)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    return next(reversed(complete_checkpoints(run_dir)), None)


def last_completed(run_dir: Path) -> Path | None:
    """Return the checkpoint that was completed last, there or not, by what the run directory says; else None."""
    path = run_dir / LATEST
    if not path.exists():  # of an earlier version, or nothing was saved yet
        return None
    try:
        name = read_text(path, CheckpointError).strip()
    except CheckpointError as reason:
        logger.warning("%s", reason)
        return None
    if not DIRECTORY.fullmatch(name):
        logger.warning("%s: %r is no name of a checkpoint; going by the checkpoints that are there", path, name[:40])
        return None
    return checkpoints_folder(run_dir) / name


def note_last_completed(checkpoint: Path) -> None:
    """Write into the run directory what `last_completed` reads; the checkpoint counts also where that fails."""
    with suppress(SkipPipeError):
        write_atomically(checkpoint.parents[1] / LATEST, checkpoint.name + "\n")


def require_checkpoint(run_dir: Path) -> Path:
    """Return the newest complete checkpoint; raise `CheckpointError` saying what is wrong where there is none."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None:
        return checkpoint
    for damaged in reversed(found_checkpoints(run_dir)):
        read_metadata(damaged)
    raise CheckpointError(f"{run_dir}: there is no checkpoint; train it first")


def read_metadata(directory: Path) -> Metadata:
    """Return a checkpoint's metadata; raise `CheckpointError` where it is damaged or a file is missing or truncated.

    Where hosts share no disk, the files are those that lie on this one.
    """
    metadata = read_metadata_alone(directory)
    for name in held_files(directory, metadata.files):
        check_size(directory / name, metadata.files[name])
    if metadata.base is not None:
        base = directory.parent / metadata.base.name
        if reference_to(base) != metadata.base:
            raise CheckpointError(
                f"{directory / METADATA}: {base.name} beside it is another one than it needs; use another checkpoint"
            )
    return metadata


def read_metadata_alone(directory: Path) -> Metadata:
    """Return a checkpoint's metadata, whatever files there are; raise `CheckpointError` where it is damaged."""
    if not directory.is_dir():
        others = sorted(path.name for path in directory.parent.glob("step-*"))
        beside = f"; {directory.parent} has {', '.join(others)}" if others else ""
        raise CheckpointError(f"{directory}: {NO_DIRECTORY}{beside}")
    path = directory / METADATA
    content = read_json(path, CheckpointError)
    metadata = parse(Metadata, content, str(path), CheckpointError)
    if metadata.sha256 not in (None, metadata_sha256(content)):
        raise CheckpointError(f"{path}: its content is not what was saved (SHA-256 differs); use another checkpoint")
    named = DIRECTORY.fullmatch(directory.name)
    if named is not None and int(named[1]) != metadata.step:
        raise CheckpointError(f"{path}: it is of step {metadata.step}, not {int(named[1])}; use another checkpoint")
    return metadata


def check_size(file: Path, record: FileRecord) -> None:
    """Raise `CheckpointError` where a file is missing or has another size than it was saved with."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; the checkpoint is incomplete, use another one")
    if (size_bytes := file.stat().st_size) != record.size_bytes:
        raise CheckpointError(
            f"{file}: {size_bytes} bytes, {record.size_bytes} when it was saved; "
            "the file is truncated or was changed, use another checkpoint"
        )


def reference_to(directory: Path) -> BaseCheckpoint:
    """Return what a checkpoint in the same folder has as its base, where it is sound and whole in itself."""
    metadata = read_metadata(directory)
    if metadata.base is not None:
        raise CheckpointError(f"{directory / METADATA}: it has adapters alone, and no other checkpoint can rest on it")
    return BaseCheckpoint(name=directory.name, sha256=metadata_sha256(read_json(directory / METADATA, CheckpointError)))


def parts_of(directory: Path) -> list[tuple[Path, Metadata]]:
    """Return a checkpoint and its metadata and, behind it, the one with the parameters that are not in its files."""
    metadata = read_metadata(directory)
    parts = [(directory, metadata)]
    if metadata.base is not None:
        base = directory.parent / metadata.base.name
        parts.append((base, read_metadata(base)))
    return parts


def metadata_sha256(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what metadata.json holds, its own left out, in hexadecimal."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_tensors(
    directory: Path, metadata: Metadata, kind: TensorFileKind, parameters: Iterable[str]
) -> dict[str, Tensor]:
    """Return the tensors of the named parameters from the files of `kind`, after checking those files' hashes.

    In optimizer files a tensor belongs to a parameter where its name is the parameter's plus one more part.
    """
    wanted = set(parameters)
    tensors: dict[str, Tensor] = {}
    for name in held_files(directory, metadata.files):
        if not name.startswith(kind):
            continue
        path, record = directory / name, metadata.files[name]
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if _parameter_of(key, kind) in wanted]  # noqa: SIM118
                if keys:
                    check_hash(path, record)
                tensors |= {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as reason:
            raise CheckpointError(f"{path}: cannot be read ({reason}); use another checkpoint") from None
    return tensors


def load_file(directory: Path, metadata: Metadata, name: str) -> dict[str, Tensor]:
    """Return all tensors of one file of a checkpoint, after checking its hash."""
    path = directory / name
    if name not in held_files(directory, metadata.files):
        raise CheckpointError(f"{path}: not on this disk{where_the_rest_is(directory, metadata)}")
    try:
        check_hash(path, metadata.files[name])
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as reason:
        raise CheckpointError(f"{path}: cannot be read ({reason}); use another checkpoint") from None


def model_identity(config: PretrainedConfig) -> dict[str, Any]:
    """Return the part of a Hugging Face configuration that determines the model."""
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if key not in NOT_THE_MODEL}


def check_model(directory: Path, metadata: Metadata, config: PretrainedConfig) -> None:
    """Raise `CheckpointError` naming the first difference where the checkpoint is of another model.

    Dropout is a setting of the training, which may change.
    """
    expected, dropout = model_identity(config), traits_of(config.model_type).dropout_options
    for key in sorted((metadata.model.keys() | expected.keys()).difference(dropout)):
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


def check_hash(path: Path, record: FileRecord) -> None:
    """Raise `CheckpointError` where a file is not what was saved, OSError where it cannot be read."""
    status = path.stat()
    if _sha256_of(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) != record.sha256:
        raise CheckpointError(f"{path}: its content is not what was saved (SHA-256 differs); use another checkpoint")


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, *identity: int) -> str:
    """Hash a file once in a process: what was checked when the checkpoint was chosen is not hashed again at loading."""
    return file_sha256(path)


def where_the_rest_is(directory: Path, metadata: Metadata) -> str:
    """Return what to do where only some of the files are here, else nothing."""
    held, num_files = len(held_files(directory, metadata.files)), len(metadata.files)
    if held == num_files:
        return ""
    return (
        f"; {held} of the {num_files} files of this checkpoint are here, the others on other hosts: bring them here "
        "with skippipe collect"
    )


def _is_complete(directory: Path) -> bool:
    try:
        read_metadata(directory)
    except CheckpointError:
        return False
    return True
