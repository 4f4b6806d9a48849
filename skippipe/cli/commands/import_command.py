"""`skippipe import`: a pretrained model as a run that has not begun."""

from pathlib import Path
from shlex import quote

import click

from skippipe.cli.user_path import UserPath


@click.command("import")
@click.argument("path", metavar="DIR", type=UserPath())
@click.argument("run_dir", metavar="RUN", type=UserPath())
@click.option("--config", "config_path", type=UserPath(), help="Experiment YAML to train on with.")
@click.option("--adapter", type=UserPath(), help="Directory of an adapter that peft has written, to train on.")
@click.option("--heal", type=UserPath(), help="Choice of layers (evaluate --save-choice) along which to train.")
@click.argument("overrides", nargs=-1)
def command(
    path: Path,
    run_dir: Path,
    config_path: Path | None,
    adapter: Path | None,
    heal: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Make the run directory RUN of the pretrained model in DIR (Hugging Face with safetensors, or a .gguf file).

    Its model and tokenizer replace those of the experiment; where no --config is given, the experiment is one for one
    machine. OVERRIDES are key.sub=value.
    """
    from skippipe.checkpoint.huggingface.import_model import import_model

    num_parameters = import_model(
        path, run_dir, config_path=config_path, overrides=overrides, adapter=adapter, heal=heal
    )
    click.echo(f"{path}: {num_parameters:,} parameters imported to {run_dir}")
    click.echo(f"evaluate:  skippipe evaluate {quote(str(run_dir))}")
    click.echo(f"train on:  skippipe train --config {quote(str(run_dir / 'config.yaml'))}")
