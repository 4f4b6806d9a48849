"""What `skippipe simulate` has for runs that lose nodes all the time: its options, and what it says."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from skippipe.cli.user_path import OutputFile, UserPath
from skippipe.errors import ConfigError

if TYPE_CHECKING:
    from skippipe.planning.churn.comparison import ChurnComparison
    from skippipe.planning.churn.failure_trace import FailureTrace
    from skippipe_scheduler.options import LostStage
    from skippipe_scheduler.plan.plan import Plan

LOST_STAGE_WAYS = ("routes_around", "stop")
"""`LostStage`; spelled out here so that the help loads nothing."""
LONGEST_S = 1e9
DAY_S = 24 * 3600.0
MOST_LOSSES = 100_000
"""Drawn for one replay. Chosen: they take minutes; a day of the most restless public trace has a few hundred."""
SECONDS = click.FloatRange(0, LONGEST_S, min_open=True)

OPTIONS = (
    click.option("--churn", type=UserPath(), help="Failure trace to replay over many iterations (docs/simulation.md)."),
    click.option(
        "--mtbf", "mtbf_s", type=SECONDS, metavar="S", help="Draw losses instead, one every S seconds on mean."
    ),
    click.option("--rejoin", "rejoin_s", type=SECONDS, metavar="S", help="A node drawn to be lost is back after S."),
    click.option("--duration", "duration_s", type=SECONDS, metavar="S", help="Length; a day for drawn losses."),
    click.option(
        "--lost-stage", type=click.Choice(LOST_STAGE_WAYS), help="Where nobody holds a stage [routes_around]."
    ),
    click.option(
        "--parameters", type=click.FloatRange(0, 1e15), help="Of the model: for the time of transfers of state."
    ),
    click.option(
        "--cost", "costs", multiple=True, metavar="NAME=SECONDS", help="Another cost of a loss, e.g. restart."
    ),
    click.option("--evaluations", type=click.IntRange(0, 10**6), help="Steps of search for each set of nodes [300]."),
    click.option("--report", type=OutputFile(), help="HTML page to write about the replayed trace."),
)


@dataclass(frozen=True)
class ChurnArguments:
    """The options above, as given."""

    churn: Path | None
    mtbf_s: float | None
    rejoin_s: float | None
    duration_s: float | None
    lost_stage: "LostStage | None"
    parameters: float | None
    costs: tuple[str, ...]
    evaluations: int | None
    report: Path | None

    @property
    def wanted(self) -> bool:
        """Whether there is a trace; raises `ConfigError` where there are two, or options without one."""
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isnan(value):
                raise ConfigError(f"{_option(name)} nan: expected a number")
        if self.churn is not None and self.mtbf_s is not None:
            raise ConfigError("--churn and --mtbf: give a trace or a mean time between drawn losses, not both")
        if self.churn is not None or self.mtbf_s is not None:
            return True
        given = [name for name, value in vars(self).items() if value not in (None, ())]
        if given:
            raise ConfigError(f"{_option(given[0])}: it belongs to a failure trace; add --churn FILE or --mtbf S")
        return False


def _option(name: str) -> str:
    """Return how the option of a field is spelled."""
    return "--cost" if name == "costs" else f"--{name.removesuffix('_s').replace('_', '-')}"


def churn_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `ChurnArguments`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def simulate_churn(plan: "Plan", arguments: ChurnArguments, seed: int) -> tuple[dict[str, Any], str]:
    """Replay the trace over the plan; return what is said of it, for programs and for people."""
    from skippipe.planning.churn.churn_costs import ChurnCosts
    from skippipe.planning.churn.comparison import ChurnOptions, compare_methods

    costs = ChurnCosts().with_changes(dict(map(_cost, arguments.costs)))
    options = ChurnOptions(
        costs=costs,
        lost_stage=arguments.lost_stage or ChurnOptions.lost_stage,
        parameters=arguments.parameters or 0.0,
        max_evaluations=ChurnOptions.max_evaluations if arguments.evaluations is None else arguments.evaluations,
    )
    comparison = compare_methods(plan, _trace(plan, arguments, seed), options)
    if arguments.report is not None:
        from skippipe.monitor.report.churn_page import write_churn_report

        write_churn_report(arguments.report, comparison)
    return churn_summary(comparison), "\n".join(churn_lines(comparison))


def _trace(plan: "Plan", arguments: ChurnArguments, seed: int) -> "FailureTrace":
    from skippipe.planning.churn.failure_trace import drawn_losses
    from skippipe.planning.churn.trace_files import load_trace

    if arguments.churn is not None:
        rejoin_s = arguments.rejoin_s or 0.0
        return load_trace(arguments.churn, plan, rejoin_s=rejoin_s, duration_s=arguments.duration_s, seed=seed)
    rejoin_s = math.inf if arguments.rejoin_s is None else arguments.rejoin_s
    mtbf_s, duration_s = arguments.mtbf_s or math.inf, arguments.duration_s or DAY_S
    if duration_s / mtbf_s > MOST_LOSSES:
        raise ConfigError(
            f"--mtbf {mtbf_s:g}: that is {duration_s / mtbf_s:.3g} losses in {duration_s:g} s, {MOST_LOSSES:,} are "
            "replayed at most; give a longer time between losses or a shorter --duration"
        )
    return drawn_losses(plan.nodes, mtbf_s, duration_s, rejoin_s=rejoin_s, seed=seed)


def _cost(entry: str) -> tuple[str, float]:
    name, _, number = entry.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LONGEST_S:
        raise ConfigError(f"--cost {entry}: expected NAME=SECONDS with a number from 0 to {LONGEST_S:g}")
    return name, value


def churn_summary(comparison: "ChurnComparison") -> dict[str, Any]:
    """Return what `--json` prints."""
    trace, plan = comparison.trace, comparison.plan
    return {
        "churn": {
            "duration_s": trace.duration_s,
            "losses": trace.num_losses,
            "present_share": trace.present_share(plan.nodes),
            "checkpoint_interval_s": comparison.interval_s if math.isfinite(comparison.interval_s) else None,
            "planned_sets": comparison.num_planned,
            "costs_s": asdict(comparison.options.costs),
            "methods": {
                name: {
                    "goodput": run.goodput,
                    "useful_s": run.useful_s,
                    "lost_s": dict(run.lost_s),
                    "rollbacks": run.rollbacks,
                    "changed_stages": run.changed_stages,
                }
                for name, run in comparison.runs.items()
            },
        }
    }


def churn_lines(comparison: "ChurnComparison") -> list[str]:
    """Return the table that the command prints: a column a method, a row a cause."""
    from skippipe.planning.churn.methods import Cause

    trace, runs = comparison.trace, comparison.runs
    widths = [max(len(name), 12) + 2 for name in runs]

    def row(title: str, cells: list[str]) -> str:
        return f"  {title:24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = [
        f"{trace.duration_s:.0f} s, {trace.num_losses} loss{'' if trace.num_losses == 1 else 'es'}, "
        f"{trace.present_share(comparison.plan.nodes):.1%} of the nodes there on the mean",
        row("", [*runs]),
        row("goodput", [f"{run.goodput:.1%}" for run in runs.values()]),
        row("useful", [f"{run.useful_s:.1f} s" for run in runs.values()]),
    ]
    for cause in get_args(Cause):
        lost_s = [run.lost_s.get(cause, 0.0) for run in runs.values()]
        if any(lost_s):
            lines.append(row(cause, [f"{value:.1f} s" if value else "-" for value in lost_s]))
    lines.append(row("back to a checkpoint", [str(run.rollbacks) for run in runs.values()]))
    lines.append(row("stages, other weights", [str(run.changed_stages) for run in runs.values()]))
    return [*lines, *comparison.notes()]
