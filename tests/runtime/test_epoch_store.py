"""The store of an epoch: what torch puts into it is there, and no wait in it outlasts the epoch."""

import threading
import time
from collections.abc import Iterator

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore

from skippipe.runtime.epochs.epoch_store import EpochStore, host_store, reach_store
from skippipe.runtime.ranks.arrival import ContactNotes, left_contacts


def test_torch_finds_in_it_what_was_put_there() -> None:
    own = EpochStore(HashStore(), 1.0, lambda: None)
    store = PrefixStore("group", own)  # as torch sees it: from C++
    store.set("a", "1")
    assert store.get("a") == b"1"
    assert store.add("count", 2) == 2
    assert store.check(["a"])
    assert not store.check(["b"])
    assert store.delete_key("a")
    assert not own.check(["group/a"])


class CountingStore(HashStore):
    """A store that counts questions."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = list[str]()

    def check(self, keys: list[str]) -> bool:
        """Count."""
        self.questions.append("check")
        return bool(super().check(keys))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Count."""
        self.questions.append("compare_set")
        return bytes(super().compare_set(key, expected, desired))


def test_a_value_that_is_waited_for_takes_one_question() -> None:
    far = CountingStore()
    store = EpochStore(far, 1.0, lambda: None)
    as_torch = PrefixStore("group", store)
    for value in ("1", ""):
        store.set("group/a", value)
        as_torch.wait(["a"])
        assert as_torch.get("a") == value.encode()
    assert far.questions == ["compare_set"] * 2
    store.wait(["group/a"])
    store.set("group/a", "2")
    assert as_torch.get("a") == b"2"  # not what it was when it was waited for
    assert store.multi_get(["group/a", "group/a"]) == [b"2", b"2"]


def test_a_wait_ends_with_the_epoch() -> None:
    ended: list[str] = []
    store = EpochStore(HashStore(), 60.0, lambda: ended[0] if ended else None)
    threading.Timer(0.05, lambda: ended.append("node-1 lost")).start()
    start_s = time.monotonic()
    with pytest.raises(RuntimeError, match="node-1 lost"):
        store.get("never")
    assert time.monotonic() - start_s < 5


def test_a_wait_ends_with_its_time() -> None:
    store = EpochStore(HashStore(), 0.05, lambda: None)
    with pytest.raises(RuntimeError, match=r"nobody has put never into the store within 0.05 s"):
        store.wait(["never"])


class SilentStore(HashStore):
    """A store on a host that is frozen: whoever asks it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.woken = threading.Event()

    def check(self, keys: list[str]) -> bool:
        """Give no answer."""
        return self.woken.wait()

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Give no answer."""
        return bytes(self.woken.wait())

    def add(self, key: str, amount: int) -> int:
        """Give no answer."""
        return int(self.woken.wait())


@pytest.fixture
def silent() -> Iterator[SilentStore]:
    """A store that answers once the test is over."""
    store = SilentStore()
    yield store
    store.woken.set()


def test_a_question_to_a_silent_host_ends_with_the_epoch(silent: SilentStore) -> None:
    ended: list[str] = []
    store = EpochStore(silent, 60.0, lambda: ended[0] if ended else None)
    threading.Timer(0.05, lambda: ended.append("node-0 lost (no sign of life)")).start()
    with pytest.raises(RuntimeError, match="node-0 lost"):
        store.check(["a"])


def test_who_still_asks_it_in_a_later_epoch_is_let_go(silent: SilentStore) -> None:
    store = EpochStore(silent, 60.0, lambda: None)
    threading.Timer(0.05, store.end).start()
    with pytest.raises(RuntimeError, match="its epoch is over"):
        store.get("a")


def test_nobody_waits_to_leave_contacts_with_a_silent_host(silent: SilentStore) -> None:
    notes = ContactNotes(silent)
    notes.leave("first")
    notes.leave("second")
    run = HashStore()
    ContactNotes(run).leave("first")
    while not left_contacts(run):
        time.sleep(0.001)
    assert left_contacts(run) == ["first"]


def test_members_meet_in_the_store_that_one_of_them_has_opened() -> None:
    hosted, port = host_store("127.0.0.1", 5.0)
    member = reach_store("127.0.0.1", port, 5.0, lambda: None)
    hosted.set("a", "1")
    assert member.get("a") == b"1"
