"""Files that one rank has ready for others, which see no disk of its own."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from skippipe.errors import CommunicationError
from skippipe.membership.shared_secret import own_secret
from skippipe.runtime.epochs.agreed_secret import agreed_secret
from skippipe.runtime.ranks.agreement import all_gather_json
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.files import replacing

if TYPE_CHECKING:
    from skippipe.membership.download import Source
    from skippipe.membership.exchange import Exchange


class PeerFiles(NamedTuple):
    """The exchange of this process, and how those of all ranks are reached."""

    exchange: "Exchange"
    places: tuple[tuple[str, int], ...]
    """Host and port of each rank's exchange."""
    silence_s: float
    """Without an answer for so long, a rank is lost."""

    def offer(self, name: str, make: Callable[[], bytes | memoryview]) -> None:
        """Have a content ready, which is made once somebody asks for it."""
        self.exchange.offer_made(name, make)

    def withdraw(self, names: Iterable[str]) -> None:
        """Have nothing of these names any more."""
        for name in names:
            self.exchange.withdraw(name)

    def fetch(self, rank: int, name: str, wanted: Callable[[], bool] = lambda: True) -> bytes:
        """Return what a rank has under a name, checked by its hash.

        Raises `CommunicationError` where it has nothing of that name, does not answer, or it is not `wanted` any more.
        """
        content = self.exchange.fetch(self.source(rank), name, self.silence_s, wanted)
        if content is None:
            raise CommunicationError(f"rank {rank} has no {name}")
        return content

    def fetch_file(
        self,
        rank: int,
        name: str,
        path: Path,
        wanted: Callable[[], bool] = lambda: True,
        check: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Put the same at a path, piece by piece: a file may be larger than the memory.

        `check` gets the SHA-256 of the file before that has its name, and may raise. Raises as `fetch` does, and
        `OSError` where the file cannot be written.
        """
        sha256: str | None = None
        with replacing(path, check=lambda: check(sha256 or "")) as file:
            sha256 = self.exchange.fetch_file(self.source(rank), name, file, self.silence_s, wanted)
            if sha256 is None:
                raise CommunicationError(f"rank {rank} has no {name}")

    def source(self, rank: int) -> "Source":
        """Return where a rank's exchange answers."""
        from skippipe.membership.download import Source

        return Source(*self.places[rank])


def mapped(path: Path) -> memoryview:
    """Return the content of a file that nobody changes, read from the disk as it is asked for."""
    with path.open("rb") as file:
        return memoryview(mmap(file.fileno(), 0, access=ACCESS_READ) if path.stat().st_size else b"")


@contextmanager
def open_peer_files(context: DistributedContext) -> Iterator[PeerFiles]:
    """Open an exchange on every rank while entered; all ranks enter together."""
    from skippipe.membership.addresses import own_address
    from skippipe.membership.exchange import Exchange
    from skippipe.membership.keys import run_keys

    secret = agreed_secret(context, Topic.FILES_KEY, own_secret())
    with closing(Exchange(run_keys(secret))) as exchange:

        def own() -> tuple[str, int]:
            return own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), exchange.port

        places = tuple((host, port) for host, port in all_gather_json(context, Topic.FILES_PLACE, own))
        yield PeerFiles(exchange, places, context.timeout_s)
