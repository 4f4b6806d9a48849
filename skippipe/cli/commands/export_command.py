"""`skippipe export`: a checkpoint in the Hugging Face format; `skippipe collect`: a run of several disks on one."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skippipe.cli.user_path import HostPort, UserPath
from skippipe.runtime.ranks import time_limits

if TYPE_CHECKING:
    from skippipe.membership.addresses import Place


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


@click.command("collect")
@click.argument("run_dir", metavar="RUN", type=UserPath())
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=1),
    default=time_limits.PROFILE_S,
    help="Seconds until a silent host is lost.",
    show_default=True,
)
@click.option("--listen", type=HostPort(), help="Address of this host, which gets all; the others --join it.")
@click.option("--join", type=HostPort(), help="Address of the host that gets all.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="How many take part, with --listen; one for each node of the run where not given.",
)
def collect(
    run_dir: Path, timeout_s: float, listen: "Place | None", join: "Place | None", processes: int | None
) -> None:
    """Bring RUN, which each host has a part of, to the disk of one of them: that of rank 0.

    Start it on every host with torchrun; or with --listen on the one that gets all, and with --join on the others. The
    newest checkpoint comes whole, metrics and events of all hosts come together.
    """
    from skippipe.runtime.ranks.context import DistributedContext
    from skippipe.training.records.collecting import collect_run

    if listen is not None and join is not None:
        raise click.UsageError("--listen and --join exclude each other: one host listens, the others join it")
    with (
        _meeting(run_dir, timeout_s, listen, join, processes),
        DistributedContext.from_environment(timeout_s, process_groups=False) as context,
    ):
        checkpoint = collect_run(run_dir, context)
        context.leave_meeting(heard=True)
        if context.rank == 0:
            click.echo(f"{run_dir}: whole here, {'no checkpoint' if checkpoint is None else checkpoint.name}")


def _meeting(
    run_dir: Path, timeout_s: float, listen: "Place | None", join: "Place | None", processes: int | None
) -> AbstractContextManager[None]:
    """Return where processes that no launcher has started meet; nothing where one has."""
    from skippipe.config.experiment_file import load_run
    from skippipe.training.joining.meeting import meeting_at
    from skippipe_scheduler.problem.cluster import load_cluster

    if join is not None:
        return meeting_at(join, timeout_s, None)
    if listen is None:
        return nullcontext()
    num_nodes = processes or len(load_cluster(Path(load_run(run_dir).cluster)).members())
    return meeting_at(listen, timeout_s, num_nodes)
