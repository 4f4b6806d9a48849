"""Kill processes of a run at random instants; see whether the others go on, how soon, and with which losses.

    python benchmarks/faults/run.py [--runs N] [--seed S]

Every run has 7 processes on this machine. In each, two of them are killed with SIGKILL, one after the other, at random
instants: in any phase of a step, of a validation, of a checkpoint, or of the recovery from the death before. Afterwards
the losses are compared with those of one process that walks the plans of all epochs in turn.
"""

import io
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click

from common.one_machine import CLUSTER, free_port
from common.table import machine
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

HERE = Path(__file__).parent
NUM_NODES = 7
STEPS = 40
STAGE_SIZES = (3, 2, 2)
DEATHS = 2
"""In each run: two nodes can be lost without a stage being left without one, if they are of different stages."""
LIMIT_S = 120.0
"""Seconds after which a run that has not ended counts as hanging."""
PRELOADED = ["skippipe.training.train_experiment", "transformers.models.llama.modeling_llama", "zmq"]


@dataclass
class Death:
    """One process that was killed, and how the others went on."""

    node: str
    rank: int
    at_step: int
    recovery_s: float | None = None
    """As the run itself says: from the moment at which it was noticed until the new epoch began."""
    next_step_s: float | None = None
    """From the kill until the next step was finished."""


@dataclass
class Outcome:
    """What came of one run."""

    number: int
    deaths: list[Death] = field(default_factory=list)
    exit_codes: list[int | None] = field(default_factory=list)
    steps: int = 0
    loss_difference: float | None = None
    leftover: int = 0
    error: str = ""

    @property
    def went_on(self) -> bool:
        """Whether all others finished the run, exactly."""
        codes = sorted(code if code is not None else 99 for code in self.exit_codes)
        whole = self.steps == STEPS and self.leftover == 0 and not self.error
        exact = self.loss_difference is not None and self.loss_difference < 1e-5
        return whole and exact and codes == [-signal.SIGKILL] * len(self.deaths) + [0] * (NUM_NODES - len(self.deaths))


def make_experiment(folder: Path, name: str, **sections: Any) -> Experiment:
    """Return a small experiment on 7 nodes."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {NUM_NODES}"))
        for number in range(12):
            words = [f"line {line} of text {number} has {line * number} words\n" for line in range(60)]
            (text / f"{number}.txt").write_text("".join(words))
    content: dict[str, Any] = {
        "name": name,
        "run_dir": str(folder / name),
        "seed": 3,
        "cluster": str(folder / "cluster.yaml"),
        "model": {
            "options": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
            | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}
        },
        "data": {"source": "text", "paths": [str(text)], "cache_dir": str(folder / "cache")},
        "pipeline": {"num_stages": 3, "stage_sizes": STAGE_SIZES, "planner": {"max_evaluations": 200}},
        "training": {"max_steps": STEPS, "num_microbatches": 6, "micro_batch_size": 2, "sequence_length": 16}
        | {"device": "cpu", "threads": 1},
        "optimizer": {"lr": 1e-3},
        "lr_scheduler": {"warmup_steps": 5},
        "checkpoint": {"interval": 5},
        "evaluation": {"interval": 7, "batches": 1},
        "logging": {"wandb": {"mode": "disabled"}},
        "comm": {"timeout_s": 60.0},
        "recovery": {"enabled": True, "silence_s": 5.0, "planning_s": 0.2},
    }
    for section, given in sections.items():
        content[section] = content[section] | given
    return Experiment.model_validate(content)


def train_rank(experiment: Experiment, plan: Path, place: dict[str, str], log: Path) -> None:
    """Train as one process of several; what it prints goes into a file."""
    import torch

    from skippipe.cli.main import main
    from skippipe.config.experiment_file import save_experiment

    torch.set_num_threads(1)
    os.environ.update(place)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    config = log.with_suffix(".yaml")
    save_experiment(experiment, config)
    main(["train", "--config", str(config), "--plan", str(plan)])


def start(experiment: Experiment, plan: Path) -> list[ForkServerProcess]:
    """Start the processes of a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, processes = free_port(), []
    for rank in range(NUM_NODES):
        place = {"RANK": rank, "WORLD_SIZE": NUM_NODES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = experiment.run_path.with_name(f"{experiment.name}-{rank}.log")
        environment = {key: str(value) for key, value in place.items()}
        processes.append(context.Process(target=train_rank, args=(experiment, plan, environment, log)))
        processes[-1].start()
    return processes


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of JSON objects."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def wait_for(path: Path, count: int, deadline_s: float) -> bool:
    """Wait until a file has so many lines; say whether it has."""
    while time.monotonic() < deadline_s:
        if len(lines_of(path)) >= count:
            return True
        time.sleep(0.003)
    return False


def victims(plan_path: Path, generator: random.Random) -> Iterator[tuple[str, int]]:
    """Yield nodes of different stages and their ranks, in the order of their deaths."""
    from skippipe_scheduler.plan.validate import load_plan

    plan = load_plan(plan_path)
    for stage in generator.sample(plan.stages, DEATHS):
        node = generator.choice(stage.nodes)
        yield node, plan.rank_of[node]


def kill_in_turn(experiment: Experiment, plan: Path, processes: list[ForkServerProcess], outcome: Outcome) -> None:
    """Kill processes at random instants and watch how the others go on."""
    generator = random.Random(outcome.number)
    metrics, events = experiment.run_path / "metrics.jsonl", experiment.run_path / "events.jsonl"
    deadline_s = time.monotonic() + LIMIT_S
    if not wait_for(metrics, 2, deadline_s):
        outcome.error = "no step was finished"
        return
    for number, (node, rank) in enumerate(victims(plan, generator)):
        time.sleep(generator.uniform(0.0, 0.5))
        process = processes[rank].pid
        assert process is not None
        begun_s, step = time.monotonic(), len(lines_of(metrics))
        os.kill(process, signal.SIGKILL)
        death = Death(node, rank, step)
        outcome.deaths.append(death)
        if not wait_for(events, number + 1, deadline_s):
            outcome.error = f"the death of {node} was followed by no epoch"
            return
        death.recovery_s = lines_of(events)[number]["recovery_s"]
        before = len(lines_of(metrics))
        if before < STEPS and not wait_for(metrics, before + 1, deadline_s):
            outcome.error = f"no step after the death of {node}"
            return
        death.next_step_s = time.monotonic() - begun_s


@dataclass(frozen=True)
class EpochSchedule:
    """Which plan each step of the reference walks."""

    last_steps: Sequence[int]
    names: Sequence[str]

    def plan_of(self, step: int) -> str:
        """Return the name of the plan of a step."""
        return self.names[bisect_left(self.last_steps, step)]


def reference_losses(folder: Path, run_dir: Path, plan_path: Path, number: int) -> list[float]:
    """Return the losses of one process that walks the plan of every epoch for the steps that it had."""
    from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
    from skippipe.runtime.ranks.context import DistributedContext
    from skippipe.training.loop import open_trainer
    from skippipe.training.signals import StopSignal
    from skippipe_scheduler.plan.validate import load_plan

    alone = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
    events, plan = lines_of(run_dir / "events.jsonl"), load_plan(plan_path)
    # One process follows routes, whoever holds the stages: all epochs' routes lie on the nodes of the first.
    further = {
        f"epoch-{event['epoch']}": plan.model_copy(
            update={"microbatches": load_plan(kept(run_dir, event)).microbatches}
        )
        for event in events
    }
    experiment = make_experiment(folder, f"alone-{number}", checkpoint={"interval": 0}, recovery={"enabled": False})
    with redirect_stdout(io.StringIO()), open_trainer(experiment, PlanSet(plan, further), alone) as trainer:
        last_steps = [*(event["step"] for event in events), STEPS]
        trainer.schedule = EpochSchedule(last_steps, [MAIN_PLAN, *further])  # type: ignore[assignment]  # same call
        trainer.run(StopSignal())
    return [entry[Metric.TRAIN_LOSS] for entry in read_metrics(experiment.run_path / "metrics.jsonl")]


def kept(run_dir: Path, event: dict[str, Any]) -> Path:
    """Return the plan file of the epoch that an event began."""
    return run_dir / "epochs" / f"epoch-{event['epoch']:04d}.plan.json"


def run(folder: Path, plan: Path, number: int) -> Outcome:
    """Train once, with deaths."""
    experiment, outcome = make_experiment(folder, f"run-{number}"), Outcome(number)
    processes = start(experiment, plan)
    kill_in_turn(experiment, plan, processes, outcome)
    deadline_s = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(0.1, deadline_s - time.monotonic()))
        outcome.exit_codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    outcome.leftover = sum(process.is_alive() for process in processes)
    if not outcome.error:
        entries = read_metrics(experiment.run_path / "metrics.jsonl")
        outcome.steps = len({entry["step"] for entry in entries}) if len(entries) == STEPS else -len(entries)
        expected = reference_losses(folder, experiment.run_path, plan, number)
        found = [entry[Metric.TRAIN_LOSS] for entry in entries]
        outcome.loss_difference = max(abs(one - other) for one, other in zip(found, expected, strict=False))
    return outcome


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what all runs together show."""
    deaths = [death for outcome in outcomes for death in outcome.deaths]
    next_s = sorted(death.next_step_s for death in deaths if death.next_step_s is not None)
    recovery_s = sorted(death.recovery_s for death in deaths if death.recovery_s is not None)
    differences = [outcome.loss_difference for outcome in outcomes if outcome.loss_difference is not None]
    return {
        "runs": len(outcomes),
        "runs that went on to the end, exactly": sum(outcome.went_on for outcome in outcomes),
        "deaths": len(deaths),
        "of them rank 0, which had the store": sum(death.rank == 0 for death in deaths),
        "next finished step, median s": round(statistics.median(next_s), 2) if next_s else None,
        "next finished step, longest s": round(next_s[-1], 2) if next_s else None,
        "recovery by the run itself, median s": round(statistics.median(recovery_s), 2) if recovery_s else None,
        "recovery by the run itself, longest s": round(recovery_s[-1], 2) if recovery_s else None,
        "largest difference of a loss": max(differences, default=None),
        "what failed": [f"run {outcome.number}: {outcome}" for outcome in outcomes if not outcome.went_on],
    }


@click.command()
@click.option("--runs", default=100, show_default=True, help="Runs, with two deaths each.")
@click.option("--seed", default=0, show_default=True, help="Number of the first run; it gives the random instants.")
def main(runs: int, seed: int) -> None:
    """Run all and write results.json and results.md beside this file."""
    from skippipe.planning.experiment_plan import plan_experiment

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = folder / "given.plan.json"
        plan_experiment(make_experiment(folder, "planned")).save(plan)
        outcomes = []
        for number in range(seed, seed + runs):
            outcome = run(folder, plan, number)
            outcomes.append(outcome)
            click.echo(f"{'yes' if outcome.went_on else 'NO '}  {outcome}")
            if not outcome.went_on:
                for log in sorted(folder.glob(f"run-{number}-*.log")):
                    words = [line for line in log.read_text(errors="replace").splitlines() if "[rank" in line[:6]]
                    click.echo(f"    {log.name}: {words[-1] if words else ''}")
    result = summary(outcomes) | {"date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results.md").write_text(page(result))


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    rows = [f"| {key} | {'; '.join(value) if isinstance(value, list) else value} |" for key, value in result.items()]
    title = f"# Deaths at random instants: {NUM_NODES} processes, stages of {STAGE_SIZES} nodes"
    return "\n".join([title, "", "Made by `run.py`.", "", "| | |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    main()
