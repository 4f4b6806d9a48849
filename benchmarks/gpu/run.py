"""What a GPU must prove, in one command; see docs/gpu.md.

    python benchmarks/gpu/run.py [--minutes 9] [--rows NAME ...] [--carried FOLDER] [--rehearse] [--out FOLDER]

Every row runs in a process of its own with a limit, and results are written after every row.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
import torch
from rows import ROWS

from common.command import chosen, folder_of_results, own_process, record
from common.table import MARKS, Columns, Result

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


def _figures(result: Result) -> str:
    return "<br>".join(
        f"{figure['label']}: {figure['value']:.4g} {figure['unit']}".rstrip() for figure in result.get("figures", ())
    )


def _verdicts(result: Result) -> str:
    judged = [figure for figure in result.get("figures", ()) if figure["met"] is not None]
    return "<br>".join(f"{figure['label']}: {figure['bar']}, {MARKS[figure['met']]}" for figure in judged)


COLUMNS: Columns = {
    "row": lambda result: result["name"],
    "measured": _figures,
    "bars": _verdicts,
    "seconds": lambda result: f"{result['row_s']:.0f}",
    "error": lambda result: result.get("error", ""),
    "card": lambda result: result["card"],
}


@click.command()
@click.option(
    "--minutes", type=click.FloatRange(min=0.1), default=9.0, show_default=True, help="For all rows together."
)
@click.option("--rows", "only", multiple=True, help="Rows whose names contain this; may be repeated.")
@click.option("--carried", type=click.Path(exists=True, file_okay=False, path_type=Path), help="What carry.py made.")
@click.option("--rehearse", is_flag=True, help="Every row on the CPU with tiny sizes; its numbers mean nothing.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of results.md and results.json.")
def main(minutes: float, only: tuple[str, ...], carried: Path | None, rehearse: bool, out: Path | None) -> None:
    """Measure the rows by priority, as many as the time allows; write and print the table after each."""
    if not rehearse and not torch.cuda.is_available():
        raise click.UsageError("this process sees no CUDA device; --rehearse runs every row on the CPU")
    names = chosen(ROWS, only)
    deadline_s = time.monotonic() + 60 * minutes
    environment = _environment(carried)
    with tempfile.TemporaryDirectory() as folder:

        def measure(name: str) -> Result:
            rest = names[names.index(name) :]
            left_s = max(1.0, deadline_s - time.monotonic())
            limit_s = left_s * ROWS[name].share / sum(ROWS[other].share for other in rest)
            command = [sys.executable, str(HERE / "row.py"), name, "--folder", folder, "--seconds", str(limit_s)]
            command += [*(["--carried", str(carried)] if carried else []), *(["--rehearse"] if rehearse else [])]
            expected = {"name": name, "quick": rehearse, "minutes": minutes, **card()}
            start_s = time.monotonic()
            result = own_process(command, expected, REPOSITORY, limit_s)
            return result | {"row_s": time.monotonic() - start_s}

        os.environ |= environment
        place = folder_of_results(out, rehearse, HERE)
        record(ROWS, names, place, measure, ("What a GPU has proved", COLUMNS))


def card() -> Result:
    """Return the card, its driver and the versions that matter."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return {"card": "none", "driver": None, **versions}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return {"card": torch.cuda.get_device_name(0), "driver": driver[0] if driver else None, **versions}


def _environment(carried: Path | None) -> dict[str, str]:
    """Return where this repository and what was carried are found by the rows and their ranks."""
    folders = [str(REPOSITORY), str(REPOSITORY / "scheduler"), *([str(carried / "site")] if carried else [])]
    return {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


if __name__ == "__main__":
    main()
