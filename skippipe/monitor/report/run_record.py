"""Reading a run directory. A crash may have cut files short: damaged lines are counted, not fatal."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_run
from skippipe.errors import InputError
from skippipe.monitor.evaluation_results import Evaluation, read_evaluation
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import metrics_lines
from skippipe.monitor.report.spans import ChartSpan, end_s
from skippipe.monitor.run_events import MembershipChange, read_changes
from skippipe_scheduler.files import json_lines, parse, read_json
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan

WARM_UP_STEPS = 10
Step = dict[str, float]
"""The numbers of one step by their keys, which are those of `Metric`."""
_SPAN = TypeAdapter(ChartSpan)


class RankMemory(BaseModel):
    """What one rank needed at most: the plan's estimate, its parts, and what was measured."""

    rank: int
    node: str
    estimated_bytes: int
    state_bytes: int
    copy_bytes: int
    activation_bytes: int
    working_bytes: int
    message_bytes: int
    update_bytes: int
    peak_bytes: int


class Memory(BaseModel):
    """memory.json."""

    ranks: list[RankMemory]


@dataclass(frozen=True)
class MeasuredIteration:
    """What every node did in one recorded step."""

    step: int
    spans: Sequence[ChartSpan]


@dataclass(frozen=True)
class RunRecord:
    """A run directory's content."""

    folder: Path
    experiment: Experiment
    plan: Plan
    steps: Sequence[Step]
    damaged_lines: int
    evaluation: Evaluation | None
    measured: MeasuredIteration | None
    memory: Sequence[RankMemory]
    changes: Sequence[MembershipChange]

    @property
    def iterations_s(self) -> list[float]:
        """Measured iteration times of the plan in seconds, the first ones (warm-up, at most half of all) left out.

        Steps that a recipe ran under another plan, with another prediction, do not count.
        """
        durations = [
            step[Metric.ITERATION_S]
            for step in self.steps
            if Metric.ITERATION_S in step and step.get(Metric.PREDICTED_S, self.predicted_s) == self.predicted_s
        ]
        return durations[min(WARM_UP_STEPS, len(durations) // 2) :]

    @property
    def measured_s(self) -> float | None:
        """Median measured iteration time in seconds, None before the first step."""
        durations = self.iterations_s
        return statistics.median(durations) if durations else None

    @property
    def predicted_s(self) -> float:
        """Iteration time in seconds that the plan promises."""
        return self.plan.predicted.iteration_s

    @property
    def ratio(self) -> float | None:
        """Measured over predicted iteration time."""
        return self.measured_s / self.predicted_s if self.measured_s and self.predicted_s else None

    def last(self, metric: Metric) -> float | None:
        """Return the newest value of a metric, None where it was never recorded."""
        return next((step[metric] for step in reversed(self.steps) if metric in step), None)

    def median(self, metric: Metric) -> float | None:
        """Return the median of a metric over all steps, None where it was never recorded."""
        values = [step[metric] for step in self.steps if metric in step]
        return statistics.median(values) if values else None


def read_run_record(folder: Path) -> RunRecord:
    """Read a run directory.

    Raises `InputError` where the directory, config.yaml or plan.json is missing, or a file is wrong.
    """
    for name in ("", "config.yaml", "plan.json"):
        if not (folder / name).exists():
            raise InputError(
                f"{folder / name}: no such {'file' if name else 'directory'}; "
                "give the run directory that `skippipe train` wrote"
            )
    steps, damaged = _read_steps(folder / "metrics.jsonl")
    experiment, plan, changes = load_run(folder), load_plan(folder / "plan.json"), read_changes(folder)
    return RunRecord(
        folder=folder,
        experiment=experiment,
        plan=plan,
        steps=steps,
        damaged_lines=damaged,
        evaluation=read_evaluation(folder / "evaluation.json") if (folder / "evaluation.json").exists() else None,
        measured=_read_trace(folder / "trace", changes[-1].members if changes else plan.nodes),
        memory=_read_memory(folder / "memory.json"),
        changes=changes,
    )


def _read_steps(path: Path) -> tuple[list[Step], int]:
    """Return the steps in order, each once (the newest, where a resumed run redid it), and damaged lines."""
    steps: dict[int, Step] = {}
    damaged = 0
    for entry in metrics_lines(path) if path.exists() else ():
        if entry is None:
            damaged += 1
        else:
            steps[entry[Metric.STEP]] = {key: float(value) for key, value in entry.items() if _is_number(value)}
    return [steps[step] for step in sorted(steps)], damaged


def _read_memory(path: Path) -> list[RankMemory]:
    return parse(Memory, read_json(path, InputError), str(path), InputError).ranks if path.exists() else []


def _read_trace(folder: Path, present: Collection[str]) -> MeasuredIteration | None:
    """Return a recorded step of as many present nodes as possible: the one of the median duration, or the nearest.

    A lost node leaves the trace of its last steps behind, which the others have long forgotten.
    """
    by_step: dict[int, list[ChartSpan]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        in_name = re.search(r"step-(\d+)", path.stem)
        for content in json_lines(path):
            span = _span(content)
            if content is not None and span is not None:
                step = content.get("step", int(in_name[1]) if in_name else 0)
                by_step[step if isinstance(step, int) else 0].append(span)
    if not by_step:
        return None
    num_present = {step: len({span.node for span in spans}.intersection(present)) for step, spans in by_step.items()}
    most = max(num_present.values())
    durations_s = {step: end_s(spans) for step, spans in by_step.items() if num_present[step] == most}
    median_s = statistics.median(durations_s.values())
    chosen = min(durations_s, key=lambda step: abs(durations_s[step] - median_s))
    return MeasuredIteration(chosen, by_step[chosen])


def _span(content: dict[str, Any] | None) -> ChartSpan | None:
    fields = {name: content.get(name) for name in ChartSpan._fields} if content is not None else {}
    try:
        return _SPAN.validate_python(fields)
    except ValidationError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
