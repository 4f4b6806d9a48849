"""A second place for checkpoints, by URL: an object store, a host by sftp, or a path on shared storage, by fsspec.

A checkpoint there is complete once its metadata.json is, which comes last. Names of files begin with their hashes, so
those of two states never take each other's place. Each is written under another name and then renamed, so one that has
its name is whole also where the storage shows what is half written.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Final, NamedTuple, TypeVar

from skippipe.checkpoint.disks.disk_view import DiskView
from skippipe.checkpoint.reader import (
    DIRECTORY,
    METADATA,
    FileRecord,
    Metadata,
    file_sha256,
    read_metadata_alone,
)
from skippipe.checkpoint.soundness import what_is_wrong
from skippipe.errors import CheckpointError, ConfigError, SkipPipeError, StorageError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
PARTIAL: Final = ".part"
"""What the names of files end in that are being written."""
POLL_S: Final = 2.0
"""Seconds between two looks whether other hosts have brought their files."""


class RemoteFolder:
    """The checkpoints of one run in a folder that a URL names. Raises `StorageError` where that gives no answer."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` where what reads such a URL is not installed."""
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self._files, self._root = url_to_fs(self.url)
        except ImportError as reason:
            raise ConfigError(f"checkpoint.remote_save_folder: {url}: {reason}") from None
        except ValueError as reason:
            raise ConfigError(f"checkpoint.remote_save_folder: {url}: {reason}; give a URL or a path") from None

    def steps(self) -> list[int]:
        """Return of which steps there is a complete checkpoint, oldest first."""
        return self._try(
            lambda: sorted(step for name, step in self._named() if self._files.exists(self._at(name, METADATA)))
        )

    def view(self, checkpoint: Path) -> DiskView:
        """Return what is there of a checkpoint, by the sizes of files; hashes are checked where these are fetched."""
        if not self._try(lambda: self._files.exists(self._at(checkpoint.name, METADATA))):
            return DiskView()
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / checkpoint.name
            kept.mkdir()
            self._get(self._at(checkpoint.name, METADATA), kept / METADATA)
            try:
                metadata = read_metadata_alone(kept)
            except CheckpointError as reason:
                return DiskView(damage=what_is_wrong(reason, kept))
            sizes = self._sizes(checkpoint.name)
            files = metadata.files.items()
            sound = tuple(name for name, record in files if sizes.get(_stored(name, record)) == record.size_bytes)
            return DiskView(metadata=(kept / METADATA).read_text(encoding="utf-8"), sound=sound)

    def fetch(self, checkpoint: str, name: str, record: FileRecord, folder: Path) -> None:
        """Bring a file of a checkpoint into a folder here; raise `CheckpointError` where it is not what was saved."""
        aside = folder / f".{name}{PARTIAL}"
        try:
            self._get(self._at(checkpoint, _stored(name, record)), aside)
            if file_sha256(aside) != record.sha256:
                raise CheckpointError(f"{self.url}: {checkpoint}/{name} is not what was saved (SHA-256 differs)")
            aside.replace(folder / name)
        finally:
            aside.unlink(missing_ok=True)

    def bring(self, checkpoint: Path, records: Mapping[str, FileRecord]) -> None:
        """Bring files of a checkpoint on this disk there, as far as they are not.

        Raises `CheckpointError` where one here has not its size, and `FileNotFoundError` where it is gone.
        """
        sizes = self._sizes(checkpoint.name)
        for name, record in records.items():
            if sizes.get(_stored(name, record)) != record.size_bytes:
                found_bytes = (checkpoint / name).stat().st_size
                if found_bytes != record.size_bytes:
                    raise CheckpointError(f"{checkpoint / name}: {found_bytes} bytes, saved were {record.size_bytes}")
                self._put(checkpoint / name, self._at(checkpoint.name, _stored(name, record)))

    def complete(self, checkpoint: Path, wanted: Callable[[], bool]) -> bool:
        """Bring the metadata there once all files are; return False where that is not `wanted` any more before."""
        files = read_metadata_alone(checkpoint).files
        while not _all_there(files, self._sizes(checkpoint.name)):
            if not wanted():
                return False
            time.sleep(POLL_S)
        self._put(checkpoint / METADATA, self._at(checkpoint.name, METADATA))
        return True

    def remove_old(self, keep_last: int, bases: Collection[str]) -> None:
        """Keep the newest complete checkpoints, what they stand on, and what is not complete yet but newer."""
        kept = self.steps()[-keep_last:]
        for name, step in self._try(self._named):
            if kept and step < kept[-1] and step not in kept and name not in bases:
                self._remove(self._at(name))

    def everything(self) -> list[str]:
        """Return the place of every file that is there, whole or not."""
        return self._try(lambda: [str(path) for path in self._files.find(self._root)])

    def _remove(self, folder: str) -> None:
        self._try(lambda: self._files.rm(folder, recursive=True))

    def _get(self, place: str, target: Path) -> None:
        self._try(lambda: self._files.get_file(place, str(target)))

    def _put(self, source: Path, final: str) -> None:
        """Raises `FileNotFoundError` where the source is gone."""

        def put() -> None:
            self._files.makedirs(final.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(source), final + PARTIAL)
            if self._files.exists(final):
                self._files.rm_file(final)
            self._files.mv(final + PARTIAL, final)

        try:
            self._try(put)
        except StorageError:
            source.stat()
            raise

    def _sizes(self, checkpoint: str) -> Mapping[str, int]:
        """Return the sizes of the files of a checkpoint."""

        def look() -> dict[str, int]:
            if not self._files.exists(self._at(checkpoint)):
                return {}
            found = self._files.ls(self._at(checkpoint), detail=True)
            return {entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"] or 0) for entry in found}

        return self._try(look)

    def _named(self) -> list[tuple[str, int]]:
        if not self._files.exists(self._root):
            return []
        names = [entry.rstrip("/").rpartition("/")[2] for entry in self._files.ls(self._root, detail=False)]
        return [(name, int(match[1])) for name in names if (match := DIRECTORY.fullmatch(name))]

    def _at(self, *parts: str) -> str:
        return "/".join([self._root.rstrip("/"), *parts])

    def _try(self, action: Callable[[], Result]) -> Result:
        try:
            self._files.invalidate_cache()
            return action()
        except Exception as reason:  # each protocol's library has exceptions of its own
            words = " ".join(str(reason).split()) or type(reason).__name__
            raise StorageError(
                f"checkpoint.remote_save_folder: {self.url}: {words}; see to its address and credentials"
            ) from None


class _Saved(NamedTuple):
    checkpoint: Path
    records: Mapping[str, FileRecord]
    completes: bool
    bases: tuple[str, ...]


class Uploads:
    """Brings checkpoints to a remote folder in the background, one after the other.

    A failure is logged, and training goes on. One whose local files are gone before it had its turn is left out.
    """

    def __init__(self, url: str, keep_last: int) -> None:
        self._folder, self._keep_last = RemoteFolder(url), keep_last
        self._waiting: SimpleQueue[_Saved | None] = SimpleQueue()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._bring_all, name="uploads", daemon=True)
        self._thread.start()

    def begin(
        self, checkpoint: Path, records: Mapping[str, FileRecord], metadata: Metadata, *, completes: bool
    ) -> None:
        """Bring these files of a checkpoint there that has its name here; one process for all `completes` it."""
        bases = () if metadata.base is None else (metadata.base.name,)
        self._waiting.put(_Saved(checkpoint, records, completes, bases))

    def close(self, limit_s: float) -> None:
        """Wait until all are there, so long at most."""
        self._waiting.put(None)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            logger.warning("%s: not all checkpoints are there after %.0f s more", self._folder.url, limit_s)
        self._given_up.set()

    def _bring_all(self) -> None:
        while (saved := self._waiting.get()) is not None and not self._given_up.is_set():
            try:
                self._bring(saved)
            except FileNotFoundError:
                self._say_late(saved)
            except (OSError, SkipPipeError) as reason:
                logger.warning("%s is not in %s: %s", saved.checkpoint.name, self._folder.url, reason)

    def _bring(self, saved: _Saved) -> None:
        for base in saved.bases if saved.completes else ():
            path = saved.checkpoint.with_name(base)
            if self._folder.view(path).metadata == "":
                self._folder.bring(path, read_metadata_alone(path).files)
                self._folder.complete(path, lambda: self._is_wanted(saved))
        self._folder.bring(saved.checkpoint, saved.records)
        if not saved.completes:
            return
        if not self._folder.complete(saved.checkpoint, lambda: self._is_wanted(saved)):
            self._say_late(saved)
            return
        self._folder.remove_old(self._keep_last, saved.bases)

    def _is_wanted(self, saved: _Saved) -> bool:
        return saved.checkpoint.exists() and not self._given_up.is_set()

    def _say_late(self, saved: _Saved) -> None:
        logger.warning(
            "%s is not in %s: newer ones came before it was there; raise checkpoint.interval or checkpoint.keep_last",
            saved.checkpoint.name,
            self._folder.url,
        )


def _all_there(files: Mapping[str, FileRecord], sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(_stored(name, record)) == record.size_bytes for name, record in files.items())


def _stored(name: str, record: FileRecord) -> str:
    return f"{record.sha256[:16]}-{name}"
