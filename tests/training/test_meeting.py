"""Processes without a launcher meet at an address of one of them: `skippipe collect --listen` and `--join`."""

import json
from pathlib import Path

import pytest
from processes import ForkedProcess, free_port, preloaded, run_skippipe
from torch._C._distributed_c10d import HashStore

from skippipe.training.joining.meeting import next_free_rank

ALIKE = {"LOCAL_RANK": "0"}


def collecting(folder: Path, *options: str) -> ForkedProcess:
    """Start the command in a folder where a run has recorded one step."""
    run_dir = folder / "runs" / "one"
    run_dir.mkdir(parents=True, exist_ok=True)
    step = len(folder.name)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": step, "train/loss": 1.0}) + "\n")
    output = folder / "output.txt"
    arguments = ["collect", "runs/one", "--timeout-s", "60", *options]
    process = preloaded().Process(target=run_skippipe, args=(arguments, output, ALIKE, folder))
    process.start()
    return ForkedProcess(process, output)


@pytest.mark.timeout(120)
def test_a_run_is_collected_without_a_launcher(tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()}"
    listening = collecting(tmp_path / "a", "--listen", place, "--processes", "3")
    joining = [collecting(tmp_path / name, "--join", place) for name in ("bb", "ccc")]
    for process in (listening, *joining):
        code, output = process.finish()
        assert code == 0, output
    assert "runs/one: whole here, no checkpoint" in listening.output.read_text()
    lines = (tmp_path / "a" / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_one_host_listens_and_the_others_join(tmp_path: Path) -> None:
    code, output = collecting(tmp_path / "a", "--listen", "10.0.0.1:1", "--join", "10.0.0.1:1").finish()
    assert (code, "--listen and --join exclude each other" in output) == (2, True)
    code, output = collecting(tmp_path / "a", "--listen", "10.0.0.1").finish()
    assert (code, "'10.0.0.1' is not HOST:PORT" in output) == (2, True)


def test_each_process_has_a_rank_of_its_own() -> None:
    store = HashStore()
    assert [next_free_rank(store, 3) for _ in range(3)] == [1, 2, None]
