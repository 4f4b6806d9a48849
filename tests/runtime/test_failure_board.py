"""What a rank that stops asks the others before it ends, and for how long."""

import time

import pytest
from torch._C._distributed_c10d import HashStore

from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.failure_board import FailureBoard

LAST_WORDS_S = 0.2


@pytest.mark.parametrize("with_table", [True, False])
def test_all_readings_of_a_silent_host_share_one_time_limit(monkeypatch: pytest.MonkeyPatch, with_table: bool) -> None:
    monkeypatch.setattr(time_limits, "LAST_WORDS_S", LAST_WORDS_S)
    board = FailureBoard(HashStore(), 0, [f"node-{rank}" for rank in range(4)])
    board.report("waited", [2])
    start_s = time.monotonic()
    cause = board.root_cause([2])
    table = board.table() if with_table else ""
    board.leave()
    assert time.monotonic() - start_s < 2 * LAST_WORDS_S  # one for reading, none for those that were silent meanwhile
    assert cause == "no sign of life from rank 2 (node-2)"
    assert table.count("no answer") == (3 if with_table else 0)
