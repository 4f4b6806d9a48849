"""`skippipe train`: train along a plan, under torchrun or in one process."""

from pathlib import Path

import click

from skippipe.cli.user_path import UserPath


@click.command("train")
@click.option("--config", "config_path", required=True, type=UserPath(), help="Experiment YAML.")
@click.option("--plan", "plan_path", type=UserPath(), help="Plan file; RUN/plan.json where not given.")
@click.option("--print-config", is_flag=True, help="Print the complete experiment and stop.")
@click.argument("overrides", nargs=-1)
def command(config_path: Path, plan_path: Path | None, print_config: bool, overrides: tuple[str, ...]) -> None:
    """Train the experiment's model along its plan, from the newest checkpoint if there is one.

    OVERRIDES are key.sub=value, as in the experiment's YAML. Start it with torchrun, one process for each node of the
    plan, or alone to run every stage in one process.
    """
    from skippipe.config.experiment_file import load_experiment, to_yaml

    experiment = load_experiment(config_path, overrides)
    if print_config:
        click.echo(to_yaml(experiment), nl=False)
        return
    from skippipe.training.train_experiment import train_experiment

    summary = train_experiment(experiment, plan_path)
    if summary.rank == 0:
        click.echo(_last_line(summary.step, summary.first_step, summary.stopped, summary.checkpoint))


def _last_line(step: int, first_step: int, stopped: bool, checkpoint: Path | None) -> str:
    if checkpoint is None:
        return f"nothing to do: all {step} steps are done already"
    return f"{'stopped' if stopped else 'done'} after step {step} ({step - first_step} in this run), saved {checkpoint}"
