"""A run of 7 small processes that can be killed, stopped and cut off, and what one process says of its losses."""

import faulthandler
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from bisect import bisect_left
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.hosts import Hosts, move_to
from common.one_machine import free_port, rank_environment
from common.small_experiment import small_experiment
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

if TYPE_CHECKING:
    from skippipe_scheduler.plan.plan import Plan

NUM_NODES = 7
STAGE_SIZES = (3, 2, 2)
SILENCE_S = 3.0
"""`recovery.silence_s`."""
LIMIT_S = 120.0
"""Seconds after which a run that has not ended counts as hanging."""
PRELOADED = ["skippipe.training.train_experiment", "transformers.models.llama.modeling_llama", "zmq"]
PORT = 29500
"""Of the store where each process has a host of its own."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
"""Audit events of Python that change files without opening them."""


def make_experiment(folder: Path, name: str, max_steps: int, **sections: Any) -> Experiment:
    """Return a small experiment on 7 nodes."""
    content: dict[str, Any] = {
        "pipeline": {"stage_sizes": STAGE_SIZES, "planner": {"max_evaluations": 200}},
        "training": {"max_steps": max_steps, "num_microbatches": 6},
        "optimizer": {"lr": 1e-3},
        "lr_scheduler": {"warmup_steps": 5},
        "evaluation": {"interval": 7, "batches": 1},
        "comm": {"timeout_s": 60.0},
        "recovery": {"enabled": True, "silence_s": SILENCE_S, "planning_s": 0.2},
    }
    for section, given in sections.items():
        content[section] = content.get(section, {}) | given
    return small_experiment(folder, name, NUM_NODES, **content)


def become_rank(place: dict[str, str], log: Path, host: str | None) -> None:
    """Make this process a rank of one thread, perhaps on a host of its own; what it prints goes into a file."""
    import torch

    if host is not None:
        move_to(host)
    multiprocessing.set_start_method("fork", force=True)  # as a launcher leaves it: the server's keeps names of locks
    torch.set_num_threads(1)
    os.environ.update(place)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


class RunUnderWay(NamedTuple):
    """A run to which something is to be done at random instants."""

    generator: random.Random
    metrics: Path
    events: Path
    deadline_s: float


def wait_until_under_way(experiment: Experiment, kind: str, number: int) -> RunUnderWay | None:
    """Return the run of this kind and number once two steps are finished, None where they are not in time."""
    run_dir, deadline_s = experiment.run_path, time.monotonic() + LIMIT_S
    found = RunUnderWay(
        random.Random(f"{kind}/{number}"), run_dir / "metrics.jsonl", run_dir / "events.jsonl", deadline_s
    )
    return found if wait_for(found.metrics, 2, deadline_s) else None


def train_rank(experiment: Experiment, plan: Path, place: dict[str, str], log: Path, host: str | None) -> None:
    """Train as one process of several, perhaps on a host of its own; what it prints goes into a file."""
    from skippipe.cli.main import main
    from skippipe.config.experiment_file import save_experiment

    become_rank(place, log, host)
    faulthandler.register(signal.SIGUSR1)
    config = log.with_suffix(".yaml")
    save_experiment(experiment, config)
    note_writes(experiment.run_path, log.with_suffix(".writes"))
    main(["train", "--config", str(config), "--plan", str(plan)])


def note_writes(run_dir: Path, notes: Path) -> None:
    """Note from now on when this process changes something in a run's directory.

    Python's audit hooks see files that are opened, renamed and removed. What goes into a file that is open already
    (metrics.jsonl) shows there: no step may stand in it twice. A temporary file of its own, which no other process
    looks at, may go.
    """
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    inside, temporary = str(run_dir), f".{os.getpid()}.tmp"

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGING or (event == "open" and len(arguments) > 2 and (arguments[2] or 0) & WRITING):
            paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
            is_own = event == "os.remove" and paths[0].endswith(temporary)
            if any(path.startswith(inside) for path in paths) and not is_own:
                os.write(descriptor, f"{time.monotonic()} {event} {paths[0]}\n".encode())

    sys.addaudithook(note)


class Processes(list[ForkServerProcess]):
    """The processes of a run, in the order in which they were started; with `hosts` each has one of its own."""

    def __init__(
        self,
        experiment: Experiment,
        plan: Path,
        hosts: Hosts | None = None,
        num_ranks: int = NUM_NODES,
        *,
        own_disks: bool = False,
    ) -> None:
        """With `own_disks` each rank has a run directory of its own."""
        super().__init__()
        self._own_disks = own_disks
        self._num_ranks = num_ranks
        self._experiment, self._plan, self._hosts = experiment, plan, hosts
        self._address = ("127.0.0.1", free_port()) if hosts is None else (hosts.address(0), PORT)
        for rank in range(num_ranks):
            self.begin(rank)

    def begin(self, rank: int) -> None:
        """Start one as a launcher does, for the first time or again."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        environment = rank_environment(rank, self._num_ranks, *self._address)
        name = None if self._hosts is None else self._hosts.name(rank)
        arguments = (self.experiment_of(rank), self._plan, environment, self.log(len(self)), name)
        self.append(context.Process(target=train_rank, args=arguments))
        self[-1].start()

    def experiment_of(self, rank: int) -> Experiment:
        """Return what a rank is started with."""
        own = self._experiment.run_path
        update = {"run_dir": str(own.with_name(f"{own.name}-on-{rank}"))} if self._own_disks else {}
        return self._experiment.model_copy(update=update)

    def log(self, number: int) -> Path:
        """Return where one of them prints to."""
        return self._experiment.run_path.with_name(f"{self._experiment.name}-{number}.log")

    def writes_after(self, number: int, moment_s: float) -> list[str]:
        """Return what one of them has changed in the run's directory after a moment (`time.monotonic`)."""
        notes = self.log(number).with_suffix(".writes")
        entries = [line.split(" ", 1) for line in notes.read_text().splitlines()] if notes.exists() else []
        return [what for time_s, what in entries if float(time_s) > moment_s]

    def last_words(self, number: int) -> str:
        """Return the last line that one of them has logged."""
        lines = self.log(number).read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.startswith("[rank ")), "")

    def finish(self) -> list[int | None]:
        """Wait for all and return their exit codes, None for one that had to be ended."""
        deadline_s = time.monotonic() + LIMIT_S
        codes = []
        for process in self:
            process.join(max(0.1, deadline_s - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGUSR1)  # it says in its log where it hangs
                time.sleep(0.5)
                process.kill()
                process.join()
        return codes


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of JSON objects."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def wait_for(path: Path, count: int, deadline_s: float) -> bool:
    """Wait until a file has so many lines; say whether it has."""
    while time.monotonic() < deadline_s:
        if path.exists() and path.read_text().count("\n") >= count:
            return True
        time.sleep(0.003)
    return False


@dataclass(frozen=True)
class EpochSchedule:
    """Which plan each step of the reference walks."""

    last_steps: Sequence[int]
    names: Sequence[str]
    joining_steps: Collection[int]

    def plan_of(self, step: int) -> str:
        """Return the name of the plan of a step."""
        name = self.names[bisect_left(self.last_steps, step)]
        return f"{name}-joining" if step in self.joining_steps else name


def loss_difference(folder: Path, experiment: Experiment, plan_path: Path) -> float:
    """Return by how much losses of a run differ from those of one process that walks the plans of all its epochs.

    It is infinite where a step is missing or there twice.
    """
    entries = read_metrics(experiment.run_path / "metrics.jsonl")
    if [entry["step"] for entry in entries] != list(range(1, len(entries) + 1)):
        return float("inf")
    joining_steps = [entry["step"] for entry in entries if entry[Metric.PLAN] == "joining"]
    expected = reference_losses(folder, experiment, plan_path, len(entries), joining_steps)
    found = [float(entry[Metric.TRAIN_LOSS]) for entry in entries]
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def reference_losses(
    folder: Path, experiment: Experiment, plan_path: Path, num_steps: int, joining_steps: Collection[int]
) -> list[float]:
    """Return the losses of one process that walks the plan of every epoch for the steps that it had.

    In the `joining_steps` nodes that had come got their state, and only the others had microbatches.
    """
    from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
    from skippipe.runtime.ranks.context import DistributedContext
    from skippipe.training.loop import open_trainer
    from skippipe.training.signals import StopSignal
    from skippipe_scheduler.plan.validate import load_plan

    alone = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
    run_dir = experiment.run_path
    events, plan = lines_of(run_dir / "events.jsonl"), load_plan(plan_path)
    further = {f"epoch-{event['epoch']}": along(plan, load_plan(kept(run_dir, event))) for event in events}
    names = [MAIN_PLAN, *further]
    for event in events:
        if (joining := kept(run_dir, event, "joining")).exists():
            further[f"epoch-{event['epoch']}-joining"] = along(plan, load_plan(joining))
    name, steps = f"alone-{experiment.name}", experiment.training.max_steps
    off: dict[str, Any] = {"checkpoint": {"interval": 0}, "recovery": {"enabled": False}}
    training = {"max_steps": steps, "num_microbatches": len(plan.microbatches)}
    reference = make_experiment(folder, name, steps, evaluation={"interval": 0}, training=training, **off)
    with redirect_stdout(io.StringIO()), open_trainer(reference, PlanSet(plan, further), alone) as trainer:
        last_steps = [*(event["step"] for event in events), steps]
        trainer.schedule = EpochSchedule(last_steps, names, joining_steps)  # type: ignore[assignment]  # same call
        stop = StopSignal()
        return [trainer.one_step(stop).metrics[Metric.TRAIN_LOSS] for _ in range(num_steps)]


def along(main: "Plan", other: "Plan") -> "Plan":
    """Return the plan by which one process visits the stages as in `other`; it does not matter who holds them."""
    routes = [
        microbatch.model_copy(
            update={"route": tuple(main.stages[other.stage_of[node]].nodes[0] for node in microbatch.route)}
        )
        for microbatch in other.microbatches
    ]
    return main.model_copy(update={"microbatches": tuple(routes)})


def kept(run_dir: Path, event: dict[str, Any], kind: str = "plan") -> Path:
    """Return the plan file of the epoch that an event began, or that of its `joining` iteration."""
    return run_dir / "epochs" / f"epoch-{event['epoch']:04d}.{kind}.json"
