"""What Weights & Biases has of a run: every step once, whatever ended its own process, and the files that hold it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from training_runs import make_experiment

from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import MetricsWriter
from skippipe.monitor.run_events import MembershipChange
from skippipe.monitor.wandb_file import BLOCK_BYTES, MAGIC, PIECE, _records, recorded_steps
from skippipe.monitor.wandb_run import WandbRun


@pytest.mark.usefixtures("own_wandb")
def test_steps_that_a_signal_to_all_processes_took_are_filled_in(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, logging={"wandb": {"mode": "offline"}})
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    recording = WandbRun(experiment, tmp_path, "some-id")
    change = MembershipChange(
        epoch=1,
        lost={"node-1": "connection closed"},
        joined=(),
        members=("node-0", "node-2"),
        absent_stages=(),
        restored=(),
        reason="node-1 lost (connection closed)",
        step=3,
        interrupted=True,
        durations_s={"agreement": 0.25},
        total_s=1.5,
    )
    for step in (1, 2, 3, 4):
        if step == 4:
            change.append_to(tmp_path)
        metrics.write({Metric.STEP: step, Metric.TRAIN_LOSS: 2.5})
        recording.write({Metric.STEP: step, Metric.TRAIN_LOSS: 2.5})
        if step == 2:
            end_recording_processes()
    recording.close()
    assert steps_of_finished(tmp_path) == {1, 2, 3, 4}
    (path,) = (tmp_path / "wandb").rglob("membership_*.table.json")
    table = json.loads(path.read_text())
    (row,) = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    assert (row["lost"], row["next_step"], row["members"]) == ("node-1 (connection closed)", 4, 2)
    assert (row["agreement_s"], row["groups_s"], row["total_s"]) == (0.25, 0.0, 1.5)

    metrics.write({Metric.STEP: 5, Metric.TRAIN_LOSS: 2.5})  # a start that was killed before W&B had it
    recording = WandbRun(experiment, tmp_path, "some-id")
    recording.write({Metric.STEP: 6, Metric.TRAIN_LOSS: 2.5})
    end_recording_processes()  # before the end: what was recorded is asked for by its files
    metrics.write({Metric.STEP: 6, Metric.TRAIN_LOSS: 2.5})
    recording.close()
    assert steps_of_finished(tmp_path) == {1, 2, 3, 4, 5, 6}
    written = [len(list(_histories(path))) for path in sorted((tmp_path / "wandb").glob("offline-*/*.wandb"))]
    assert sum(written) == 6


def steps_of_finished(folder: Path) -> set[int]:
    """Return what is recorded once wandb's process has ended, as at the end of a run: until then it may still write."""
    import wandb

    wandb.teardown()
    return recorded_steps(folder / "wandb", "some-id")


def _histories(path: Path) -> Iterator[bytes]:
    from wandb.proto.wandb_internal_pb2 import Record

    return (content for content in _records(path.read_bytes()) if Record.FromString(content).HasField("history"))


def end_recording_processes() -> None:
    """Do to the processes of wandb what SLURM does to all of a job at its time limit."""
    names = {process: process.name() for process in psutil.Process().children(recursive=True)}
    ended = [process for process, name in names.items() if name.startswith("wandb")]
    for process in ended:
        process.send_signal(signal.SIGTERM)
    assert ended
    psutil.wait_procs([process for process in ended if names[process] == "wandb-core"], timeout=10)


def test_a_file_of_wandb_is_read_over_blocks_and_to_its_cut_end(tmp_path: Path) -> None:
    folder = tmp_path / "run-20260101_000000-id"
    folder.mkdir()
    contents = [record(step, "x" * 20_000) for step in range(1, 6)]
    (folder / "run-id.wandb").write_bytes(MAGIC + b"\0\0\0" + log_of(contents))
    assert recorded_steps(tmp_path, "id") == {1, 2, 3, 4, 5}
    (folder / "run-id.wandb").write_bytes((MAGIC + b"\0\0\0" + log_of(contents))[:-10])
    assert recorded_steps(tmp_path, "id") == {1, 2, 3, 4}
    assert recorded_steps(tmp_path, "other") == set()


def record(step: int, text: str) -> bytes:
    from wandb.proto.wandb_internal_pb2 import HistoryItem, HistoryRecord, Record

    items = {"_step": str(step), "text": f'"{text}"'}
    history = [HistoryItem(nested_key=[key], value_json=value) for key, value in items.items()]
    content: bytes = Record(history=HistoryRecord(item=history)).SerializeToString()
    return content


def log_of(contents: list[bytes]) -> bytes:
    """Write records as the format says: none of their pieces crosses the end of a block."""
    written = bytearray(MAGIC + b"\0\0\0")
    for content in contents:
        first, rest = True, content
        while first or rest:
            left = BLOCK_BYTES - len(written) % BLOCK_BYTES
            if left < PIECE.size:
                written += bytes(left)
                continue
            piece, rest = rest[: left - PIECE.size], rest[left - PIECE.size :]
            kind = (1 if not rest else 2) if first else (4 if not rest else 3)
            written += PIECE.pack(0, len(piece), kind) + piece
            first = False
    return bytes(written[7:])
