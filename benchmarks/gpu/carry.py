"""Makes the folder that goes to a machine without network: packages that are missing there, and plans.

    python benchmarks/gpu/carry.py FOLDER [--python 3.12]

FOLDER/site has this package and those that training needs and such a machine lacks, without OR-tools, which only
planning needs; FOLDER/plans has the plans of all rows. The corpus is not carried: it is made there, from Python's own
sources.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from rows import ROWS
from setting import save_plans

HERE = Path(__file__).resolve().parent
PACKAGES = ("lazy-loader", "omegaconf", "pydantic")
"""What skippipe imports when it trains, beyond torch, transformers and what these bring."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "any")
LIMIT_BYTES = 50e6


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--python", "version", default="3.12", show_default=True, help="Version of Python there.")
@click.option("--rehearse", is_flag=True, help="Plans of the tiny sizes.")
def main(folder: Path, version: str, rehearse: bool) -> None:
    """Make FOLDER and print its size."""
    install(folder / "site", version)
    with tempfile.TemporaryDirectory() as scratch:
        for name, row in ROWS.items():
            for experiment in row.experiments(Path(scratch) / name, rehearse=rehearse):
                click.echo(f"planning {experiment.name} ...", err=True)
                save_plans(experiment, folder)
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    click.echo(f"{folder}: {size_bytes / 1e6:.1f} MB")
    if size_bytes > LIMIT_BYTES:
        raise click.ClickException(f"{folder} has {size_bytes / 1e6:.1f} MB, more than {LIMIT_BYTES / 1e6:.0f} MB")


def install(site: Path, version: str) -> None:
    """Put the packages and what they need into `site`, as wheels for Linux on x86-64 and this version of Python."""
    with tempfile.TemporaryDirectory() as wheels:
        # The first has no wheel of its own; the second says which torch it needs.
        _pip("wheel", "--wheel-dir", wheels, "--no-deps", "antlr4-python3-runtime==4.9.*", str(HERE.parents[1]))
        platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
        target = ["--python-version", version, "--implementation", "cp", "--only-binary=:all:", *platforms]
        _pip("download", "--dest", wheels, "--find-links", wheels, *target, *PACKAGES)
        found = [str(path) for path in sorted(Path(wheels).glob("*.whl"))]
        _pip("install", "--upgrade", "--no-deps", "--target", str(site), *target, *found)


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


if __name__ == "__main__":
    main()
