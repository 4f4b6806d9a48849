"""What a rank that stops asks the others before it ends, and for how long."""

import time

import pytest
from torch._C._distributed_c10d import HashStore

from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.failure_board import FailureBoard

LAST_WORDS_S = 0.2


def test_all_readings_of_a_silent_host_share_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "LAST_WORDS_S", LAST_WORDS_S)
    board = FailureBoard(HashStore(), 0, [f"node-{rank}" for rank in range(4)])
    board.report("waited", [2])
    start_s = time.monotonic()
    cause = board.root_cause([2])
    table = board.table()
    board.leave()
    assert time.monotonic() - start_s < 2 * LAST_WORDS_S  # one for reading, none for those known to be silent
    assert cause == "no sign of life from rank 2 (node-2)"
    assert table.count("no answer") == 3
