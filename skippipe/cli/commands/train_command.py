"""`skippipe train` and `skippipe join`: train along a plan, from the start or with those who train already."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from skippipe.errors import StoppedError
from skippipe.training.signals import StopSignal

if TYPE_CHECKING:
    from skippipe.membership.addresses import Place
    from skippipe.training.trainer import TrainingSummary

from skippipe.cli.user_path import HostPort, UserPath


@click.command("train")
@click.option("--config", "config_path", required=True, type=UserPath(), help="Experiment YAML.")
@click.option("--plan", "plan_path", type=UserPath(), help="Plan file; RUN/plan.json where not given.")
@click.option("--listen", type=HostPort(), help="Address of this host, at which others join before the first step.")
@click.option("--print-config", is_flag=True, help="Print the complete experiment and stop.")
@click.argument("overrides", nargs=-1)
def command(
    config_path: Path, plan_path: Path | None, listen: "Place | None", print_config: bool, overrides: tuple[str, ...]
) -> None:
    """Train the experiment's model along its plan, from the newest checkpoint if there is one.

    OVERRIDES are key.sub=value, as in the experiment's YAML. Start it with torchrun, one process for each node of the
    plan, or alone to run every stage in one process; or with --listen on the first node's host, and with `skippipe
    join` on all others. SIGTERM, SIGHUP or Ctrl-C to any of them finishes the step, saves,
    and ends all with exit code 75.
    """
    with StopSignal(at_once=True) as stop:
        from skippipe.config.experiment_file import load_experiment, to_yaml

        experiment = load_experiment(config_path, overrides)
        if print_config:
            click.echo(to_yaml(experiment), nl=False)
            return
        if listen is not None:
            from skippipe.training.joining.invitation import train_listening

            _end(train_listening(experiment, plan_path, listen, stop))
            return
        from skippipe.training.train_experiment import train_experiment

        summary = train_experiment(experiment, plan_path, stop)
        _end(summary)


@click.command("join")
@click.argument("place")
@click.option("--node", help="Which node of the run this process is; one that is missing where not given.")
@click.argument("overrides", nargs=-1)
def join(place: str, node: str | None, overrides: tuple[str, ...]) -> None:
    """Come into a run, and train with its members until the end.

    PLACE is HOST:PORT of any member, with the run's secret in SKIPPIPE_SECRET; or the run's directory, or a copy of its
    members.json. It is under way with recovery.enabled, or about to start with `skippipe train --listen HOST:PORT`. The
    experiment comes from the run; OVERRIDES are key.sub=value for what differs on this host, such as the path of
    run_dir, data.paths or training.device.
    """
    with StopSignal(at_once=True) as stop:
        from skippipe.training.joining.join_run import join_run

        _end(join_run(place, node, overrides, stop))


def _end(summary: "TrainingSummary") -> None:
    """Say how a training ended, and end with the code for it."""
    from skippipe.monitor.terminal import say

    if summary.rank == 0:
        say(_last_line(summary))
    if summary.stopped:
        raise SystemExit(StoppedError.exit_code)


def _last_line(summary: "TrainingSummary") -> str:
    if summary.checkpoint is None:
        return f"nothing to do: all {summary.step} steps are done already"
    steps = f"step {summary.step} ({summary.step - summary.first_step} in this run), saved {summary.checkpoint}"
    if not summary.stopped:
        return f"done after {steps}"
    who = "a signal" if summary.stopped_by is None else f"a signal to rank {summary.stopped_by}"
    return f"stopped after {steps}, by {who}; the same line continues it (exit code {StoppedError.exit_code})"
