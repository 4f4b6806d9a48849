"""`skippipe profile`: measure nodes and links; write a cluster file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from skippipe.cli.user_path import OutputFile, UserPath
from skippipe.errors import ConfigError
from skippipe.runtime.ranks import time_limits

if TYPE_CHECKING:
    import torch

    from skippipe.cluster.profile import Profile, ProfileOptions
    from skippipe.config.experiment import Experiment
    from skippipe.runtime.ranks.context import DistributedContext


@click.command("profile")
@click.option("--out", type=OutputFile(), help="Cluster file to write.")
@click.option("--config", "config_path", type=UserPath(), help="Experiment whose tasks are measured.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where no --config says it.")
@click.option(
    "--compute-s", type=click.FloatRange(min=0.1), default=3.0, help="Seconds of computing.", show_default=True
)
@click.option(
    "--link-s", type=click.FloatRange(min=0.01), default=1.0, help="Seconds a link and way.", show_default=True
)
@click.option("--concurrent", type=click.IntRange(min=1), help="Pairs of hosts at a time; all that are disjoint else.")
@click.option(
    "--bandwidth-rounds",
    type=click.IntRange(min=1),
    help="Others that a host's bandwidth is measured with [all, or 8].",
)
@click.option(
    "--contention",
    type=click.Choice(["link", "shared"]),
    default="link",
    help="With shared, each host has what its card was seen to carry.",
    show_default=True,
)
@click.option(
    "--region-ms", type=click.FloatRange(min=0), default=2.0, help="Nodes nearer than that share a region (2)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.argument("overrides", nargs=-1)
def command(
    out: Path | None,
    config_path: Path | None,
    device: str,
    compute_s: float,
    link_s: float,
    concurrent: int | None,
    bandwidth_rounds: int | None,
    contention: Literal["link", "shared"],
    region_ms: float,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Measure every node's compute and memory and every link; start it with torchrun, one process for each node.

    With --config, the tasks and messages of that experiment are measured (OVERRIDES are key.sub=value), so that its
    plans promise what nodes and links do. SKIPPIPE_NODE and SKIPPIPE_REGION name a process's node and region.
    """
    from dataclasses import replace

    from skippipe.cluster.profile import profile
    from skippipe.runtime.ranks.context import DistributedContext

    experiment = _experiment(config_path, overrides)
    timeout_s = time_limits.PROFILE_S if experiment is None else experiment.comm.timeout_s
    with DistributedContext.from_environment(timeout_s) as context:
        if out is None and context.world_size > 1:
            raise ConfigError("--out: give the cluster file to write")
        chosen, options = prepare(experiment, device, context)
        how = replace(
            options.links,
            link_s=link_s,
            concurrent=concurrent,
            bandwidth_rounds=bandwidth_rounds,
            near_s=region_ms / 1e3,
        )
        options = replace(options, compute_s=compute_s, links=how)
        measured = profile(context, chosen, options)
        context.finish()
        if context.rank == 0:
            _finish(measured, out, _subject(options, config_path), contention, as_json)


def _experiment(config_path: Path | None, overrides: tuple[str, ...]) -> "Experiment | None":
    from skippipe.config.experiment_file import load_experiment

    if config_path is not None:
        return load_experiment(config_path, overrides)
    if overrides:
        raise ConfigError(f"{overrides[0]!r}: overrides need --config")
    return None


def prepare(
    experiment: "Experiment | None", device: str, context: "DistributedContext"
) -> "tuple[torch.device, ProfileOptions]":
    """Return this rank's device and what is to be measured; raise on every rank where one cannot."""
    import torch

    from skippipe.cluster.compute_speed import ProbeWorkload, typical_workload
    from skippipe.cluster.links.link_rounds import LinkOptions
    from skippipe.cluster.profile import ProfileOptions
    from skippipe.model.architecture import experiment_model
    from skippipe.model.compilation import check_compilable
    from skippipe.model.device import check_dtype, choose_device, torch_dtype
    from skippipe.planning.measured_for import experiment_measured_for
    from skippipe.planning.workload.experiment_workload import experiment_workload
    from skippipe.runtime.ranks.agreement import on_all_ranks
    from skippipe.runtime.ranks.store_names import Topic

    if experiment is None:
        chosen = on_all_ranks(context, Topic.PROFILE_DEVICE, lambda: choose_device(device, context.local_rank))
        return chosen, ProfileOptions(typical_workload(chosen), mean_layers=None)
    training = experiment.training
    dtype = torch_dtype(training.dtype)

    def choose() -> torch.device:
        found = choose_device(training.device, context.local_rank)
        check_dtype(found, dtype, "training.dtype")
        if training.compile:
            check_compilable(found, training.activation_checkpointing)
        return found

    chosen = on_all_ranks(context, Topic.PROFILE_DEVICE, choose)
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    cost = experiment_workload(experiment)
    mean_layers = cost.num_layers / experiment.pipeline.num_stages
    workload = ProbeWorkload(
        experiment_model(experiment),
        max(1, round(mean_layers)),
        training.micro_batch_size,
        training.sequence_length,
        dtype,
        training.activation_checkpointing,
        experiment.lora,
        training.compile,
    )
    return chosen, ProfileOptions(
        workload,
        mean_layers,
        experiment_measured_for(experiment, experiment.pipeline.num_stages),
        experiment.recipe.num_losses,
        LinkOptions(cost.activation_bytes),
    )


def _subject(options: "ProfileOptions", config_path: Path | None) -> str:
    work = options.workload
    shape = f"{work.micro_batch_size} x {work.sequence_length} tokens, {str(work.dtype).removeprefix('torch.')}"
    if options.mean_layers is None:
        return f"one Llama layer of hidden size {work.config.hidden_size}, {shape}; give --config to measure your own"
    return f"{options.mean_layers:g} layers ({work.config.model_type}) of {config_path}, {shape}"


def _finish(
    measured: "Profile", out: Path | None, subject: str, contention: Literal["link", "shared"], as_json: bool
) -> None:
    from dataclasses import asdict

    from skippipe.cluster.description import as_cluster, content, profile_comments, profile_table, write_cluster

    comments = profile_comments(measured, subject)
    written = None
    if out is not None and measured.links:
        write_cluster(out, as_cluster(measured, out.stem, contention), comments)
        written = str(out)
    if as_json:
        entries = {
            "nodes": [content(node) for node in measured.nodes],
            "links": [content(link) for link in measured.links],
            "between_hosts": [asdict(detail) for detail in measured.details],
        }
        rest = {
            "task_overhead_s": measured.task_overhead_s,
            "completion": None if measured.completion is None else asdict(measured.completion),
        }
        click.echo(json.dumps(entries | rest | {"about": comments, "cluster_file": written}))
        return
    click.echo("\n".join([*comments, profile_table(measured)]))
    if written is not None:
        click.echo(f"written: {written}")
    elif out is not None:
        click.echo(f"{out} is not written: one node has no links. Start one process for each node, with torchrun")
