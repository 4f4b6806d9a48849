"""When a rank dies, falls silent or fails by itself, the others stop soon and say which rank it was."""

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ForkedProcess
from random_plans import random_plan
from ranks import finish_ranks, start_ranks

WORLD_SIZE = 4
VICTIM = 2
TIMEOUT_S = 6.0
PLAN = random_plan(3, num_nodes=WORLD_SIZE, num_stages=3, route_length=3, num_microbatches=4)


def run_with_fault(
    folder: Path, mode: str, cause: Callable[[ForkedProcess], None], victim: int = VICTIM, options: object = None
) -> tuple[list[str], str, float]:
    """Start all ranks and cause the fault once all have run an iteration.

    Returns the survivors' messages, the victim's standard error, and seconds until the survivors ended.
    """
    PLAN.save(folder / "any.plan.json")
    (folder / "any.options.json").write_text(json.dumps(options or {}))
    ranks = start_ranks(folder, mode, WORLD_SIZE, TIMEOUT_S)
    deadline_s = time.monotonic() + 90
    while not all((folder / f"ready-{rank}").exists() for rank in range(WORLD_SIZE)):
        assert time.monotonic() < deadline_s, "the ranks did not start"
        time.sleep(0.05)
    cause(ranks[victim])
    started_s = time.monotonic()
    results = finish_ranks([rank for index, rank in enumerate(ranks) if index != victim], timeout_s=60)
    elapsed_s = time.monotonic() - started_s
    assert [code for code, _ in results] == [1] * (WORLD_SIZE - 1), results
    _, victim_errors = ranks[victim].finish(0.5)
    return [message_of(errors) for _, errors in results], victim_errors, elapsed_s


def message_of(errors: str) -> str:
    assert "Traceback" not in errors
    return next(line for line in errors.splitlines() if line.startswith("skippipe: error:"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (signal.SIGKILL, {}),
        (signal.SIGSTOP, {}),
        (signal.SIGKILL, {"comm": {"executor": "dynamic"}}),
        (signal.SIGSTOP, {"comm": {"executor": "dynamic"}}),
        (signal.SIGKILL, {"matching": "order"}),
    ],
    ids=["killed", "silent", "killed-dynamic", "silent-dynamic", "killed-ordered"],
)
def test_lost_rank_is_named_by_all_others(tmp_path: Path, fault: signal.Signals, options: object) -> None:
    messages, _, elapsed_s = run_with_fault(tmp_path, "until-stopped", lambda rank: rank.signal(fault), options=options)
    assert elapsed_s < (8 if fault is signal.SIGKILL else TIMEOUT_S + 8)
    for message in messages:
        assert f"no sign of life from rank {VICTIM} (node-{VICTIM})" in message
        assert "in vain" in message
        assert "[step " in message
    printed = (tmp_path / "errors-0.txt").read_text()
    table = printed[printed.index("who waits for whom:") :].splitlines()[1 : WORLD_SIZE + 1]
    for rank, line in enumerate(table):
        assert f"rank {rank} (node-{rank})" in line
        assert ("no answer" if rank == VICTIM else "waits for ") in line
    waits_for_victim = [line for line in table if line.endswith(f"waits for rank {VICTIM}")]
    assert any(re.search(r"step \d+, \w+( of microbatch \d+ hop \d+)?", line) for line in waits_for_victim), table
    assert "who waits for whom" not in (tmp_path / "errors-1.txt").read_text()


@pytest.mark.slow
def test_failure_of_its_own_is_told_to_all_others(tmp_path: Path) -> None:
    messages, errors, elapsed_s = run_with_fault(tmp_path, "faulty", lambda rank: rank.process.join(60))
    assert elapsed_s < 8
    for message in messages:
        assert f"rank {VICTIM} (node-{VICTIM}) stopped: ValueError: the optimizer met" in message
    assert "ValueError: the optimizer met" in errors


@pytest.mark.slow
def test_loss_of_the_rank_that_holds_the_store_ends_all_others(tmp_path: Path) -> None:
    messages, _, elapsed_s = run_with_fault(
        tmp_path, "until-stopped", lambda rank: rank.signal(signal.SIGKILL), victim=0
    )
    assert elapsed_s < 8
    assert all("the store is gone too" in message for message in messages)
