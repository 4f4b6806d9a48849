"""How well recipes make models that work with stages left out, in one command; see benchmarks/README.md.

    python benchmarks/skip_tolerance/run.py [--size SIZE] [--prose TEXTS] [--only NAME ...] [--seed N ...] [--jobs N]
        [--quick]

Every training runs in a process of its own, on one core, and is kept when it is done: what stopped continues.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from page import draw, figure_of, page
from setups import RESULT, SETUPS, experiment_of, finished
from sizes import SIZES

from common.command import chosen, folder_of_results

HERE = Path(__file__).resolve().parent


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="2.4M", show_default=True, help="Of the model.")
@click.option(
    "--prose",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="Folder of text files, for a size on prose.",
)
@click.option("--only", multiple=True, help="Recipes whose names contain this; may be repeated.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Trainings at a time.")
@click.option("--quick", is_flag=True, help="A few steps of a tiny model; the numbers then mean nothing.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/skip_tolerance"),
    show_default=True,
    help="Folder of the trainings, finished or not.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results.md, .json and .svg (default: beside run.py; with --quick, a temporary one).",
)
def main(
    size: str,
    prose: Path | None,
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    jobs: int,
    quick: bool,
    work: Path,
    out: Path | None,
) -> None:
    """Train and evaluate the recipes that are not done yet; write the table after each, and print it."""
    if SIZES[size].prose != (prose is not None):
        raise click.UsageError(
            f"size {size} is trained on {'prose: give --prose TEXTS' if SIZES[size].prose else 'code'}"
        )
    names = chosen(SETUPS, only)
    out = folder_of_results(out, quick, HERE)
    out.mkdir(parents=True, exist_ok=True)
    todo = [(name, seed) for seed in seeds for name in names]

    def trained_pair(pair: tuple[str, int]) -> dict[str, Any] | None:
        return trained(*pair, size=size, prose=prose, work=work, quick=quick)

    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for (name, seed), result in zip(todo, pool.map(trained_pair, todo), strict=True):
            if result is None:
                failed.append(f"{name}, seed {seed}")
            else:
                record(result, out)
    click.echo((out / "results.md").read_text() if (out / "results.md").exists() else "nothing was measured")
    if failed:
        raise click.ClickException(f"failed: {'; '.join(failed)}; see the messages above")


def trained(name: str, seed: int, *, size: str, prose: Path | None, work: Path, quick: bool) -> dict[str, Any] | None:
    """Return the result of one training, from before or from a process of its own; None where that fails."""
    slug = re.sub(r"\W+", "-", name)
    folder = work.resolve() / f"{'quick' if quick else size}-{slug}-{seed}"
    result = finished(folder, experiment_of(name, size, seed, folder, quick=quick, prose=prose))
    if result is None:
        click.echo(f"{name}, seed {seed} ...", err=True)
        command = [sys.executable, str(HERE / "one_training.py"), name, size, str(seed), str(folder)]
        command += ["--prose", str(prose)] if prose else []
        command += ["--quick"] * quick
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            click.echo(f"{name}, seed {seed}: exit code {done.returncode}, see {folder / 'log.txt'}", err=True)
            return None
        result = json.loads((folder / RESULT).read_text())
    return result


def record(result: dict[str, Any], out: Path) -> None:
    """Put one result into the table and the figure, in the place of an older one of its recipe and seed."""
    path = out / "results.json"
    known: Sequence[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    results = [other for other in known if _training_of(other) != _training_of(result)]
    results = sorted([*results, result], key=_training_of)
    path.write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(page(results, list(SETUPS)))
    same_size = [other for other in results if other["size"] == result["size"]]
    draw(out / figure_of(result["size"]), same_size, list(SETUPS))


def _training_of(result: dict[str, Any]) -> tuple[int, int, int]:
    """Return which training it is, in the order of the table."""
    return [*SIZES].index(result["size"]), [*SETUPS].index(result["recipe"]), result["seed"]


if __name__ == "__main__":
    main()
