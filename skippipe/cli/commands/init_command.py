"""`skippipe init`: a folder to begin with."""

import shlex
from pathlib import Path

import click

from skippipe.cli.user_path import UserPath

FIRST = "configs/experiments/tiny.yaml"


@click.command("init")
@click.argument("target", metavar="DIR", type=UserPath(file_okay=False))
def command(target: Path) -> None:
    """Write example experiments, cluster files and launch templates into DIR, as a start for your own.

    DIR may exist; files in it are never overwritten.
    """
    from skippipe.cli.starter.folder import write_starter

    num_files = len(write_starter(target))
    click.echo(
        f"{target}: {num_files} files\n"
        "  configs/experiments/  experiments: tiny.yaml to begin, three-regions.yaml\n"
        "  configs/clusters/     machines and links; describe or measure yours here\n"
        "  launch/               torchrun, SLURM and Kubernetes\n"
        "Next:\n"
        f"  cd {shlex.quote(str(target))}\n"
        f"  skippipe plan --config {FIRST} --out runs/tiny/plan.json\n"
        f"  torchrun --nproc-per-node 4 -m skippipe train --config {FIRST}\n"
        "  skippipe report runs/tiny"
    )
