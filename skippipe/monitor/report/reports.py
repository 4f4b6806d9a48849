"""The three reports: about a plan, about a run, about runs beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from skippipe.monitor.evaluation_results import Evaluation, read_evaluation
from skippipe.monitor.metrics import Metric
from skippipe.monitor.report.figures.curves import depth_figure, iteration_figure, loss_figure
from skippipe.monitor.report.figures.gantt import MOST_BARS, gantt_figure, select
from skippipe.monitor.report.figures.load_over_time import load_figure, memory_figure
from skippipe.monitor.report.figures.region_map import regions_figure
from skippipe.monitor.report.figures.route_map import routes_figure
from skippipe.monitor.report.page import Page, PageSection, Picture, write_report
from skippipe.monitor.report.run_record import RunRecord, read_run_record
from skippipe.monitor.report.spans import ChartSpan, end_s, timeline_spans
from skippipe.monitor.report.summary import (
    depth_table,
    gap,
    mean_utilisation,
    membership_table,
    memory_table,
    nodes_table,
    plans_table,
    runs_table,
    settings_table,
    tasks_table,
)
from skippipe.monitor.report.units import count, percent, relative, seconds
from skippipe.monitor.report.waits import path_tables
from skippipe_scheduler.analysis.critical_path import CriticalPath, critical_path
from skippipe_scheduler.analysis.explain import bottleneck
from skippipe_scheduler.analysis.usage import analyse
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import Timeline, simulate

SIMULATED = "Simulated exactly from the plan's costs."
MEASURED = "Measured by each node, from its own start of the iteration."


def write_plan_report(path: Path, plan: Plan, baselines: Mapping[str, Plan], what_binds: str = "") -> None:
    """Write the page about a plan beside its baselines, which are given by name.

    The first baseline is the reference of relative times; `what_binds` explains the lower bound.
    Raises `SkipPipeError` where it cannot be written.
    """
    plans = {"this plan": plan, **baselines}
    predicted, timeline = plan.predicted, simulate(plan)
    facts = {
        "Predicted iteration": seconds(predicted.iteration_s),
        "Lower bound": seconds(predicted.lower_bound_s),
        "Gap": percent(gap(plan)),
        "Mean utilisation": percent(mean_utilisation(timeline)),
    }
    reference = next(iter(baselines), "this plan")
    if baselines:
        ratio = relative(predicted.iteration_s / baselines[reference].predicted.iteration_s)
        facts["Relative time"] = f"{ratio} (iteration / {reference}'s)"
    path_of_plan = critical_path(plan, timeline)
    sentences = " ".join(filter(None, (bottleneck(plan, path_of_plan), what_binds)))
    comparison = PageSection("Predicted times", sentences, tables=[plans_table(plans, reference)])
    sections = [
        comparison,
        _iteration(plans, {}),
        _waits(plan, path_of_plan),
        _load(plan, timeline),
        *_regions({"": plan}),
        _routes({"": plan}),
        _nodes({"": plan}),
    ]
    write_report(path, Page("Plan", _size(plan), facts, sections))


def write_run_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write the page about a run (to RUN/report.html where `path` is None) and return where it is.

    Raises `InputError` where the directory is no run, or one of its files is wrong.
    """
    run = read_run_record(run_dir)
    name = run.experiment.name
    sections = _run_sections({name: run})
    sections.append(PageSection("Settings", tables=[settings_table(run.experiment, run.plan)]))
    target = path or run_dir / "report.html"
    write_report(target, Page(f"Run {name}", _size(run.plan), _run_facts(run), sections))
    return target


def write_runs_report(path: Path, run_dirs: Sequence[Path]) -> None:
    """Write the page that shows several runs by their experiments' names; see `write_comparison_report`."""
    runs = [read_run_record(folder) for folder in run_dirs]
    names = distinct([run.experiment.name for run in runs], run_dirs)
    _write_comparison(path, dict(zip(names, runs, strict=True)), f"{len(runs)} runs", {})


def write_comparison_report(path: Path, runs: Mapping[str, Path], title: str, facts: Mapping[str, str]) -> None:
    """Write the page that shows several runs (directories by name); `facts` are its headline.

    Raises `InputError` where a directory is no run, or one of its files is wrong.
    """
    _write_comparison(path, {name: read_run_record(folder) for name, folder in runs.items()}, title, facts)


def _write_comparison(path: Path, runs: Mapping[str, RunRecord], title: str, facts: Mapping[str, str]) -> None:
    write_report(path, Page(title, " · ".join(runs), facts, _run_sections(runs)))


def _run_sections(runs: Mapping[str, RunRecord]) -> list[PageSection]:
    plans = {name: run.plan for name, run in runs.items()}
    sections = [_times(runs), *_membership(runs), _iteration(plans, runs)]
    sections += [*_training(runs), *_depth(runs), *_memory(runs)]
    return [*sections, *_regions(plans), _routes(plans), _nodes(plans)]


def _membership(runs: Mapping[str, RunRecord]) -> list[PageSection]:
    tables = [membership_table(_capital(name), run) for name, run in runs.items() if run.changes]
    text = "Processes that were lost or came while the run went on."
    return [PageSection("Membership", text, tables=tables)] if tables else []


def _memory(runs: Mapping[str, RunRecord]) -> list[PageSection]:
    tables = [memory_table(_capital(name), run) for name, run in runs.items() if run.memory]
    return (
        [PageSection("Memory", "What each rank needed at most, beside what the plan said.", tables=tables)]
        if tables
        else []
    )


def _run_facts(run: RunRecord) -> dict[str, str]:
    facts = {"Predicted iteration": seconds(run.predicted_s)}
    if run.measured_s is not None and run.ratio is not None:
        facts |= {"Measured iteration": seconds(run.measured_s), "Measured / predicted": relative(run.ratio)}
    tokens, loss = run.last(Metric.TOKENS), run.last(Metric.TRAIN_LOSS)
    if tokens is not None:
        facts["Tokens"] = count(tokens)
    if loss is not None:
        facts["Training loss"] = f"{loss:.3f}"
    return facts


def _times(runs: Mapping[str, RunRecord]) -> PageSection:
    measured = {name: run.iterations_s for name, run in runs.items() if run.iterations_s}
    text = "How long an iteration takes, beside what the plan promised before the run."
    damaged = sum(run.damaged_lines for run in runs.values())
    if damaged:
        text += f" Damaged lines of metrics.jsonl that are left out: {damaged}."
    caption = (
        "Wall clock of an iteration, without validation and checkpoints; the first steps (at most ten) are "
        "left out as warm-up. The thin line spans the 5th to the 95th percentile."
    )
    predicted = {name: runs[name].predicted_s for name in measured}
    pictures = [Picture(iteration_figure(measured, predicted), caption)] if measured else []
    if not measured:
        text += " No step has been finished yet, so there is nothing measured."
    return PageSection("Predicted and measured time", text, pictures, [runs_table(runs)])


class _Chart(NamedTuple):
    """One Gantt chart before it is drawn."""

    title: str
    plan: Plan
    spans: list[ChartSpan]
    caption: str
    path: CriticalPath | None = None

    def picture(self, axis_end_s: float) -> Picture:
        chosen = select(self.plan, self.spans)
        figure = gantt_figure(self.plan, chosen.spans, self.title, axis_end_s, nodes=chosen.nodes, path=self.path)
        return Picture(figure, f"{self.caption} {chosen.note}".rstrip())


def _iteration(plans: Mapping[str, Plan], runs: Mapping[str, RunRecord]) -> PageSection:
    charts: list[_Chart] = []
    for name, plan in plans.items():
        timeline = simulate(plan)
        spans, path = timeline_spans(plan, timeline), critical_path(plan, timeline)
        charts.append(_Chart(f"{_capital(name)}, predicted", plan, spans, SIMULATED, path))
        measured = runs[name].measured if name in runs else None
        if measured is not None:
            title = f"{_capital(name)}, measured in step {measured.step}"
            charts.append(_Chart(title, plan, list(measured.spans), MEASURED))
    last_s = max(end_s(chart.spans) for chart in charts)
    drawn = _within_limit(charts)
    left_out = ", ".join(chart.title for chart in charts if chart not in drawn)
    return PageSection(
        "One iteration",
        "What each node does when: one row a node, one bar a task, the microbatch's number in the bar. Where "
        "there is no bar, the node waits. "
        + ("A triangle is a relay: the node passes a message on. " if _relaying(plans) else "")
        + "The line below the bars is the critical path: what the end of the iteration "
        "waits for. All charts have the same time axis. Drag to zoom, double-click to zoom out."
        + (f" Left out to keep the page quick: {left_out}." if left_out else ""),
        [chart.picture(last_s) for chart in drawn],
    )


def _within_limit(charts: Sequence[_Chart]) -> list[_Chart]:
    """Return the first chart and the further ones that leave the page with `MOST_BARS` bars at most."""
    drawn, bars = list(charts[:1]), min(len(charts[0].spans), MOST_BARS)
    for chart in charts[1:]:
        if bars + len(chart.spans) <= MOST_BARS:
            drawn.append(chart)
            bars += len(chart.spans)
    return drawn


def _waits(plan: Plan, path: CriticalPath) -> PageSection:
    text = "The critical path, from start to end: only what shortens something on it can shorten the iteration."
    return PageSection("What the iteration waits for", text, tables=path_tables(plan, path))


def _load(plan: Plan, timeline: Timeline) -> PageSection:
    analysis = analyse(plan, timeline)
    return PageSection(
        "Load and memory over time",
        "One row a node, from the start of the iteration to its end.",
        [
            Picture(load_figure(plan, analysis), "Darker: the node computes for more of that part of the iteration."),
            Picture(
                memory_figure(plan, analysis), "Most microbatches held at a time, out of those that the node fits."
            ),
        ],
    )


def _training(runs: Mapping[str, RunRecord]) -> list[PageSection]:
    steps = {name: run.steps for name, run in runs.items() if run.steps}
    if not steps:
        return []
    over_tokens = Picture(
        loss_figure(steps, Metric.TOKENS, "tokens seen"),
        "Mean loss of each iteration over the tokens trained on so far.",
    )
    over_time = Picture(
        loss_figure(steps, Metric.ELAPSED_S, "time (s)"),
        "The same over wall-clock time since the start of training, without validation and checkpoints.",
    )
    text = "Lower is better. Validation is at full depth on text that training never sees."
    return [PageSection("Loss", text, [over_tokens, over_time])]


def write_depth_comparison(path: Path, files: Sequence[Path]) -> None:
    """Write the page with what several files of `skippipe evaluate` say, in one picture.

    Raises `InputError` where a file is missing or wrong.
    """
    evaluations = [read_evaluation(file) for file in files]
    places = [file.parent if file.name == "evaluation.json" else file for file in files]
    names = distinct([evaluation.model for evaluation in evaluations], places)
    write_depth_report(path, dict(zip(names, evaluations, strict=True)))


def distinct(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Return the names, with the path behind those that are there twice."""
    return [name if names.count(name) == 1 else f"{name} ({path})" for name, path in zip(names, paths, strict=True)]


def write_depth_report(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Write the page about models with part of their depth; raises `SkipPipeError` where it cannot be written."""
    write_report(path, Page("Perplexity against the depth computed", sections=[depth_section(evaluations)]))


def _depth(runs: Mapping[str, RunRecord]) -> list[PageSection]:
    evaluated = {name: run.evaluation for name, run in runs.items() if run.evaluation}
    if not evaluated:
        text = "Not measured yet: run `skippipe evaluate RUN`, then write this page again."
        return [PageSection("Perplexity with part of the depth", text)]
    return [depth_section(evaluated, list(filter(None, (_other_step(name, run) for name, run in runs.items()))))]


def _other_step(name: str, run: RunRecord) -> str | None:
    """Return a sentence where a run was evaluated at another step than the last that its metrics have."""
    last = run.last(Metric.STEP)
    if run.evaluation is None or last is None or run.evaluation.checkpoint == f"step-{int(last):08d}":
        return None
    return (
        f"{_capital(name)} is at step {int(last)}, so these are not its newest weights: `skippipe evaluate RUN` "
        "measures the newest checkpoint."
    )


def depth_section(evaluated: Mapping[str, Evaluation], remarks: Sequence[str] = ()) -> PageSection:
    """Return perplexity against the depth computed, as a picture and a table; `remarks` stand above them."""
    policies = ", ".join(sorted({policy for evaluation in evaluated.values() for policy in evaluation.policies}))
    caption = f"What runs is chosen by: {policies}. Error bars: standard deviation over repeated choices."
    if len(evaluated) > 1:
        caption += " A policy has one colour and marker, a model one line style."
    measured = "; ".join(f"{evaluation.checkpoint} of {name}" for name, evaluation in evaluated.items())
    text = " ".join(
        [
            "How well the trained model does when only a part of it runs. Lower and flatter is better.",
            f"Measured: {measured}.",
            *remarks,
        ]
    )
    picture = Picture(depth_figure(evaluated), caption)
    tables = [depth_table(evaluated)]
    if any(evaluation.tasks for evaluation in evaluated.values()):
        tables.append(tasks_table(evaluated))
    return PageSection("Perplexity with part of the depth", text, [picture], tables)


def _regions(plans: Mapping[str, Plan]) -> list[PageSection]:
    caption = (
        "The more messages cross between two regions, both ways, the wider their line. Distances are the time that a "
        "message is on its way, as far as a plane can show it."
    )
    pictures = [
        Picture(regions_figure(plan), f"{_capital(name)}. {caption}" if name else caption)
        for name, plan in plans.items()
        if len(set(plan.regions or ())) > 1
    ]
    text = "What crosses between regions in an iteration. Point at a region, or at the middle of a line, for details."
    return [PageSection("Regions", text, pictures)] if pictures else []


def _routes(plans: Mapping[str, Plan]) -> PageSection:
    caption = (
        "One line a microbatch, in its origin's colour, from the origin on; the way back is not drawn. "
        "A line passes between the nodes of a stage that it skips. "
        "Pale bands are as wide as the traffic between two nodes."
    )
    if _relaying(plans):
        caption += (
            " A triangle on a line is a relay: the node passes the microbatch's messages on and computes nothing."
        )
    pictures = [
        Picture(routes_figure(plan), f"{_capital(name)}. {caption}" if name else caption)
        for name, plan in plans.items()
    ]
    return PageSection("Routes", "Which nodes each microbatch visits. Point at a line or a node for details.", pictures)


def _nodes(plans: Mapping[str, Plan]) -> PageSection:
    tables = [nodes_table(plan, simulate(plan), _capital(name)) for name, plan in plans.items()]
    return PageSection("Nodes", tables=tables)


def _relaying(plans: Mapping[str, Plan]) -> bool:
    return any(plan.has_relays for plan in plans.values())


def _size(plan: Plan) -> str:
    stages = "/".join(str(len(stage.nodes)) for stage in plan.stages)
    return (
        f"{len(plan.nodes)} nodes, {len(plan.stages)} stages with {stages} replicas, "
        f"{len(plan.microbatches)} microbatches over {plan.rules.describe_lengths()} stages each. Plan {plan.hash}."
    )


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
