"""A directory that appears once it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skippipe.errors import InputError, StorageError


def check_unused(target: Path) -> None:
    """Raise `InputError` where `target` is something else than a directory to be made, or an empty one."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists and is not empty; name another directory")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Give a directory to write into, which becomes `target` at the end; nothing is left where an error comes first.

    Raises `StorageError` where it cannot be written.
    """
    aside = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except OSError as reason:
        raise StorageError(
            f"{target}: cannot be written ({reason.strerror or reason}); make room or name another"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
