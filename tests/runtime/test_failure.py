"""When a rank dies, falls silent or fails by itself, the others stop soon and say which rank it was."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from random_plans import random_plan
from ranks import finish_ranks, start_ranks

WORLD_SIZE = 4
VICTIM = 2
TIMEOUT_S = 6.0
PLAN = random_plan(3, num_nodes=WORLD_SIZE, num_stages=3, route_length=3, num_microbatches=4)


def run_with_fault(
    folder: Path, mode: str, fault: Callable[[subprocess.Popen[str]], None]
) -> tuple[list[tuple[int, str]], float]:
    """Start all ranks, cause the fault once all have run an iteration; return results and seconds until the end."""
    PLAN.save(folder / "any.plan.json")
    ranks = start_ranks(folder, mode, WORLD_SIZE, TIMEOUT_S)
    deadline_s = time.monotonic() + 90
    while not all((folder / f"ready-{rank}").exists() for rank in range(WORLD_SIZE)):
        assert time.monotonic() < deadline_s, "the ranks did not start"
        time.sleep(0.05)
    fault(ranks[VICTIM])
    started_s = time.monotonic()
    survivors = [rank for index, rank in enumerate(ranks) if index != VICTIM]
    try:
        results = finish_ranks(survivors, timeout_s=60)
    finally:
        ranks[VICTIM].kill()
        _, errors = ranks[VICTIM].communicate()
    return [*results, (ranks[VICTIM].returncode, errors)], time.monotonic() - started_s


def message_of(errors: str) -> str:
    assert "Traceback" not in errors
    return next(line for line in errors.splitlines() if line.startswith("skippipe: error:"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_lost_rank_is_named_by_all_others(tmp_path: Path, fault: signal.Signals) -> None:
    results, elapsed_s = run_with_fault(tmp_path, "until-stopped", lambda rank: rank.send_signal(fault))
    assert elapsed_s < (8 if fault is signal.SIGKILL else TIMEOUT_S + 8)
    for code, errors in results[:-1]:
        assert code == 1, errors
        assert f"no sign of life from rank {VICTIM} (node-{VICTIM})" in message_of(errors)
        assert "iteration" in message_of(errors)


@pytest.mark.slow
def test_failure_of_its_own_is_told_to_all_others(tmp_path: Path) -> None:
    results, elapsed_s = run_with_fault(tmp_path, "faulty", lambda rank: rank.wait(timeout=60) and None)
    assert elapsed_s < 8
    for code, errors in results[:-1]:
        assert code == 1, errors
        assert f"rank {VICTIM} (node-{VICTIM}) stopped: ValueError: the optimizer met" in message_of(errors)
    assert "ValueError: the optimizer met" in results[-1][1]
