"""Every command shown in the README and in docs/ is run, page by page, in a folder as `skippipe init` writes it."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import preloaded, redirect, run_skippipe

from skippipe.cli.demo.ranks import run_ranks
from skippipe.cli.starter.folder import write_starter

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SET_UP = "python3 -m venv .venv"
"""The two set-up lines are run whole elsewhere: the tests are running, and the demo has a test of its own."""
TERMS = (
    "node, rank, stage, replica, origin, route, hop, skip ratio, swap, placement, plan, program, iteration, microbatch",
    "1f1b, zero bubble, split backward, all-reduce, reduce-scatter, all-gather, activation checkpointing, zero",
    "lower bound, gap, makespan, contention, policy, recipe, coverage, critical path, warm start, perplexity",
)
"""What a reader of any page may look up in the glossary."""
TORCHRUN = re.compile(r"torchrun --nproc-per-node \d+ -m skippipe ")


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith(SET_UP)]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_of_page_run(page: Path, tmp_path: Path) -> None:
    begin_in(tmp_path)
    for command in commands(page):
        code, output = runner_of(command)(in_short(command), tmp_path)
        assert code == 0, f"{command}\n{output[-6000:]}"


def begin_in(folder: Path) -> None:
    """Write the starter, with less time for the planner of the tiny experiment: no command needs a good plan."""
    write_starter(folder)
    tiny = folder / "configs" / "experiments" / "tiny.yaml"
    whole, shorter = "time_limit_s: 2.0", "time_limit_s: 0.5"
    assert whole in tiny.read_text()
    tiny.write_text(tiny.read_text().replace(whole, shorter))


def in_short(command: str) -> str:
    """Return a command with less to do: fewer steps, less time for a plan, less text for an imported model."""
    command = re.sub(r"training\.max_steps=\d{2,}", "training.max_steps=10", command)
    command = re.sub(r"^skippipe import .*", r"\g<0> data.max_bytes=1000000 pipeline.planner.time_limit_s=0.5", command)
    return re.sub(r"--time-limit \d+", "--time-limit 0.6", command)


def runner_of(command: str) -> Callable[[str, Path], tuple[int | None, str]]:
    """Return how a command is run: imports take long, so processes are forked; test_two_agents.py starts them anew."""
    if command.startswith("skippipe "):
        return fork_skippipe
    return fork_ranks if TORCHRUN.match(command) else run_shell


def fork_skippipe(command: str, folder: Path) -> tuple[int | None, str]:
    """Return exit code and output of a command that needs no shell."""
    output = folder / "output.txt"
    code = forked(run_skippipe, shlex.split(command)[1:], output, {}, folder)
    return code, output.read_text()


def fork_ranks(command: str, folder: Path) -> tuple[int | None, str]:
    """Return exit code and output of a command under torchrun's agent, which forks the ranks."""
    output = folder / "output.txt"
    _, _, num_ranks, _, _, *arguments = shlex.split(command)  # as TORCHRUN has it
    code = forked(run_ranks_in, arguments, int(num_ranks), output, folder)
    return code, output.read_text()


def forked(target: Callable[..., None], *arguments: Any) -> int | None:
    process = preloaded().Process(target=target, args=arguments)
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def run_ranks_in(arguments: list[str], num_ranks: int, output: Path, folder: Path) -> None:
    redirect(output)
    os.chdir(folder)
    run_ranks(arguments, num_ranks, start_method="fork")  # this process has imported everything


def run_shell(command: str, folder: Path) -> tuple[int | None, str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return result.returncode, result.stdout + result.stderr


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_glossary_says_what_each_term_means() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    entries = dict(re.findall(r"^### (.+)\n\n((?:(?!#).+\n?\n?)+)", text, flags=re.MULTILINE))
    assert list(entries) == re.findall(r"^### (.+)", text, flags=re.MULTILINE)
    assert [term for term, meaning in entries.items() if not 30 < len(meaning) < 500] == []
    known = {term.lower() for heading in entries for term in heading.split(", ")}
    assert {word for line in TERMS for word in line.split(", ")} - known == set()


def test_every_place_that_the_architecture_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    places = re.findall(r"`((?:skippipe|scheduler|tests|docs)/[\w/.-]*)`", text)
    assert len(places) > 30
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    listed = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[><=~!\[ ]", entry)[0] for entries in listed for entry in entries}
    rows = " ".join(line for line in reasons.splitlines() if line.startswith("| "))
    assert sorted(name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", rows)) == []


def test_text_names_no_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marker = re.compile(r"/(?:home|root|Users|tmp)/\w")
    texts = [ROOT / name for name in listed.split() if Path(name).suffix in {".md", ".py", ".yaml", ".toml", ".sh"}]
    offences = [
        path.name for path in texts if path.exists() and marker.search(path.read_text()) and path != Path(__file__)
    ]
    assert offences == []
