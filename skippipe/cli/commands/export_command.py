"""`skippipe export`: a checkpoint in the Hugging Face format."""

from pathlib import Path

import click

from skippipe.cli.user_path import UserPath


@click.command("export")
@click.argument("run_dir", metavar="RUN", type=UserPath())
@click.argument("target", metavar="DIR", type=UserPath())
@click.option("--step", type=click.IntRange(min=0), help="Step of the checkpoint; the newest where not given.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Convert the weights.")
@click.option("--choice", type=UserPath(), help="Leave out the layers that this file of evaluate --save-choice does.")
def command(run_dir: Path, target: Path, step: int | None, dtype: str | None, choice: Path | None) -> None:
    """Write a checkpoint of RUN to the new directory DIR, which transformers and other libraries load."""
    from skippipe.checkpoint.huggingface.export import export_run

    checkpoint = export_run(run_dir, target, step=step, dtype=dtype, choice=choice)
    click.echo(f"{checkpoint} written to {target}")
