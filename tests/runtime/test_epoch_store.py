"""The store of an epoch: what torch puts into it is there, and no wait in it outlasts the epoch."""

import threading
import time

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore

from skippipe.runtime.epochs.epoch_store import EpochStore, host_store, reach_store


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


def test_members_meet_in_the_store_that_one_of_them_has_opened() -> None:
    hosted, port = host_store("127.0.0.1", 5.0)
    member = reach_store("127.0.0.1", port, 5.0, lambda: None)
    hosted.set("a", "1")
    assert member.get("a") == b"1"
