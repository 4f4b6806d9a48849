"""What is distributed: what is in it, and that the wheel works where there is no repository."""

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import skippipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of this source."""
    target = tmp_path_factory.mktemp("distributions")
    check([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(target)], ROOT)
    return target


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def check(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed on standard output."""
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sources(*folders: str) -> set[str]:
    """Return the files of these folders, except what git ignores."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    return {name for name in check(listed, ROOT).splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_both_packages_and_the_starter_files_and_nothing_else(wheel: Path) -> None:
    expected = {name.removeprefix("scheduler/") for name in sources("skippipe", "scheduler")}
    expected |= {f"skippipe/cli/starter/{name}" for name in sources("configs", "launch")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert len(names) == len(set(names))


def test_the_wheel_says_what_pyproject_says(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    archive = zipfile.ZipFile(wheel)
    (information,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(information))
    assert (metadata["Name"], metadata["Version"]) == ("skippipe", skippipe.__version__)
    assert metadata["Requires-Python"] == project["requires-python"]
    assert {"Programming Language :: Python :: 3.11", "Typing :: Typed"} <= set(metadata.get_all("Classifier", []))
    required = [entry for entry in metadata.get_all("Requires-Dist", []) if "extra ==" not in entry]
    assert len(required) == len(project["dependencies"])


def test_the_source_distribution_holds_the_repository_and_nothing_else(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.split("/", maxsplit=1)[1] for member in archive.getmembers()}
    assert names == sources() | {"PKG-INFO"}


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> dict[str, str]:
    """The environment variables of a fresh environment with the wheel, and with what it needs from the running one."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    check([sys.executable, "-m", "pip", "--python", str(home), "install", "--no-deps", "--quiet", str(wheel)], tmp_path)
    (site_packages,) = home.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but .pth files in it are not read: an editable installation stays out.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.extended
@pytest.mark.timeout(300)
def test_a_fresh_environment_starts_plans_and_trains_without_the_repository(
    installed: dict[str, str], tmp_path: Path
) -> None:
    where = check(["python", "-c", "import skippipe; print(skippipe.__file__)"], tmp_path, installed)
    assert Path(where).is_relative_to(tmp_path / "environment")
    printed = check(["skippipe", "init", "mine"], tmp_path, installed)
    lines = [line.strip().replace("torchrun ", "python -m torch.distributed.run ") for line in printed.splitlines()]
    change_folder, plan, train, report = lines[lines.index("Next:") + 1 :]
    for line in (plan, f"{train} training.max_steps=2", report):
        check(["bash", "-c", f"{change_folder} && {line}"], tmp_path, installed)
    assert (tmp_path / "mine" / "runs" / "tiny" / "report.html").exists()
