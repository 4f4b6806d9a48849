"""Kill and freeze processes of a run at random instants; see whether the others go on, how soon, with which losses.

    python benchmarks/faults/run.py [--runs N] [--seed S]

Every run has 7 processes on this machine. Two of them are killed with SIGKILL (`death`), one after the other, at random
instants: in any phase of a step, of a validation, of a checkpoint, or of the recovery from the death before. Or they
are stopped with SIGSTOP for longer than `recovery.silence_s` (`silence`) and woken again, or for half of it (`pause`).
Or each is killed and started again at once (`return`), the second one after the first is back.
Afterwards the losses are compared with those of one process that walks the plans of all epochs in turn.
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

from common.one_machine import free_port
from common.small_experiment import small_experiment
from common.table import machine
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

HERE = Path(__file__).parent
NUM_NODES = 7
STEPS = {"death": 40, "silence": 40, "pause": 40, "return": 500}
"""Of a run of each kind; a process that is started again needs seconds until it is ready, in which the others train."""
STAGE_SIZES = (3, 2, 2)
LOSSES = 2
"""In each run: two nodes can be lost without a stage being left without one, if they are of different stages."""
SILENCE_S = 3.0
"""`recovery.silence_s`."""
LIMIT_S = 120.0
"""Seconds after which a run that has not ended counts as hanging."""
PRELOADED = ["skippipe.training.train_experiment", "transformers.models.llama.modeling_llama", "zmq"]


@dataclass
class Loss:
    """One process that was killed or stopped, and how the others went on."""

    node: str
    rank: int
    at_step: int
    recovery_s: float | None = None
    """As the run itself says: from the moment at which it was noticed until the new epoch began."""
    next_step_s: float | None = None
    """From the kill or stop until the next step was finished."""
    back_s: float | None = None
    """From its start again until it is in the run."""
    taking_in_s: float | None = None
    """For how long the others waited for it."""


@dataclass
class Outcome:
    """What came of one run."""

    kind: str
    number: int
    losses: list[Loss] = field(default_factory=list)
    exit_codes: list[int | None] = field(default_factory=list)
    steps: int = 0
    loss_difference: float | None = None
    leftover: int = 0
    error: str = ""

    @property
    def went_on(self) -> bool:
        """Whether all others finished the run, exactly, and each lost one ended without having done harm."""
        lost = {loss.rank for loss in self.losses} if self.kind != "pause" else set()
        expected = {"death": -signal.SIGKILL, "return": -signal.SIGKILL, "silence": 1}.get(self.kind)
        codes = [expected if rank in lost else 0 for rank in range(NUM_NODES)]
        codes += [0] * (len(lost) if self.kind == "return" else 0)
        whole = self.steps == STEPS[self.kind] and self.leftover == 0 and not self.error
        exact = self.loss_difference is not None and self.loss_difference < 1e-5
        return exact and whole and self.exit_codes == codes


def make_experiment(folder: Path, name: str, kind: str = "death", **sections: Any) -> Experiment:
    """Return a small experiment on 7 nodes."""
    content: dict[str, Any] = {
        "pipeline": {"stage_sizes": STAGE_SIZES, "planner": {"max_evaluations": 200}},
        "training": {"max_steps": STEPS[kind], "num_microbatches": 6},
        "optimizer": {"lr": 1e-3},
        "lr_scheduler": {"warmup_steps": 5},
        "evaluation": {"interval": 7, "batches": 1},
        "comm": {"timeout_s": 60.0},
        "recovery": {"enabled": True, "silence_s": SILENCE_S, "planning_s": 0.2},
    }
    for section, given in sections.items():
        content[section] = content.get(section, {}) | given
    return small_experiment(folder, name, NUM_NODES, **content)


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


class Processes(list[ForkServerProcess]):
    """The processes of a run, in the order in which they were started."""

    def __init__(self, experiment: Experiment, plan: Path) -> None:
        super().__init__()
        self._experiment, self._plan, self._port = experiment, plan, free_port()
        for rank in range(NUM_NODES):
            self.begin(rank)

    def begin(self, rank: int) -> None:
        """Start one as a launcher does, for the first time or again."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        place = {"RANK": rank, "WORLD_SIZE": NUM_NODES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port}
        log = self._experiment.run_path.with_name(f"{self._experiment.name}-{len(self)}.log")
        environment = {key: str(value) for key, value in place.items()}
        self.append(context.Process(target=train_rank, args=(self._experiment, self._plan, environment, log)))
        self[-1].start()


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
    for stage in generator.sample(plan.stages, LOSSES):
        node = generator.choice(stage.nodes)
        yield node, plan.rank_of[node]


def strike_in_turn(experiment: Experiment, plan: Path, processes: Processes, outcome: Outcome) -> None:
    """Kill or stop processes at random instants and watch how the others go on."""
    generator = random.Random(f"{outcome.kind}/{outcome.number}")
    metrics, events = experiment.run_path / "metrics.jsonl", experiment.run_path / "events.jsonl"
    deadline_s = time.monotonic() + LIMIT_S
    if not wait_for(metrics, 2, deadline_s):
        outcome.error = "no step was finished"
        return
    steps = STEPS[outcome.kind]
    for node, rank in victims(plan, generator):
        number = len(lines_of(events))
        time.sleep(generator.uniform(0.0, 0.5))
        process = processes[rank].pid
        assert process is not None
        begun_s, step = time.monotonic(), len(lines_of(metrics))
        os.kill(process, signal.SIGKILL if outcome.kind in ("death", "return") else signal.SIGSTOP)
        loss = Loss(node, rank, step)
        outcome.losses.append(loss)
        if outcome.kind == "pause":
            time.sleep(SILENCE_S / 2)
            os.kill(process, signal.SIGCONT)
        elif not wait_for(events, number + 1, deadline_s):
            outcome.error = f"the loss of {node} was followed by no epoch"
            return
        else:
            loss.recovery_s = lines_of(events)[number]["total_s"]
        before = len(lines_of(metrics))
        if before < steps and not wait_for(metrics, before + 1, deadline_s):
            outcome.error = f"no step after the loss of {node}"
            return
        loss.next_step_s = time.monotonic() - begun_s
        if outcome.kind == "silence":
            os.kill(process, signal.SIGCONT)
        if outcome.kind == "return":
            begun_s = time.monotonic()
            processes.begin(rank)
            if not wait_for(events, number + 2, deadline_s):
                outcome.error = f"{node} did not come back"
                return
            loss.back_s, loss.taking_in_s = time.monotonic() - begun_s, lines_of(events)[number + 1]["total_s"]


@dataclass(frozen=True)
class EpochSchedule:
    """Which plan each step of the reference walks."""

    last_steps: Sequence[int]
    names: Sequence[str]

    def plan_of(self, step: int) -> str:
        """Return the name of the plan of a step."""
        return self.names[bisect_left(self.last_steps, step)]


def reference_losses(folder: Path, run_dir: Path, plan_path: Path, name: str) -> list[float]:
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
    off: dict[str, Any] = {"checkpoint": {"interval": 0}, "recovery": {"enabled": False}}
    experiment = make_experiment(folder, f"alone-{name}", name.partition("-")[0], **off)
    with redirect_stdout(io.StringIO()), open_trainer(experiment, PlanSet(plan, further), alone) as trainer:
        last_steps = [*(event["step"] for event in events), experiment.training.max_steps]
        trainer.schedule = EpochSchedule(last_steps, [MAIN_PLAN, *further])  # type: ignore[assignment]  # same call
        trainer.run(StopSignal())
    return [entry[Metric.TRAIN_LOSS] for entry in read_metrics(experiment.run_path / "metrics.jsonl")]


def kept(run_dir: Path, event: dict[str, Any]) -> Path:
    """Return the plan file of the epoch that an event began."""
    return run_dir / "epochs" / f"epoch-{event['epoch']:04d}.plan.json"


def run(folder: Path, plan: Path, kind: str, number: int) -> Outcome:
    """Train once, with losses."""
    experiment, outcome = make_experiment(folder, f"{kind}-{number}", kind), Outcome(kind, number)
    processes = Processes(experiment, plan)
    strike_in_turn(experiment, plan, processes, outcome)
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
        outcome.steps = len({entry["step"] for entry in entries}) if len(entries) == STEPS[kind] else -len(entries)
        expected = reference_losses(folder, experiment.run_path, plan, f"{kind}-{number}")
        found = [entry[Metric.TRAIN_LOSS] for entry in entries]
        outcome.loss_difference = max(abs(one - other) for one, other in zip(found, expected, strict=False))
    return outcome


def summary(kind: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what all runs of a kind together show."""
    losses = [loss for outcome in outcomes for loss in outcome.losses]
    next_s = [loss.next_step_s for loss in losses]
    differences = [outcome.loss_difference for outcome in outcomes if outcome.loss_difference is not None]
    return {
        "kind": kind,
        "runs": len(outcomes),
        "went on to the end, exactly": sum(outcome.went_on for outcome in outcomes),
        "losses": len(losses),
        "of rank 0, with the store": sum(loss.rank == 0 for loss in losses),
        "next finished step, median s": _median(next_s),
        "longest s": max((round(duration_s, 2) for duration_s in next_s if duration_s is not None), default=None),
        "recovery as the run says, median s": _median([loss.recovery_s for loss in losses]),
        "in again after its start, median s": _median([loss.back_s for loss in losses]),
        "the others waited for it, median s": _median([loss.taking_in_s for loss in losses]),
        "largest difference of a loss": max(differences, default=None),
        "failed": [f"{outcome}" for outcome in outcomes if not outcome.went_on],
    }


def _median(durations_s: Sequence[float | None]) -> float | None:
    known = [duration_s for duration_s in durations_s if duration_s is not None]
    return round(statistics.median(known), 2) if known else None


@click.command()
@click.option(
    "--runs", default=100, show_default=True, help="Runs with two deaths each; a tenth as many of each other kind."
)
@click.option("--seed", default=0, show_default=True, help="Number of the first run; it gives the random instants.")
def main(runs: int, seed: int) -> None:
    """Run all and write results.json and results.md beside this file."""
    from skippipe.planning.experiment_plan import plan_experiment

    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = folder / "given.plan.json"
        plan_experiment(make_experiment(folder, "planned")).save(plan)
        for kind in STEPS:
            outcomes = []
            for number in range(seed, seed + (runs if kind == "death" else max(1, runs // 10))):
                outcomes.append(run(folder, plan, kind, number))
                report(folder, outcomes[-1])
            rows.append(summary(kind, outcomes))
    result = {"rows": rows, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results.md").write_text(page(result))


def report(folder: Path, outcome: Outcome) -> None:
    """Say what came of a run, with the last words of its processes where it failed."""
    click.echo(f"{'yes' if outcome.went_on else 'NO '}  {outcome}")
    if not outcome.went_on:
        for log in sorted(folder.glob(f"{outcome.kind}-{outcome.number}-*.log")):
            words = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[rank ")]
            click.echo(f"    {log.name}: {words[-1][:300] if words else ''}")


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    rows = result["rows"]
    titles = [title for title in rows[0] if title != "failed"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join(str(row[title]) for title in titles)} |" for row in rows]
    failed = [f"- {words}" for row in rows for words in row["failed"]]
    where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    title = f"# Lost processes: {NUM_NODES} processes, stages of {', '.join(map(str, STAGE_SIZES))} nodes"
    about = f"Made by `run.py`; see [the guide](../README.md). `recovery.silence_s` is {SILENCE_S:g}."
    return "\n".join([title, "", about, "", *lines, "", *failed, f"- {where}"]) + "\n"


if __name__ == "__main__":
    main()
