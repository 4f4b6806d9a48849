"""What an epoch leaves goes back: circles of objects, and what threads leave free in the allocator."""

import ctypes
import gc
import threading
import weakref

import psutil
import pytest

from skippipe.runtime.epochs.freed_memory import keep_loaded_objects, return_freed_memory

PIECES, PIECE_BYTES = 1_000, 60_000
"""Each below the size from which on an allocator maps memory for it alone (128 KiB in glibc)."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_lies_free_between_pieces_in_use_is_given_back() -> None:
    kept: list[bytes] = []

    def allocate() -> None:
        pieces = [b"x" * PIECE_BYTES for _ in range(PIECES)]
        kept.extend(pieces[::100])

    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held_bytes = psutil.Process().memory_info().rss
    return_freed_memory()
    assert held_bytes - psutil.Process().memory_info().rss > PIECES * PIECE_BYTES
    assert len(kept) == 2 * PIECES / 100


def test_circles_are_freed_and_what_was_loaded_before_is_left_alone() -> None:
    class Node:
        itself: "Node"

    def circle() -> "weakref.ref[Node]":
        node = Node()
        node.itself = node
        return weakref.ref(node)

    loaded = circle()
    keep_loaded_objects()
    made_later = circle()
    try:
        return_freed_memory()
        assert loaded() is not None
        assert made_later() is None
    finally:
        gc.unfreeze()
