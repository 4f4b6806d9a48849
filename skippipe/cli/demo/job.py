"""The demo: plan, train the full pipeline and SkipPipe on equal tokens, evaluate both at reduced depth, report."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from skippipe.cli.demo.ranks import run_ranks
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_experiment, save_experiment
from skippipe.inference.evaluation.perplexity import evaluate_model
from skippipe.monitor.evaluation_results import DepthResult
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics
from skippipe.monitor.report import write_comparison_report
from skippipe.planning.experiment_plan import plan_experiment
from skippipe_scheduler.plan.plan import Plan

RUNS = {"full pipeline": "full.yaml", "SkipPipe": "skippipe.yaml"}
KEEPS = (1.0, 0.67, 0.5)
WARM_UP_STEPS = 10
Announce = Callable[[str], None]


@dataclass(frozen=True)
class DemoRun:
    """What one of the two runs showed."""

    plan: Plan
    measured_s: float
    """Median iteration time after warm-up, seconds of wall clock."""
    depths: tuple[DepthResult, ...]

    @property
    def predicted_s(self) -> float:
        """Iteration time that the plan promised."""
        return self.plan.predicted.iteration_s

    @property
    def half_depth_loss(self) -> float:
        """Relative rise of perplexity from full depth to the smallest depth evaluated."""
        return self.depths[-1].perplexity / self.depths[0].perplexity - 1


@dataclass(frozen=True)
class DemoResult:
    """Both runs, by name, and where the page is."""

    runs: dict[str, DemoRun]
    report: Path
    wall_s: float

    @property
    def relative_time(self) -> float:
        """Measured iteration time of SkipPipe over that of the full pipeline."""
        return self.runs["SkipPipe"].measured_s / self.runs["full pipeline"].measured_s


def run_demo(out: Path, overrides: Sequence[str], announce: Announce) -> DemoResult:
    """Run the whole job into `out`; `overrides` (key.sub=value) apply to both experiments."""
    start_s = time.perf_counter()
    runs: dict[str, DemoRun] = {}
    folders: dict[str, Path] = {}
    experiments = {name: _experiment(file_name, out, overrides) for name, file_name in RUNS.items()}
    plans = {}
    for name, experiment in experiments.items():
        announce(f"planning: {name}")
        plans[name] = plan_experiment(experiment)
        announce(f"  predicted iteration {plans[name].predicted.iteration_s:.3f} s")
    for name, experiment in experiments.items():
        announce(f"training: {name}, {experiment.training.max_steps} steps on {len(plans[name].nodes)} ranks")
        _train(experiment, plans[name])
        folders[name] = experiment.run_path
    for name, folder in folders.items():
        announce(f"evaluating: {name}")
        depths = tuple(evaluate_model(folder, policies=["random"], keeps=KEEPS).results)
        runs[name] = DemoRun(plans[name], measured_iteration_s(folder), depths)
    report = out / "report.html"
    result = DemoResult(runs, report, time.perf_counter() - start_s)
    write_comparison_report(
        report, folders, title="SkipPipe beside the full pipeline", facts=_facts(result, experiments)
    )
    return result


def measured_iteration_s(run_dir: Path) -> float:
    """Return the median measured iteration time of a run after warm-up, seconds."""
    durations = [float(entry[Metric.ITERATION_S]) for entry in read_metrics(run_dir / "metrics.jsonl")]
    return statistics.median(durations[min(WARM_UP_STEPS, len(durations) // 2) :])


def _experiment(file_name: str, out: Path, overrides: Sequence[str]) -> Experiment:
    template = Path(str(files("skippipe.cli.demo") / file_name))
    name = load_experiment(template).name
    return load_experiment(template, [*overrides, f"run_dir={out / name}"])


def _train(experiment: Experiment, plan: Plan) -> None:
    run_dir = experiment.run_path
    run_dir.mkdir(parents=True, exist_ok=True)
    save_experiment(experiment, run_dir / "experiment.yaml")
    plan.save(run_dir / "plan.json")
    arguments = ["train", "--config", str(run_dir / "experiment.yaml"), "--plan", str(run_dir / "plan.json")]
    run_ranks(arguments, len(plan.nodes))


def _facts(result: DemoResult, experiments: dict[str, Experiment]) -> dict[str, str]:
    full, skip = result.runs["full pipeline"], result.runs["SkipPipe"]
    training = experiments["SkipPipe"].training
    tokens = training.max_steps * training.num_microbatches * training.micro_batch_size * training.sequence_length
    return {
        "Relative time": f"{result.relative_time:.2f} (iteration / full pipeline's: "
        f"{skip.measured_s:.3f} s / {full.measured_s:.3f} s, median)",
        "Measured / predicted": f"{skip.measured_s / skip.predicted_s:.2f} (SkipPipe), "
        f"{full.measured_s / full.predicted_s:.2f} (full pipeline)",
        "Half the depth costs": f"{skip.half_depth_loss:+.1%} perplexity (SkipPipe), "
        f"{full.half_depth_loss:+.1%} (full pipeline)",
        "Tokens": f"{tokens:,} in each run, the same in the same order",
    }
