"""The benchmark on a pretrained model: a quick run from import to table, found again; the bar."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

FOLDER = Path(__file__).parents[2] / "benchmarks" / "skip_tolerance"
POLICIES = ("random", "exit")


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("pretrained")
    monkeypatch.setattr(module, "POLICIES", POLICIES)
    return module


@pytest.mark.extended
def test_quick_run_is_imported_trained_and_evaluated_once(pretrained: ModuleType, tmp_path: Path) -> None:
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(pretrained.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    before, after = (json.loads((tmp_path / "work" / f"{name}-512.json").read_text()) for name in ("before", "after"))
    assert [(result["checkpoint"], result["tokens"]) for result in (before, after)] == [
        ("step-00000000", 512),
        ("step-00000002", 512),
    ]
    results = {row["name"]: row for row in json.loads((tmp_path / "out" / "pretrained.json").read_text())}
    for policy in POLICIES:
        rows = {row["keep"]: row for row in after["results"] if row["policy"] == policy}
        assert sorted(rows) == [0.5, 0.6, 0.75, 0.9, 1.0]
        assert results[policy]["after"] == {str(keep): row["perplexity"] for keep, row in rows.items()}
        assert rows[1.0]["perplexity"] == after["results"][0]["perplexity"]
        assert rows[0.75]["share_computed"] == pytest.approx(0.75)
    assert all(text in (tmp_path / "work" / "pretrained.html").read_text() for text in pretrained.MODELS.values())
    assert "random, as imported" in (tmp_path / "out" / "pretrained.svg").read_text()
    written = (tmp_path / "work" / "after-512.json").stat().st_mtime_ns
    assert CliRunner().invoke(pretrained.main, arguments, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "work" / "after-512.json").stat().st_mtime_ns == written
    other = CliRunner().invoke(pretrained.main, [*arguments[1:], "--steps", "3"])
    assert other.exit_code == 1
    assert "made with other settings" in other.output


@pytest.mark.parametrize(("after", "met"), [(12.0, True), (14.0, False)])
def test_the_bar_is_a_third_of_the_cost(pretrained: ModuleType, tmp_path: Path, after: float, met: bool) -> None:
    def evaluation(at_three_quarters: float) -> dict[str, object]:
        perplexities = {1.0: 10.0, 0.9: 11.0, 0.75: at_three_quarters, 0.6: 5000.0, 0.5: 6000.0}
        rows = [
            {"policy": policy, "keep": keep, "share_computed": keep, "perplexity": value}
            for policy in POLICIES
            for keep, value in perplexities.items()
        ]
        return {"tokens": 8192, "results": rows}

    facts = {"steps": 120, "trained": 491520, "minutes": 17.4, "quick": False}
    pretrained.record(tmp_path, evaluation(19.0), evaluation(after), facts)
    page = (tmp_path / "pretrained.md").read_text()
    costs = {True: "+90.0% → +20.0% | yes", False: "+90.0% → +40.0% | **no**"}
    assert f"| random | 10.00 → 10.00 | 11.00 → 11.00 | 19.00 → {after:.2f} | 5.0e+03 → 5.0e+03 |" in page
    assert f"| 75% | {costs[met]} |" in page
    assert f"Met under {2 * met} of 2\npolicies." in page
    assert "120 steps, 491,520\ntokens, 17 minutes" in page


@pytest.mark.extended
def test_choices_are_measured_share_by_share(pretrained: ModuleType, tmp_path: Path) -> None:
    choices = importlib.import_module("choices")
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    for extra in (["--only", "unified", "--keep", "0.9"], ["--only", "unified", "--only", "stages", "--keep", "0.5"]):
        assert CliRunner().invoke(choices.main, [*arguments, *extra], catch_exceptions=False).exit_code == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "choices.json").read_text())}
    assert {name: sorted(row["perplexity"]) for name, row in rows.items()} == {
        "unified": ["0.5", "0.9"],
        "best:stages": ["0.5"],
    }
    assert rows["unified"]["layers"]["0.9"].count(".") == 2
    page = (tmp_path / "out" / "choices.md").read_text()
    assert "| `best:stages` |  |  |  |  | " in page
