"""Who trains in a run directory: RUN/owner.json, so that two starts never write into one run.

The owner is the process of rank 0, and on each further disk the first rank that sees it. While it lives it touches the
file again and again, and at every save it looks whether the file is still its own. A start that finds another owner
asks the machine whether that process is alive where it can, that is on the same machine; elsewhere it watches for a
while whether the file is touched. Clocks of different machines are never compared.
"""

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

import psutil
from filelock import FileLock

from skippipe.checkpoint.disks.run_disks import ONE_DISK, RunDisks, cannot_be_written, open_run_disks, remove_mark
from skippipe.errors import InputError, StorageError
from skippipe.runtime.ranks.agreement import on_all_ranks
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.training.run_directory import check_kinds
from skippipe_scheduler.files import PositiveCount, StrictModel, parse, read_json, write_atomically

logger = logging.getLogger(__name__)

OWNER_FILE: Final = "owner.json"
LOCK_FILE: Final = ".owner.lock"
BEAT_S = 5.0
"""Seconds between two touches of the file."""
WATCH_S = 30.0
"""Seconds without a touch after which an owner on another machine is gone: so many beats are late on no storage."""
LOOK_S = 0.5
"""Seconds between two looks at the file of another owner."""
SAME_START_S = 2.0
"""Two start times of one process differ by less, whatever was done to the clock; a number is not reused so soon."""


class Owner(StrictModel):
    """What owner.json holds."""

    format: Literal["skippipe.owner/1"] = "skippipe.owner/1"
    host: str
    process: PositiveCount
    since: str
    """When it began here, in UTC."""
    machine: str
    """What is equal for processes whose numbers mean the same: one boot of one machine, one namespace of numbers."""
    started_s: float
    """When the process began, in seconds of its machine's clock."""
    nonce: str
    """Different for every start."""

    def __str__(self) -> str:
        """Name it for people."""
        return f"process {self.process} on {self.host}, since {self.since}"

    @classmethod
    def here(cls) -> "Owner":
        """Return this process as an owner from now on."""
        return cls(
            host=platform.node() or "localhost",
            process=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            machine=_machine(),
            started_s=psutil.Process().create_time(),
            nonce=uuid.uuid4().hex,
        )

    def is_process_of(self, other: "Owner") -> bool:
        """Whether both are one process."""
        near = abs(self.started_s - other.started_s) < SAME_START_S
        return near and (self.machine, self.process) == (other.machine, other.process)

    @property
    def alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be seen from here."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.process)
            near: bool = abs(process.create_time() - self.started_s) < SAME_START_S
            return near and bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


class RunOwner:
    """Makes this process the owner of a run directory, from `claim` to `close`; called on one rank of each disk."""

    def __init__(self, run_dir: Path, disks: RunDisks = ONE_DISK) -> None:
        self._run_dir = run_dir
        self.disks = disks
        self._own: Owner | None = None
        self._is_outer = False
        self._lost_to: Owner | None = None
        self._ended = threading.Event()

    def claim(self) -> None:
        """Become the owner; raise `InputError` naming the present one where it lives.

        Raises what `check_kinds` raises, and `StorageError` where the directory cannot be written.
        """
        check_kinds(self._run_dir)
        own = Owner.here()
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            while self._own is None:
                before = _touched(self._run_dir)
                found = read_owner(self._run_dir)
                if found is not None and found.is_process_of(own):
                    self._own = found
                    break
                if before is not None:
                    self._wait_until_gone(found, before)
                with FileLock(self._run_dir / LOCK_FILE):
                    if _touched(self._run_dir) == before:
                        self._write_down(own)
        except OSError as reason:
            raise cannot_be_written(self._run_dir, reason) from None
        self._start_beating()

    def take_over(self) -> None:
        """Become the owner in place of one that the run's members have found lost; nothing where this one owns it."""
        if self._own is not None:
            return
        self._write_down(Owner.here())
        self._start_beating()

    def check(self) -> None:
        """Raise `StorageError` where another start has taken the run over, having taken this process for dead."""
        if self._own is None:
            return
        found = read_owner(self._run_dir)
        if found is None:  # removed by hand
            _write(self._run_dir, self._own)
        elif found.nonce != self._own.nonce:
            self._lost_to = found
        self.check_last_beat()

    def check_last_beat(self) -> None:
        """Do what `check` does by what was last seen, without a look at the file."""
        if self._lost_to is not None:
            raise StorageError(
                f"{self._run_dir}: taken over by {self._lost_to}, which heard nothing of this process for "
                f"{WATCH_S:g} s; this start ends and writes nothing more"
            )

    def close(self) -> None:
        """Give the directory free; an empty one is removed."""
        self._ended.set()
        if not self._is_outer:
            return
        with suppress(OSError):
            found = read_owner(self._run_dir)
            if found is not None and self._own is not None and found.nonce == self._own.nonce:
                (self._run_dir / OWNER_FILE).unlink()
                remove_mark(self._run_dir, self.disks.nonce)
                if {path.name for path in self._run_dir.iterdir()} <= {LOCK_FILE}:
                    (self._run_dir / LOCK_FILE).unlink(missing_ok=True)
                    self._run_dir.rmdir()

    def _wait_until_gone(self, found: Owner | None, before: tuple[int, int]) -> None:
        """Return when the owner is gone; raise `InputError` where it lives."""
        who = str(found) if found is not None else "a process that cannot be named: owner.json is damaged"
        alive = found.alive if found is not None else None
        if alive is None:
            logger.info("%s: in use by %s; waiting at most %g s for a sign of life", self._run_dir, who, WATCH_S)
            deadline_s = time.monotonic() + WATCH_S
            while alive is None:
                if _touched(self._run_dir) != before:
                    alive = _touched(self._run_dir) is not None
                elif time.monotonic() > deadline_s:
                    alive = False
                else:
                    time.sleep(LOOK_S)
        if alive:
            raise InputError(
                f"{self._run_dir}: in use by {who}; wait until it has ended, end it, or choose another run_dir"
            )
        logger.info("%s: was in use by %s, which is gone; going on in its place", self._run_dir, who)

    def _write_down(self, own: Owner) -> None:
        _write(self._run_dir, own)
        self._own, self._is_outer = own, True

    def _start_beating(self) -> None:
        threading.Thread(target=self._beat, name="run-owner", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):
                found = read_owner(self._run_dir)
                if found is not None and self._own is not None and found.nonce != self._own.nonce:
                    self._lost_to = found
                    return
                os.utime(self._run_dir / OWNER_FILE)


@contextmanager
def owned_run_directory(run_dir: Path, context: DistributedContext) -> Iterator[RunOwner]:
    """Own a run directory, on each disk that has it, while entered; all ranks enter together. It is made where missing.

    Within a start that owns it already, nothing changes. Raises on every rank what `RunOwner.claim` raises on any.
    """
    with open_run_disks(run_dir, context) as disks:
        owner = RunOwner(run_dir, disks)
        claim = owner.claim if disks.is_first else lambda: None
        on_all_ranks(context, Topic.OWNER, claim, limit_s=context.timeout_s + 2 * WATCH_S)
        try:
            yield owner
        finally:
            owner.close()


def read_owner(run_dir: Path) -> Owner | None:
    """Return the owner of a run directory; None where there is none, or where its file is damaged."""
    path = run_dir / OWNER_FILE
    try:
        return parse(Owner, read_json(path, InputError), str(path), InputError)
    except InputError:
        return None


def _write(run_dir: Path, owner: Owner) -> None:
    write_atomically(run_dir / OWNER_FILE, owner.model_dump_json(indent=1) + "\n")


def _touched(run_dir: Path) -> tuple[int, int] | None:
    """Return what changes with every touch of the file; None where there is none."""
    try:
        status = (run_dir / OWNER_FILE).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _machine() -> str:
    """Return what tells apart processes whose numbers do not mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()
