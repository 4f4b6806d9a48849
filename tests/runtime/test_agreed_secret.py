"""How the ranks of a start come to one secret, and what of it somebody can read who sees their store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore

from skippipe.errors import ConfigError, SkipPipeError
from skippipe.membership.epoch import Member
from skippipe.membership.live_run import Contacts
from skippipe.membership.shared_secret import derived_key
from skippipe.runtime.epochs.agreed_secret import agreed_secret
from skippipe.runtime.ranks.arrival import ContactNotes
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic

SECRET, OTHER = "the secret of all hosts", "another secret of a host"


class OpenStore(HashStore):
    """A store whose values can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []

    def set(self, key: str, value: str) -> None:
        """Keep what is put there."""
        self.values.append(value)
        super().set(key, value)


def agreed(*own: str | None) -> tuple[list[str | SkipPipeError], OpenStore]:
    """Return what ranks with these secrets agree on, or what they raise, and their store."""
    store = OpenStore()

    def run(rank: int) -> str | SkipPipeError:
        context = DistributedContext(rank, len(own), rank, 10.0, store)
        try:
            return agreed_secret(context, Topic.MEMBERSHIP_KEY, own[rank])
        except SkipPipeError as error:
            return error

    with ThreadPoolExecutor(len(own)) as pool:
        return list(pool.map(run, range(len(own)))), store


def test_the_secret_of_all_hosts_never_comes_into_the_store() -> None:
    secrets, store = agreed(SECRET, SECRET)
    assert secrets == [SECRET, SECRET]
    here = Member(name="node-0", host="127.0.0.1", port=1, incarnation="0" * 32)
    notes = ContactNotes(store)
    notes.leave(Contacts(secret=SECRET, members=(here,)).as_note(SECRET))
    assert notes._leaving is not None
    notes._leaving.join()
    written = "".join(store.values)
    assert "node-0" in written
    assert SECRET not in written
    assert derived_key(SECRET, "skippipe.membership/1").hex() not in written


def test_without_one_rank_0_makes_a_secret_for_each_start() -> None:
    (first, second), store = agreed(None, None)
    assert isinstance(first, str)
    assert first == second != agreed(None, None)[0][0]
    assert first in "".join(store.values)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ((SECRET, OTHER), "rank 1 has another SKIPPIPE_SECRET than rank 0; set the same one on all hosts, or none"),
        ((SECRET, SECRET, None), "rank 0 has SKIPPIPE_SECRET, rank 2 has none; set the same one on all hosts, or none"),
        ((None, SECRET), "rank 1 has SKIPPIPE_SECRET, rank 0 has none; set the same one on all hosts, or none"),
    ],
)
def test_hosts_that_differ_are_told_which(own: tuple[str | None, ...], words: str) -> None:
    errors, _ = agreed(*own)
    assert [str(error) for error in errors] == [words] * len(own)
    assert all(isinstance(error, ConfigError) for error in errors)


def test_a_secret_that_can_be_guessed_is_refused() -> None:
    errors, _ = agreed("short", "short")
    assert all("5 characters, at least 16" in str(error) for error in errors)
