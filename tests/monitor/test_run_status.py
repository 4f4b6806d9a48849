"""RUN/nodes.json and `skippipe top`: what is measured of nodes, how it is kept, and what a person sees of it."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console
from simulated_trace import simulated_trace

from skippipe.cli.main import main
from skippipe.errors import InputError, StorageError
from skippipe.monitor.live.node_board import WINDOW, NodeBoard, NodeFacts, NodeReading
from skippipe.monitor.live.run_status import LinkStatus, NodeStatus, RunStatus, read_status, write_status
from skippipe.monitor.live.run_view import run_view
from skippipe.monitor.live.status_sink import StatusSink
from skippipe.monitor.metrics import Metric, StepMetrics
from skippipe.monitor.run_events import MembershipChange
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import at_pace

GIB = 2**30
FACTS = {"ams-0": NodeFacts((0,), GIB), "nyc-0": NodeFacts((1,), 2 * GIB)}
LINK = LinkStatus(nodes=("ams-0", "nyc-0"), planned_s=0.08, message_bytes=10**6, pace=2.0)
STEP: StepMetrics = {
    Metric.STEP: 1,
    Metric.TRAIN_LOSS: 2.5,
    Metric.TOKENS_PER_S: 4096.0,
    Metric.ITERATION_S: 2.0,
    Metric.PREDICTED_S: 1.5,
}
LOSS = MembershipChange(
    epoch=1,
    lost={"nyc-1": "connection closed"},
    joined=("ams-0",),
    members=("ams-0", "nyc-0"),
    absent_stages=(),
    restored=(),
    reason="nyc-1 lost (connection closed)",
    step=6,
    interrupted=True,
    durations_s={"agreement": 0.25},
    total_s=1.5,
)


def node(name: str, pace: float | None = 1.0, device_bytes: int | None = None) -> NodeStatus:
    return NodeStatus(
        node=name,
        stages=(0, 2),
        busy_share=0.625,
        waiting_share=0.25,
        pace=pace,
        process_bytes=3 * GIB // 2,
        device_bytes=device_bytes,
        peak_bytes=GIB // 4,
        estimated_bytes=GIB // 2,
    )


def status(*nodes: NodeStatus, step: int = 7, links: tuple[LinkStatus, ...] = (), plan_hash: str = "") -> RunStatus:
    return RunStatus(
        written_at_s=time.time(),
        step=step,
        max_steps=9,
        loss=2.5,
        tokens_per_s=4096.0,
        iteration_s=2.0,
        predicted_s=1.5,
        plan_hash=plan_hash,
        nodes=nodes,
        links=links,
    )


def top(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that `skippipe top` prints without a terminal."""
    with pytest.raises(SystemExit) as stop:
        main(["top", str(run_dir), "--once"])
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


def words_of(lines: list[str], first: str) -> list[str]:
    """Return the words of the first line that begins with such."""
    return next(line for line in lines if line.startswith(f"{first} ")).split()


def test_top_prints_every_node_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "nyc-0[red]" + "x" * 100  # neither markup nor cut
    write_status(status(node("ams-0"), node(name, pace=2.5), links=(LINK,)), tmp_path)
    LOSS.append_to(tmp_path)
    lines = top(tmp_path, capsys)
    headline = words_of(lines, tmp_path.name)
    assert headline[1:7] == ["step", "7/9", "loss", "2.5000", "4,096", "tokens/s"]
    assert words_of(lines, "ams-0")[1:] == ["0,", "2", "joined", "62%", "25%", "1", "1.5", "0.25", "0.5"]
    assert words_of(lines, name)[3:] == ["in", "62%", "25%", "2.5", "1.5", "0.25", "0.5"]
    assert words_of(lines, "nyc-1")[1:] == ["-", "lost"]
    assert f"slowest: {name}, whose tasks take 2.5 times as long as planned; median 1.75" in lines
    assert words_of(lines, "ams-0 - nyc-0")[3:] == ["80.0", "160.0", "0.1", "0.05", "2"]
    assert lines[-1] == f"{LOSS.time}  {LOSS}"
    assert not any("\x1b" in line for line in lines)


def test_names_and_numbers_are_whole_on_a_terminal_of_80_columns() -> None:
    nodes = [node(f"netherlands-{index}", pace=12.345, device_bytes=123 * GIB) for index in range(2)]
    link = LINK.model_copy(update={"nodes": ("netherlands-0", "netherlands-1")})
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(run_view("three-regions", status(*nodes, links=(link,)), [LOSS], time.time()))
    lines = captured.get().splitlines()
    for wanted in ("netherlands-0", "netherlands-1", "netherlands-0 - netherlands-1", "nyc-1"):
        assert any(line.startswith(f"{wanted} ") for line in lines)
    assert words_of(lines, "netherlands-1")[3:] == ["in", "62%", "25%", "12.3", "1.5", "123", "0.25", "0.5"]
    assert words_of(lines, "netherlands-0 - netherlands-1")[3:] == ["80.0", "160.0", "0.1", "0.05", "2"]
    assert "…" not in captured.get()


def test_memory_of_gpus_has_a_column_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(status(node("ams-0"), node("nyc-0", pace=None, device_bytes=40 * GIB)), tmp_path)
    lines = top(tmp_path, capsys)
    assert words_of(lines, "ams-0")[3:] == ["in", "62%", "25%", "1", "1.5", "-", "0.25", "0.5"]
    assert words_of(lines, "nyc-0")[3:] == ["in", "62%", "25%", "-", "1.5", "40", "0.25", "0.5"]
    assert any(line.startswith("slowest: not known") for line in lines)


def test_links_that_the_run_has_not_measured_come_from_its_traces(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ("ams-0", "nyc-1")
    pace = {slow: 3.0, slow[::-1]: 3.0}
    plan.save(tmp_path / "plan.json")
    trace = simulated_trace(at_pace(plan, {}, pace), [5])
    write_trace(tmp_path, [*trace.tasks, *trace.waits])
    links = (LinkStatus(nodes=slow, planned_s=0.08, message_bytes=None, pace=None),)
    write_status(status(node("ams-0"), links=links, plan_hash=plan.hash), tmp_path)
    assert words_of(top(tmp_path, capsys), " - ".join(slow))[-5:] == ["80.0", "240.0", "-", "-", "3"]
    write_status(status(node("ams-0"), links=links, plan_hash="another"), tmp_path)
    assert words_of(top(tmp_path, capsys), " - ".join(slow))[-5:] == ["80.0", "-", "-", "-", "-"]


def write_trace(run_dir: Path, entries: list[NamedTuple]) -> None:
    (run_dir / "trace").mkdir()
    lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in entries)
    (run_dir / "trace" / "rank-0.jsonl").write_text(lines)


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, reason in (
        (tmp_path / "nowhere", "no such directory; give the run directory"),
        (tmp_path, "nodes.json: no such file; a run writes it from its first step on"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["top", str(folder)])
        assert (stop.value.code, reason in capsys.readouterr().err) == (2, True)
    (tmp_path / "nodes.json").write_text('{"format": "skippipe.nodes/1", "step": -1}')
    with pytest.raises(InputError, match=r"nodes\.json: "):
        read_status(tmp_path)


@pytest.mark.timeout(40)
@pytest.mark.parametrize("ends", ["finished", "interrupted"])
def test_a_terminal_shows_the_run_until_it_ends(tmp_path: Path, ends: str) -> None:
    shown, terminal = pty.openpty()
    arguments = [sys.executable, "-m", "skippipe", "top", str(tmp_path), "--interval", "0.1"]
    process = subprocess.Popen(arguments, stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm"})
    os.close(terminal)
    text = read_until(shown, "yet")
    write_status(status(node("ams-0")), tmp_path)
    text += read_until(shown, "ams-0")
    if ends == "interrupted":
        process.send_signal(signal.SIGINT)
    else:
        write_status(status(node("ams-0"), step=9), tmp_path)
    code = process.wait(20)
    text += read_until(shown, "slowest")
    os.close(shown)
    assert (code, ("finished" in text)) == (0, ends == "finished"), text


def read_until(terminal: int, word: str) -> str:
    """Return what a terminal shows until there is a word; the test's timeout ends the wait."""
    text = ""
    while word not in text:
        text += os.read(terminal, 1 << 16).decode()
    return text


def reading(busy_s: float, *, pace: float = 1.0, device_bytes: float = 0.0) -> NodeReading:
    return NodeReading(pace, busy_s, 0.5, 1.0, GIB, device_bytes)


def test_shares_are_those_of_the_last_steps(tmp_path: Path) -> None:
    board = NodeBoard()
    board.begin_plan("hash", FACTS, [LINK])
    for _ in range(WINDOW):  # forgotten
        board.observe(100.0, {"ams-0": reading(0.0)})
    for pace in (1.0, 9.0) * (WINDOW // 2):
        board.observe(2.0, {"ams-0": reading(1.0), "nyc-0": reading(2.5, pace=pace, device_bytes=GIB)})
    first, second = board.nodes
    assert (first.node, first.stages, first.busy_share, first.waiting_share) == ("ams-0", (0,), 0.5, 0.25)
    assert (first.device_bytes, first.estimated_bytes) == (None, GIB)
    assert (second.busy_share, second.pace) == (1.0, 5.0)
    board.link_paces = {LINK.nodes: 4.0}
    assert board.metrics() == {
        "nodes/ams-0/busy_share": 0.5,
        "nodes/ams-0/waiting_share": 0.25,
        "nodes/ams-0/memory_gib": 1.0,
        "nodes/ams-0/pace": 1.0,
        "nodes/nyc-0/busy_share": 1.0,
        "nodes/nyc-0/waiting_share": 0.0,
        "nodes/nyc-0/memory_gib": 1.0,
        "nodes/nyc-0/device_memory_gib": 1.0,
        "nodes/nyc-0/pace": 5.0,
        "nodes/slowest": "nyc-0",
        "links/ams-0 - nyc-0/pace": 4.0,
    }


def test_who_has_left_is_not_on_the_board_and_who_had_no_task_has_no_pace() -> None:
    board = NodeBoard()
    board.begin_plan("hash", {"ams-0": FACTS["ams-0"]}, ())
    board.observe(2.0, {"ams-0": reading(0.0, pace=0.0), "nyc-0": reading(1.0)})
    assert [(each.node, each.pace) for each in board.nodes] == [("ams-0", None)]
    assert "nodes/slowest" not in board.metrics()


def test_the_file_is_written_once_a_second_with_another_plan_and_at_the_end(tmp_path: Path) -> None:
    board = NodeBoard()
    sink, written = StatusSink(tmp_path, 5, board), []
    for step in (1, 2, 3, 4, 5):
        if step == 3:
            board.begin_plan("another", FACTS, ())
        sink.write(STEP | {Metric.STEP: step})
        written.append(written_step(tmp_path))
    assert written == [1, 1, 3, 3, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["nodes.json"]


def test_storage_that_fails_is_tried_again_at_the_next_step(tmp_path: Path) -> None:
    sink = StatusSink(tmp_path / "run", 4, NodeBoard())
    with pytest.raises(StorageError, match=r"nodes\.json: cannot be written \(No such file"):
        sink.write(STEP)
    (tmp_path / "run").mkdir()
    sink.write(STEP | {Metric.STEP: 2})
    assert written_step(tmp_path / "run") == 2


def written_step(run_dir: Path) -> int:
    found = read_status(run_dir)
    assert found is not None
    return found.step


@pytest.mark.parametrize(("num_nodes", "words"), [(4, "going on with 2 of 4 nodes,"), (None, "going on with 2 nodes,")])
def test_a_change_counts_the_nodes_of_the_plan(num_nodes: int | None, words: str) -> None:
    assert words in str(LOSS.model_copy(update={"num_nodes": num_nodes}))
