"""The runtime's benchmark: a race of real processes, equal work, and rows that say why they are left out."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from processes import ForkedProcess, preloaded, run_program

FOLDER = Path(__file__).parents[2] / "benchmarks" / "runtime"


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("race")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("network")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("probe")


def run(out: Path, *arguments: str) -> tuple[int | None, str]:
    """Return exit code and output of the benchmark."""
    output = out / "output.txt"
    command = ["--quick", "--out", str(out), *arguments]
    process = preloaded().Process(target=run_program, args=(FOLDER / "run.py", command, output, out))
    process.start()
    return ForkedProcess(process, output).finish(170)


@pytest.mark.extended
def test_all_contenders_race_on_two_processes(tmp_path: Path) -> None:
    code, printed = run(tmp_path, "--only", "local links, 2")
    assert code == 0, printed
    result = json.loads((tmp_path / "results.json").read_text())[0]
    assert "error" not in result, printed
    seconds = result["details"]["step_s"]
    assert {"ours", "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"} <= set(seconds)
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    fastest = min((name for name in seconds if name != "ours"), key=lambda name: sum(seconds[name]))
    ratios = [rival / own for own, rival in zip(seconds["ours"], seconds[fastest], strict=True)]
    assert result["figures"][0]["value"] == pytest.approx(sum(ratios) / 2)
    assert result["met"] is (result["figures"][0]["value"] >= 1.0)
    assert "| local links, 2 processes |" in printed


def test_rows_on_a_network_are_left_out_without_one(tmp_path: Path) -> None:
    code, printed = run(tmp_path, "--only", "shaped network, 4")
    assert code == 0
    assert "shaped network, 4 nodes: left out, needs --netlab FOLDER" in printed
    assert not (tmp_path / "results.json").exists()
    _, printed = run(tmp_path, "--only", "shaped network, 4", "--netlab", str(tmp_path))
    assert f"{tmp_path} has no netlab_tun.py" in printed


def test_unequal_work_is_refused(race: ModuleType) -> None:
    class Crew:
        def __init__(self, name: str, losses: list[float]) -> None:
            self.name, self.losses = name, losses

    alike = [Crew("one", [3.0, 2.0]), Crew("other", [3.0, 2.0002])]
    assert race.check_equal_work(alike) == pytest.approx(1e-4)
    with pytest.raises(RuntimeError, match=r"unequal work: step 2: loss 2\.0 of one, 2\.1 of other"):
        race.check_equal_work([alike[0], Crew("other", [3.0, 2.1])])
    with pytest.raises(RuntimeError, match="other reports 1 losses, one 2"):
        race.check_equal_work([alike[0], Crew("other", [3.0])])


def test_ratios_are_taken_within_a_round(race: ModuleType) -> None:
    measured = race.Race({"ours": [1.0, 2.0, 4.0], "a": [1.5, 2.0, 8.0], "b": [9.0, 9.0, 1.0]})
    assert measured.fastest(["a", "b"]) == "a"
    assert measured.ratios("ours", "a") == [1.0, 1.5, 2.0]


def test_what_tcp_loses_at_the_start_counts_as_latency(probe: ModuleType) -> None:
    left = {"alone_s": [1.0, 2.0, 3.0], "stream_s": [4.0, 4.0, 4.0]}
    arrived = {"alone_s": [1.09, 2.07, 3.07], "stream_s": [4.08, 4.13, 4.18]}
    assert probe.link_costs(left, arrived, size_bytes=125_000) == pytest.approx((20.0, 20.0))


def test_layout_of_a_network(network: ModuleType) -> None:
    layout = network.SIX_NODES
    lines = layout.lines().splitlines()
    assert len(lines) == 30
    assert "0 1 200 2" in lines
    assert "5 0 30 40" in lines
    examples = layout.examples()
    assert set(examples) == set(layout.wires)
    assert all(layout.wire(*pair) == layout.wires[ends] for ends, pair in examples.items())
    links = layout.cluster_links({("a", "b"): network.Wire(47.0, 20.4)})
    assert links["between_regions"] == [{"regions": ["a", "b"], "latency_ms": 20.4, "gbit_per_s": 0.047}]
