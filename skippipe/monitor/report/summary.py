"""Tables: predicted times beside bound and baselines, predicted beside measured, and every node's load."""

import statistics
from collections import Counter
from collections.abc import Mapping

from skippipe.config.experiment import Experiment
from skippipe.monitor.evaluation_results import Evaluation
from skippipe.monitor.metrics import Metric
from skippipe.monitor.report.page import Bar, Table
from skippipe.monitor.report.run_record import RunRecord
from skippipe.monitor.report.units import count, percent, relative, seconds, significant, visits_text
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import Timeline
from skippipe_scheduler.problem.memory import size_text

NONE = "–"


def plans_table(plans: Mapping[str, Plan], reference: str) -> Table:
    """Compare plans; the last column is each one's iteration time over that of the plan named `reference`."""
    reference_s = plans[reference].predicted.iteration_s
    rows = []
    for name, plan in plans.items():
        predicted = plan.predicted
        rows.append(
            (
                name,
                seconds(predicted.iteration_s),
                seconds(predicted.pipeline_s),
                seconds(predicted.reduce_exposed_s),
                seconds(predicted.lower_bound_s),
                percent(gap(plan)),
                relative(predicted.iteration_s / reference_s) if reference_s else NONE,
            )
        )
    return Table(
        "Predicted times of one iteration. Gap: the most by which an ideal plan could be shorter, "
        f"as a share of the iteration. Relative time: iteration / iteration of the {reference}.",
        ("Plan", "Iteration", "Pipeline", "Reduction not hidden", "Lower bound", "Gap", "Relative time"),
        rows,
    )


def runs_table(runs: Mapping[str, RunRecord]) -> Table:
    """Predicted beside measured iteration time, throughput and final losses of each run."""
    rows = []
    for name, run in runs.items():
        durations_s = run.iterations_s
        throughput, rate, mfu = map(run.median, (Metric.TOKENS_PER_S, Metric.TFLOP_PER_S, Metric.MFU))
        rows.append(
            (
                name,
                str(len(run.steps)),
                seconds(run.predicted_s),
                seconds(statistics.median(durations_s)) if durations_s else NONE,
                relative(run.ratio) if run.ratio else NONE,
                seconds(statistics.pstdev(durations_s)) if durations_s else NONE,
                f"{count(throughput)} tokens/s" if throughput is not None else NONE,
                f"{significant(rate)} TFLOP/s" if rate is not None else NONE,
                percent(mfu) if mfu is not None else NONE,
                _number(run.last(Metric.TRAIN_LOSS)),
                _number(run.last(Metric.VALIDATION_LOSS)),
            )
        )
    return Table(
        "Measured: median wall-clock time of an iteration after warm-up. Model FLOP: of the layers on the routes and "
        "the losses, on all nodes; MFU: their share of what the devices can do at most. Losses: the newest values.",
        (
            *("Run", "Steps", "Predicted", "Measured", "Measured / predicted", "Standard deviation"),
            *("Throughput", "Model FLOP", "MFU", "Training loss", "Validation loss"),
        ),
        rows,
    )


def membership_table(name: str, run: RunRecord) -> Table:
    """Who was lost and came, when, and what it cost."""
    rows = [
        (
            change.time.replace("T", " ").replace("Z", ""),
            count(change.step + 1),
            "; ".join(
                [
                    *(f"{node} lost ({cause})" for node, cause in change.lost.items()),
                    *(f"{node} joined" for node in change.joined),
                    *(each.words(change.step) for each in change.restored),
                    *([] if change.pace_change is None else [str(change.pace_change)]),
                ]
            )
            or change.reason,
            str(len(change.members)),
            ", ".join(map(str, change.absent_stages)) or NONE,
            *(seconds(change.durations_s.get(part, 0.0)) for part in ("agreement", "planning", "state", "groups")),
            seconds(change.total_s),
        )
        for change in run.changes
    ]
    return Table(
        f"{name}: changes of membership. In all: from the end of the old epoch until the new one ran, the parts before "
        "it included.",
        (
            *("UTC", "Next step", "What happened", "Nodes", "Stages nobody holds"),
            *("Agreement", "Plan", "State", "Groups", "In all"),
        ),
        rows,
    )


def memory_table(name: str, run: RunRecord) -> Table:
    """The memory that the plan promised each rank beside what it took."""
    rows = [
        (
            str(memory.rank),
            memory.node,
            size_text(memory.state_bytes),
            size_text(memory.copy_bytes),
            size_text(memory.activation_bytes),
            size_text(memory.working_bytes + memory.message_bytes),
            size_text(memory.update_bytes),
            size_text(memory.estimated_bytes),
            size_text(memory.peak_bytes),
            relative(memory.peak_bytes / memory.estimated_bytes) if memory.estimated_bytes else NONE,
        )
        for memory in run.memory
    ]
    return Table(
        f"{name}: memory at its peak. State: weights, gradients, optimizer. Copy: what a checkpoint is written from. "
        "Update: reduction and optimizer step, when activations and work are gone.",
        (
            *("Rank", "Node", "State", "Copy", "Activations", "Work and messages", "Update"),
            *("By plan", "Measured", "Measured / by plan"),
        ),
        rows,
    )


def depth_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Perplexity of each model under each policy at each share of depth, and its change against the deepest one."""
    rows = []
    for name, evaluation in evaluations.items():
        for policy, results in evaluation.by_policy().items():
            for result in results:
                spread = f" ± {significant(result.perplexity_std)}" if result.perplexity_std else ""
                change = result.perplexity / results[0].perplexity - 1
                rows.append(
                    (
                        name,
                        policy,
                        str(result.kept_stages) if result.kept_stages is not None else NONE,
                        percent(result.share_computed),
                        significant(result.perplexity, 4) + spread,
                        f"{change * 100:+.1f} %",
                    )
                )
    return Table(
        "Perplexity on held-out text; ±: standard deviation over repeated random choices of stages.",
        ("Model", "Policy", "Stages kept", "Depth computed", "Perplexity", "Change"),
        rows,
    )


def tasks_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Metrics of tasks, of each model under each policy at each share of depth."""
    rows = [
        (
            name,
            row.policy,
            percent(row.share_computed),
            row.task,
            row.metric,
            significant(row.value, 4) + (f" ± {significant(row.standard_error)}" if row.standard_error else ""),
        )
        for name, evaluation in evaluations.items()
        for row in evaluation.tasks
    ]
    caption = "Tasks of lm-eval; ±: standard error. Depth computed is that of the task's requests."
    return Table(caption, ("Model", "Policy", "Depth computed", "Task", "Metric", "Value"), rows)


def nodes_table(plan: Plan, timeline: Timeline, name: str = "") -> Table:
    """Utilisation, memory and traffic of each node in the simulated iteration."""
    regions = plan.regions or (NONE,) * len(plan.nodes)
    visits = Counter(node for microbatch in plan.microbatches for node in microbatch.route)
    relayed = Counter(node for microbatch in plan.microbatches for node in microbatch.relays)
    rows = []
    for node, region in sorted(zip(plan.nodes, regions, strict=True), key=lambda pair: plan.stage_of[pair[0]]):
        busy_s, held, room = timeline.busy_s[node], timeline.peak_memory[node], plan.costs.memory[node]
        share = busy_s / timeline.iteration_s if timeline.iteration_s else 0.0
        rows.append(
            (
                node,
                str(plan.stage_of[node]),
                region,
                visits_text(visits[node], relayed[node]),
                seconds(busy_s),
                Bar(percent(share), share),
                Bar(f"{held} of {room}", held / room),
            )
        )
    beginning = f"{name}: load" if name else "Load"
    return Table(
        f"{beginning} of each node in one iteration, simulated. Busy: computing, out of the whole iteration. "
        "Memory: most microbatches held at a time, of those that fit.",
        ("Node", "Stage", "Region", "Microbatches", "Busy time", "Busy", "Memory"),
        rows,
    )


def settings_table(experiment: Experiment, plan: Plan) -> Table:
    """The settings that one needs to read the rest."""
    training, pipeline = experiment.training, experiment.pipeline
    emulated = [name for name in ("links", "compute") if getattr(experiment.emulation, name)]
    tokens = training.num_microbatches * training.micro_batch_size * training.sequence_length
    rows = (
        ("Model", f"{experiment.model.directory or experiment.model.architecture}, {plan.num_layers} layers"),
        ("Nodes and stages", f"{len(plan.nodes)} nodes, {len(plan.stages)} stages"),
        (
            "Route",
            f"{plan.rules.describe_lengths()} of {len(plan.stages)} stages (skip ratio {pipeline.skip_ratio:g})",
        ),
        (
            "One iteration",
            f"{training.num_microbatches} microbatches × {training.micro_batch_size} samples × "
            f"{training.sequence_length} tokens = {count(tokens)} tokens",
        ),
        ("Number format", training.dtype),
        ("Emulated", " and ".join(emulated) or "nothing: real links and computation"),
        ("Plan", f"{plan.hash}, solved by {plan.solver.name} in {seconds(plan.solver.wall_s)}"),
        ("Seed", str(experiment.seed)),
    )
    return Table("Settings of the run; config.yaml in its directory has all of them.", ("Setting", "Value"), rows)


def gap(plan: Plan) -> float:
    """Return the share of the predicted iteration that lies above the lower bound."""
    predicted = plan.predicted
    return 1 - predicted.lower_bound_s / predicted.iteration_s if predicted.iteration_s else 0.0


def mean_utilisation(timeline: Timeline) -> float:
    """Return the nodes' mean busy share of the iteration."""
    if not timeline.iteration_s:
        return 0.0
    return statistics.fmean(timeline.busy_s.values()) / timeline.iteration_s


def _number(value: float | None) -> str:
    return NONE if value is None else significant(value, 4)
