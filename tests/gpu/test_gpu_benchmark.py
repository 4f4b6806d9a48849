"""The command that a GPU machine runs: rehearsed on the CPU, and valid results wherever it is cut off."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from processes import ForkedProcess, preloaded, run_program

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
PROGRAM = """
import json, sys, time
print("something else", flush=True)
for count in range(int(sys.argv[1])):
    print(json.dumps({"figures": [1] * (count + 1)}), flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    return importlib.import_module("common.command")


@pytest.mark.parametrize(
    ("figures", "seconds", "code", "expected"),
    [
        ("2", "0", "0", {"figures": [1, 1]}),
        ("2", "60", "0", {"figures": [1, 1], "error": "ended after 1 s"}),
        ("3", "0", "1", {"figures": [1, 1, 1], "error": "exit code 1", "met": False}),
        ("0", "0", "1", {"error": "exit code 1", "met": False}),
    ],
)
def test_a_row_keeps_the_figures_that_it_had(
    command: ModuleType, figures: str, seconds: str, code: str, expected: dict[str, object]
) -> None:
    program = [sys.executable, "-c", PROGRAM, figures, seconds, code]
    result = command.own_process(program, {"name": "row"}, ROOT, 1.0)
    assert {key: result[key] for key in result.keys() & {"figures", "error", "met"}} == expected
    assert {"name", "date", "cpu", "commit"} <= result.keys()


@pytest.mark.extended
@pytest.mark.timeout(480)
def test_every_row_is_rehearsed(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    arguments = ["--rehearse", "--out", str(tmp_path / "out"), "--minutes", "7"]
    process = preloaded().Process(target=run_program, args=(FOLDER / "run.py", arguments, output, tmp_path))
    process.start()
    code, printed = ForkedProcess(process, output).finish(450)
    assert code == 0, printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in results] == [
        "device",
        "training",
        "memory",
        "generation",
        "ranks",
        "nccl",
        "convergence",
    ]
    assert not [row["error"] for row in results if "error" in row]
    assert all(row["figures"] for row in results)
    assert sum(row["row_s"] for row in results) < 360
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| convergence | normal, " in table
