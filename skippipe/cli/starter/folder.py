"""Writing the starter folder: copies of the `configs/` and `launch/` that a checkout has at its root."""

from pathlib import Path

from skippipe.errors import InputError, StorageError

FOLDERS = ("configs", "launch")
PACKAGED = Path(__file__).parent
"""Where the build puts both folders in a wheel (`force-include` in pyproject.toml)."""
REPOSITORY = Path(__file__).parents[3]
"""Where they are under an editable installation."""


def starter_files() -> dict[Path, Path]:
    """Return every file of the starter folder: its path in that folder, and the file to copy."""
    root = PACKAGED if (PACKAGED / FOLDERS[0]).is_dir() else REPOSITORY
    sources = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*")) if path.is_file())
    return {source.relative_to(root): source for source in sources}


def write_starter(target: Path) -> tuple[Path, ...]:
    """Write the starter folder into `target`, which may exist, and return the paths of its files within it.

    Raises `InputError` before anything is written where one of the files is there already, `StorageError` where writing
    fails.
    """
    files = starter_files()
    present = [str(name) for name in files if (target / name).exists()]
    if present:
        raise InputError(
            f"{target}: {_listed(present)} there already, and nothing is overwritten; "
            "name another folder, or move what is there"
        )
    try:
        for name, source in files.items():
            _copy(source, target / name)
    except OSError as reason:
        raise StorageError(f"{target}: cannot be written ({reason.strerror or reason}); name another folder") from None
    return tuple(files)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _copy(source: Path, target: Path) -> None:
    """Copy one file; a script can be executed, whatever an archive between has made of its mode."""
    content = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as stream:
        stream.write(content)
    if content.startswith(b"#!"):
        target.chmod(target.stat().st_mode | 0o111)
