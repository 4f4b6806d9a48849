"""Which ranks see one and the same run directory: those of one host, or all of them where storage is shared."""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from skippipe.errors import LeftOutError, MinorityError, StorageError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import all_gather_json, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic

MARK = ".disk-"
"""Stands before the name of the file by which the processes of one start tell disks apart."""


class RunDisks(NamedTuple):
    """The disks on which a run directory lies, each named by the lowest rank that sees it: its *first* rank."""

    of_rank: tuple[int, ...]
    """The disk of each rank."""
    rank: int
    """This process."""
    nonce: str = ""
    """By what processes that come later tell disks apart; see `named_disk`."""

    @property
    def shared(self) -> bool:
        """Whether there is one disk alone."""
        return len(self.firsts) == 1

    @property
    def firsts(self) -> tuple[int, ...]:
        """All disks."""
        return tuple(sorted(set(self.of_rank)))

    @property
    def own(self) -> int:
        """The disk of this process."""
        return self.of_rank[self.rank]

    @property
    def is_first(self) -> bool:
        """Whether this process does what has to be done once on its disk."""
        return self.own == self.rank

    def next_after(self, disk: int) -> int:
        """Return the disk that comes after one, in a ring."""
        firsts = self.firsts
        return firsts[(firsts.index(disk) + 1) % len(firsts)]


ONE_DISK = RunDisks((0,), 0)
"""What a process that runs alone sees."""


def disks_of(names: Sequence[str], rank: int, nonce: str = "") -> RunDisks:
    """Return the disks of all ranks by the names that each rank has for its own."""
    return RunDisks(tuple(names.index(name) for name in names), rank, nonce)


@contextmanager
def open_run_disks(run_dir: Path, context: DistributedContext) -> Iterator[RunDisks]:
    """Make the run directory where it is missing, and give the disks on which it lies; all ranks enter together.

    Raises `StorageError`, on every rank, where one cannot write it. What tells disks apart stays behind where others
    may go on without this process.
    """
    nonce = on_first_rank(context, Topic.RUN_DIRECTORY, lambda: uuid.uuid4().hex)
    is_needed = False
    try:
        names = all_gather_json(context, Topic.RUN_DIRECTORY_SEEN, lambda: named_disk(run_dir, nonce))
        yield disks_of(names, context.rank, nonce)
    except (LeftOutError, MinorityError):
        is_needed = True
        raise
    finally:
        with suppress(OSError):  # what stands in the way of the directory has been said
            if not is_needed:
                remove_mark(run_dir, nonce)


def named_disk(run_dir: Path, nonce: str) -> str:
    """Return a name that all processes which see this directory get for one `nonce`, and nobody else.

    The first of them makes it: a file is created once, on network file systems too. Raises `StorageError` where the
    directory cannot be written.
    """
    mark = run_dir / f"{MARK}{nonce}"
    name = uuid.uuid4().hex
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with mark.open("x", encoding="utf-8") as stream:
                stream.write(name)
        except FileExistsError:
            return _read(mark, len(name))
        return name
    except OSError as reason:
        raise cannot_be_written(run_dir, reason) from None


def remove_mark(run_dir: Path, nonce: str) -> None:
    """Remove what tells disks apart in one start; the marks of another that begins meanwhile stay."""
    (run_dir / f"{MARK}{nonce}").unlink(missing_ok=True)


def remove_marks(run_dir: Path, but: str) -> None:
    """Remove what tells disks apart, but for what this start needs."""
    for mark in run_dir.glob(f"{MARK}*"):
        if mark.name != f"{MARK}{but}":
            mark.unlink(missing_ok=True)


def cannot_be_written(run_dir: Path, reason: OSError) -> StorageError:
    """Return the error of a run directory that takes no file."""
    return StorageError(f"{run_dir}: cannot be written ({reason.strerror or reason}); choose another run_dir")


def _read(mark: Path, length: int) -> str:
    """Return the name in a mark, once the process that makes it has written it."""
    deadline_s = time.monotonic() + time_limits.VISIBLE_FILE_S
    while len(name := mark.read_text(encoding="utf-8")) < length:
        if time.monotonic() > deadline_s:
            raise StorageError(
                f"{mark}: still empty after {time_limits.VISIBLE_FILE_S:g} s; put run_dir on storage that shows what "
                "another process has written, or on disks of the hosts' own"
            )
        time.sleep(time_limits.FILE_POLL_S)
    return name
