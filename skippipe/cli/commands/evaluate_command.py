"""`skippipe evaluate`: perplexity against the share of depth kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skippipe.cli.shared_options import ABSENT, DEVICE, POLICIES, FloatList, GreedyCommand, WordList, node_names
from skippipe.cli.user_path import SEED, OutputFile, UserPath

if TYPE_CHECKING:
    from skippipe.inference.evaluation.lm_eval_tasks import TaskOptions
    from skippipe.monitor.evaluation_results import Evaluation

FILE = UserPath()


@click.command("evaluate", cls=GreedyCommand)
@click.argument("path", metavar="RUN_OR_DIR", type=FILE)
@click.option("--policy", "policies", type=WordList(), default="random", show_default=True, help=POLICIES)
@click.option("--keep", "keeps", type=FloatList(), default="1.0 0.67 0.5", show_default=True, help="Shares of compute.")
@click.option(
    "--batches",
    "num_batches",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Batches of held-out text to measure on, at most.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=4, show_default=True, help="Random choices a batch.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random choices.")
@click.option(
    "--prompt-length",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Positions of each sample that are a prompt: not measured, and in full for unified and skipdecode.",
)
@click.option("--sequence-length", type=click.IntRange(min=2), help="Tokens in a sample; the run's where not given.")
@click.option("--stages", "num_stages", type=click.IntRange(min=1), help="Split into so many stages, not the plan's.")
@click.option("--absent", multiple=True, metavar="NODE", help=ABSENT)
@click.option("--text", multiple=True, type=FILE, help="Text to measure on, instead of the run's held-out text.")
@click.option("--calibration", multiple=True, type=FILE, help="Text for calibrated policies, not the training text.")
@click.option("--out", type=OutputFile(), help="Write the result to this file too.")
@click.option("--plot", type=OutputFile(), help="Draw perplexity against compute, all policies in one picture (HTML).")
@click.option(
    "--questions",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Questions of each kind to answer: copying, addition, JSON repair.",
)
@click.option(
    "--save-choice", type=OutputFile(), help="Write the layers of the one policy and share here, for file:CHOICE."
)
@click.option("--show-layers", is_flag=True, help="Draw which layers ran under each policy at each share.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=DEVICE)
@click.option(
    "--lm-eval-tasks", "tasks", type=WordList(), default=(), help="Tasks of lm-eval to run too: names or YAML files."
)
@click.option("--include-path", type=FILE, help="Folder with more tasks of lm-eval.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task; all where not given.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each document of a task.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Requests of tasks at a time; 16 where not given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    path: Path,
    policies: tuple[str, ...],
    keeps: tuple[float, ...],
    num_stages: int | None,
    absent: tuple[str, ...],
    device: str,
    out: Path | None,
    plot: Path | None,
    show_layers: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show the perplexity of a model when only a share of its layers' compute runs.

    RUN_OR_DIR is a run (its newest checkpoint; writes evaluation.json there) or a Hugging Face directory. Give it
    before --keep, --policy and --lm-eval-tasks, or after `--`: those take all the words that follow them. Start it with
    torchrun to spread a run's stages over several processes.
    """
    from skippipe.inference.distributed.session import open_model
    from skippipe.inference.evaluation.perplexity import PerplexityOptions, evaluate
    from skippipe.monitor.evaluation_results import write_evaluation
    from skippipe.monitor.terminal import say

    of_tasks = {name: options.pop(name) for name in ("tasks", "include_path", "limit", "num_fewshot", "batch_size")}
    chosen = PerplexityOptions(**options, tasks=_task_options(**of_tasks))
    with open_model(path, device=device, num_stages=num_stages, absent=node_names(absent)) as model:
        if model is None:
            return
        evaluation = evaluate(model, policies=policies, keeps=keeps, options=chosen)
        if out is not None:
            write_evaluation(evaluation, out)
        if plot is not None:
            from skippipe.monitor.report.reports import write_depth_report

            write_depth_report(plot, {evaluation.model: evaluation})
        tables = [*evaluation_table(evaluation), *tasks_table(evaluation)]
        tables += layers_table(evaluation) if show_layers else []
        click.echo(json.dumps(evaluation.model_dump()) if as_json else "\n".join(tables))
        if model.decoder.absence:
            say(model.decoder.absence, err=True)


def _task_options(tasks: tuple[str, ...], **given: Any) -> "TaskOptions | None":
    from skippipe.inference.evaluation.lm_eval_tasks import TaskOptions

    given = {name: value for name, value in given.items() if value is not None}
    if given and not tasks:
        raise click.UsageError(f"--{next(iter(given)).replace('_', '-')} is for tasks: give --lm-eval-tasks NAME")
    return TaskOptions(tasks, **given) if tasks else None


def evaluation_table(evaluation: "Evaluation") -> Iterator[str]:
    """Yield perplexity by depth as a table; the last column is relative to full depth, where that was evaluated."""
    yield f"{evaluation.model}, {evaluation.checkpoint}, {evaluation.tokens:,} tokens"
    numbers = f"{'keep':>6}{'stages':>8}{'layers':>8}{'computed':>10}{'perplexity':>12}{'std':>9}{'change':>9}"
    width = _policy_width(evaluation)
    yield f"{'policy':<{width}}{numbers}"
    whole = next((row.perplexity for row in evaluation.results if row.share_computed == 1), None)  # of any policy
    for row in evaluation.results:
        yield (
            f"{row.policy:<{width}}{row.keep:>6.2f}{row.kept_stages or '-':>8}{row.kept_layers:>8.4g}"
            f"{row.share_computed:>10.1%}{_short(row.perplexity):>12}{_short(row.perplexity_std):>9}"
            + _change(None if whole is None else row.perplexity / whole)
        )


def tasks_table(evaluation: "Evaluation") -> Iterator[str]:
    """Yield the metrics of tasks as a table, nothing where there are none; errors are standard errors."""
    if not evaluation.tasks:
        return
    width = _policy_width(evaluation)
    names = max(map(len, [*(row.task for row in evaluation.tasks), "task"])) + 2
    metrics = max(map(len, [*(row.metric for row in evaluation.tasks), "metric"])) + 2
    yield ""
    numbers = f"{'value':>10}{'error':>9}{'documents':>11}"
    yield f"{'task':<{names}}{'policy':<{width}}{'keep':>6}{'computed':>10}  {'metric':<{metrics}}{numbers}"
    for row in evaluation.tasks:
        error = "-" if row.standard_error is None else _short(row.standard_error)
        yield (
            f"{row.task:<{names}}{row.policy:<{width}}{row.keep:>6.2f}{row.share_computed:>10.1%}"
            f"  {row.metric:<{metrics}}{_short(row.value):>10}{error:>9}{row.documents:>11}"
        )


def layers_table(evaluation: "Evaluation") -> Iterator[str]:
    """Yield which layers ran after the prompt under each policy at each share, one character a layer, in tens."""
    from skippipe.monitor.evaluation_results import NEVER_RUN

    width = _policy_width(evaluation)
    drawn = [" ".join(row.layers[at : at + 10] for at in range(0, len(row.layers), 10)) for row in evaluation.results]
    yield "\n# runs, + at times, ~ its feed-forward part at times; a attention, f feed-forward part alone; . never"
    longest = max(len(layers) for layers in [*drawn, "layers from 0 on"])
    yield f"{'policy':<{width}}{'keep':>6}  {'layers from 0 on':<{longest}}  left out"
    for row, layers in zip(evaluation.results, drawn, strict=True):
        left_out = [str(layer) for layer, character in enumerate(row.layers) if character == NEVER_RUN]
        yield f"{row.policy:<{width}}{row.keep:>6.2f}  {layers:<{longest}}  {', '.join(left_out) or '-'}"


def _policy_width(evaluation: "Evaluation") -> int:
    return max(13, *map(len, evaluation.policies)) + 1


def _change(ratio: float | None) -> str:
    if ratio is None:
        return f"{'-':>9}"
    return f"{ratio - 1:>+9.1%}" if ratio < 10 else f"{f'x {ratio:.3g}':>12}"


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 1e5 else f"{value:.2e}"
