"""The benchmark of healing: when its bars are met, and what its table says."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "healing"


@pytest.fixture
def healing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("healing_bars")


def leg(minutes: float, at_three_quarters: float, peak_gib: float) -> dict[str, Any]:
    perplexity = {"1.0": 10.0, "0.75": at_three_quarters}
    measured = {"perplexity": perplexity, "exact": {"1.0": 0.5, "0.75": 0.25}}
    return {"steps": 24, "trained": 49152, "minutes": minutes, "peak_gib": peak_gib, **measured}


@pytest.mark.parametrize(
    ("name", "legs", "marks"),
    [
        ("adapters, dropout", [leg(9, 15.0, 2.0), leg(29, 14.0, 2.5)], "| yes | 2.50 GiB | yes |"),
        ("adapters, dropout", [leg(9, 15.0, 2.0), leg(31, 14.0, 3.5)], "| **no** | 3.50 GiB | **no** |"),
        ("all weights, dropout", [leg(9, 13.9, 4.0)], "| yes | 4.00 GiB |  |"),
    ],
)
def test_bars_are_of_time_and_memory(healing: ModuleType, name: str, legs: list[dict[str, Any]], marks: str) -> None:
    row = healing.judged({"name": name, "legs": legs, "before": leg(0, 40.0, 0.0)})
    line = "| " + " | ".join(cell(row) for cell in healing.columns().values()) + " |"
    assert marks in line
    assert f"40.00 (25%) → {legs[-1]['perplexity']['0.75']:.2f} (25%)" in line
