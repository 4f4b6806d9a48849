"""`skippipe init`: the folder with which a user begins."""

import re
import shlex
import stat
from pathlib import Path

import pytest

from skippipe.cli.commands.validate_command import validate_file
from skippipe.cli.main import main

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Path:
    code, _, error = run(capsys, "init", str(tmp_path / "mine"))
    assert code == 0, error
    return tmp_path / "mine"


def files_in(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_the_folder_has_the_files_of_the_repository(folder: Path) -> None:
    expected = [top / path for top in (Path("configs"), Path("launch")) for path in files_in(ROOT / top)]
    assert len(expected) == 14
    assert files_in(folder) == expected
    assert all((folder / path).read_bytes() == (ROOT / path).read_bytes() for path in expected)


def test_every_experiment_and_cluster_of_the_folder_is_valid(folder: Path) -> None:
    kinds = [validate_file(path) for path in sorted((folder / "configs").rglob("*.yaml"))]
    assert sorted(kinds) == ["cluster"] * 4 + ["experiment"] * 5


def test_launch_scripts_are_executable_and_name_files_of_the_folder(folder: Path) -> None:
    for template in (folder / "launch").iterdir():
        content = template.read_text()
        assert bool(template.stat().st_mode & stat.S_IXUSR) == content.startswith("#!"), template.name
        named = re.findall(r"(?:configs|launch)/[\w/.-]+\w", content)
        assert named, template.name
        assert [name for name in named if not (folder / name).exists()] == [], template.name


def test_the_next_command_plans(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, printed, _ = run(capsys, "init", str(tmp_path / "my folder"))
    change_folder, plan, *_ = printed.split("Next:\n")[1].splitlines()
    monkeypatch.chdir(shlex.split(change_folder)[1])
    code, _, error = run(capsys, *shlex.split(plan)[1:], "pipeline.planner.max_evaluations=2000")
    assert code == 0, error
    assert (tmp_path / "my folder" / "runs" / "tiny" / "plan.json").exists()


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "launch" / "torchrun.sh"
    own.parent.mkdir()
    own.write_text("mine")
    code, printed, error = run(capsys, "init", str(tmp_path))
    assert (code, printed) == (2, "")
    assert "launch/torchrun.sh is there already, and nothing is overwritten" in error
    assert files_in(tmp_path) == [Path("launch/torchrun.sh")]
    assert own.read_text() == "mine"


def test_a_second_time_names_every_file_that_is_there(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, _, error = run(capsys, "init", str(folder))
    assert code == 2
    assert all(str(path) in error for path in files_in(folder))


def test_a_file_is_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, error = run(capsys, "init", str(tmp_path / "file"))
    assert code == 2
    assert "is a file" in error
