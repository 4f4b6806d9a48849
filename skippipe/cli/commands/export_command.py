"""`skippipe export`: a checkpoint in the Hugging Face format."""

from pathlib import Path

import click

from skippipe.cli.user_path import UserPath


@click.command("export")
@click.argument("run_dir", metavar="RUN", type=UserPath())
@click.argument("target", metavar="DIR", type=UserPath())
@click.option("--step", type=click.IntRange(min=0), help="Step of the checkpoint; the newest where not given.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Convert the weights.")
@click.option("--adapter", is_flag=True, help="Write the run's adapter alone, which peft loads.")
@click.option("--choice", type=UserPath(), help="Leave out the layers that this file of evaluate --save-choice does.")
def command(
    run_dir: Path, target: Path, step: int | None, dtype: str | None, adapter: bool, choice: Path | None
) -> None:
    """Write a checkpoint of RUN to the new directory DIR, which transformers and other libraries load."""
    from skippipe.checkpoint.huggingface.export import export_run
    from skippipe.checkpoint.huggingface.peft_adapter import export_adapter

    if adapter:
        if choice is not None:
            raise click.UsageError("--adapter and --choice exclude each other: an adapter has all layers")
        click.echo(f"adapter of {export_adapter(run_dir, target, step=step, dtype=dtype)} written to {target}")
        return
    checkpoint = export_run(run_dir, target, step=step, dtype=dtype, choice=choice)
    click.echo(f"{checkpoint} written to {target}")
