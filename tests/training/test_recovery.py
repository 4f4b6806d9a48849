"""A process dies in the middle of a run: the others go on from the same step, exactly, and it comes back."""

import hashlib
import json
import math
import signal
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from processes import ForkedProcess, free_port, preloaded, run_skippipe
from random_plans import random_plan
from safetensors.torch import save
from training_runs import ALONE, CLUSTER, disk_of, losses, make_experiment, write_inputs

from skippipe.checkpoint.held_files import held_files
from skippipe.checkpoint.reader import latest_checkpoint, read_metadata
from skippipe.errors import CommunicationError
from skippipe.monitor.live.run_status import read_status
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics
from skippipe.monitor.report.reports import write_run_report
from skippipe.monitor.run_events import MembershipChange, read_changes
from skippipe.runtime.plans.plan_set import JOINING_PLAN, MAIN_PLAN, PlanSet
from skippipe.training.loop import open_trainer
from skippipe.training.recovery.progress import ProgressReport, Settlement, settle
from skippipe.training.signals import StopSignal
from skippipe.training.steps.step_totals import FinishedStep, StepBegin, StepTotals
from skippipe.training.steps.step_update import StepUpdate
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan

WORLD_SIZE = 4
FATAL_STEP = 4
PLAN_SEED = 2
SOLE = "node-2"
"""The only one that holds its stage."""
LIMIT_S = 100.0
DESCRIPTORS_OF_AN_EPOCH = 12
"""Of its process groups: three connections each, of four groups. Other connections differ by one or two with roles."""
MAX_STEPS = 100_000
"""More than are taken: the runs are stopped."""
BEYOND = 3
"""Steps that are taken in the last epoch."""
RECIPE = {
    "layer_dropout": {"probability": 0.5, "over_depth": "uniform"},
    "ffn_dropout": {"probability": 0.5, "over_depth": "uniform"},
}


def first_stage_alone_plan(time_scale_s: float = 1.0) -> Plan:
    """Return a plan of 3 nodes: one alone holds stage 0, and two the other stage."""
    plan = random_plan(
        2,
        num_nodes=3,
        num_stages=2,
        route_length=2,
        num_microbatches=4,
        layers_per_stage=3,
        time_scale_s=time_scale_s,
    )
    assert [stage.nodes for stage in plan.stages] == [("node-0",), ("node-2", "node-1")]
    return plan


def four_node_plan() -> Plan:
    """Return a plan of 4 nodes: two hold stage 0, and one each of the others."""
    plan = random_plan(
        PLAN_SEED, num_nodes=WORLD_SIZE, num_stages=3, route_length=2, num_microbatches=4, layers_per_stage=2
    )
    assert [stage.nodes for stage in plan.stages] == [("node-0", "node-1"), ("node-3",), (SOLE,)]
    return plan


def death_of(victim: str, point: str) -> dict[str, Any]:
    """Return the emulation by which a process dies."""
    return {"faults": [{"node": victim, "step": FATAL_STEP, "at": point}]}


class Run:
    """A run of several processes, to one of which something happens at a planned place."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        emulation: dict[str, Any],
        lr: float = 3e-3,
        backend: str = "replicated",
        *,
        listen: bool = False,
        own_disks: bool = False,
        **recovery: Any,
    ) -> None:
        self.folder, self.plan, self.own_disks = folder, plan, own_disks
        experiment = self.experiment = make_experiment(
            folder,
            "lossy",
            training={"max_steps": MAX_STEPS},
            checkpoint={"interval": 4},
            evaluation={"interval": 4},
            comm={"timeout_s": LIMIT_S},
            recovery={
                "enabled": "auto",
                "silence_s": 5,
                "planning_s": 0,
                "copy_interval": 1,
                "plans_ahead": False,
                "lost_stage": "routes_around",
            }
            | recovery,
            emulation=emulation,
            optimizer={"lr": lr, "backend": backend},
            recipe=RECIPE,
        )
        (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {len(plan.nodes)}"))
        self.arguments = write_inputs(experiment, plan, folder)
        self.port = free_port()
        start = self.invite if listen else self.start
        self.ranks = [start(rank, f"lossy-{rank}.txt") for rank in range(len(plan.nodes))]

    def start(self, rank: int, output: str, **environment: str) -> ForkedProcess:
        """Start one process as a launcher does."""
        place = {"RANK": rank, "WORLD_SIZE": len(self.plan.nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        values = {key: str(value) for key, value in place.items()} | environment
        own = [f"run_dir={self.disk(rank)}"] if self.own_disks else []
        return self._start(["train", *self.arguments, *own], output, values)

    def disk(self, rank: int) -> Path:
        """Return the run directory of a process that has a disk of its own; rank 1 has that of the experiment."""
        return self.experiment.run_path if rank == 1 else disk_of(self.experiment.run_path, rank)

    def invite(self, rank: int, output: str) -> ForkedProcess:
        """Start one process as people do: the first has the experiment, the others an address and the secret."""
        secret, place = {"SKIPPIPE_SECRET": "0123456789abcdef"}, f"127.0.0.1:{self.port}"
        if rank == 0:
            return self._start(["train", *self.arguments, "--listen", place], output, secret)
        run_dir = f"run_dir={self.experiment.run_path}"
        return self._start(["join", place, "--node", f"node-{rank}", run_dir], output, secret)

    def join(self, output: str, run_dir: Path) -> ForkedProcess:
        """Start a process that has nothing but a member's address and the secret, and a disk of its own."""
        contacts = json.loads((self.experiment.run_path / "members.json").read_text())
        member = contacts["members"][0]
        place = f"{member['host']}:{member['data_port']}"
        overrides = [f"run_dir={run_dir}", "data.paths=[/nowhere]"]  # its node begins no microbatches, so needs no text
        return self._start(["join", place, *overrides], output, {"SKIPPIPE_SECRET": contacts["secret"]})

    def _start(self, arguments: list[str], output: str, environment: dict[str, str]) -> ForkedProcess:
        path = self.folder / output
        process = preloaded().Process(target=run_and_note_states, args=(arguments, path, environment))
        process.start()
        return ForkedProcess(process, path)

    def wait_for_lines(self, name: str, count: int) -> None:
        """Wait until a file of the run directory has so many lines."""
        path = self.experiment.run_path / name
        deadline_s = time.monotonic() + LIMIT_S
        while not path.exists() or len(path.read_text().splitlines()) < count:
            self.check_time(deadline_s)
            time.sleep(0.01)

    def wait_until_in(self, node: str) -> None:
        """Wait until a node has come."""
        deadline_s = time.monotonic() + LIMIT_S
        while not any(node in event.joined for event in self.events):
            self.check_time(deadline_s)
            time.sleep(0.01)

    def wait_for_joining(self) -> int:
        """Wait until a step is taken in which a node that has come got its state; return its number."""
        deadline_s = time.monotonic() + LIMIT_S
        while not joining_steps(self):
            self.check_time(deadline_s)
            time.sleep(0.01)
        return joining_steps(self)[0]

    def states(self, step: int) -> dict[str, str]:
        """Return digests of what nodes held of their stages after a step."""
        lines = map(json.loads, (self.folder / "states.jsonl").read_text().splitlines())
        return {node: digest for of_step, node, digest in lines if of_step == step}

    def wait_for_epoch(self, is_wanted: Callable[[Plan], bool]) -> int:
        """Wait for an epoch whose plan is such a one; return its number."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            for number, event in enumerate(self.events, start=1):
                if is_wanted(load_plan(self.experiment.run_path / "epochs" / f"epoch-{event.epoch:04d}.plan.json")):
                    return number
            self.check_time(deadline_s)
            time.sleep(0.05)

    def wait_for_link_paces(self) -> None:
        """Wait until the present epoch has measured a link."""
        deadline_s = time.monotonic() + LIMIT_S
        while (status := read_status(self.experiment.run_path)) is None or not any(link.pace for link in status.links):
            self.check_time(deadline_s)
            time.sleep(0.05)

    def check_time(self, deadline_s: float) -> None:
        """End all processes and fail where it is too late."""
        if time.monotonic() > deadline_s:
            outputs = [rank.finish(0.0)[1] for rank in self.ranks]
            raise AssertionError([output[-2000:] for output in outputs])

    def finish(self) -> list[int | None]:
        """Let some more steps be taken, stop all and return their exit codes."""
        taken = len((self.experiment.run_path / "metrics.jsonl").read_text().splitlines())
        self.wait_for_lines("metrics.jsonl", taken + BEYOND)
        alive = next(rank for rank in self.ranks if rank.process.is_alive())
        alive.signal(signal.SIGTERM)
        return [rank.finish(LIMIT_S)[0] for rank in self.ranks]

    @property
    def events(self) -> list[MembershipChange]:
        """How the run's membership changed."""
        return read_changes(self.experiment.run_path)


def run_and_note_states(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    """Run the command line in a new process, and note after each step what it holds of its stage."""
    count = StepUpdate.count

    def count_and_note(update: StepUpdate, begun: StepBegin, totals: StepTotals) -> FinishedStep:
        finished, state = count(update, begun, totals), update._state
        (stage,) = state.runner.stages.values()
        tensors = stage.state_dict_global() | state.optimizer.state(stage.state_dict_global())
        digest = hashlib.sha256(save({name: tensor.contiguous() for name, tensor in tensors.items()})).hexdigest()
        with output.with_name("states.jsonl").open("a") as file:
            file.write(json.dumps([state.step, state.node, digest]) + "\n")
        return finished

    StepUpdate.count = count_and_note  # type: ignore[method-assign,assignment]  # in this process alone
    run_skippipe(arguments, output, environment)


class EpochSchedule(NamedTuple):
    """Which plan each step of the reference walks."""

    last_steps: Sequence[int]
    names: Sequence[str]
    joining_steps: Collection[int]

    def plan_of(self, step: int) -> str:
        """Return the name of the plan of a step."""
        name = self.names[bisect_left(self.last_steps, step)]
        return name.replace(".plan", ".joining") if step in self.joining_steps else name


def along(main: Plan, other: Plan) -> Plan:
    """Return the plan by which one process visits the stages as in `other`; it does not matter who holds them."""
    routes = [
        microbatch.model_copy(
            update={"route": tuple(main.stages[other.stage_of[node]].nodes[0] for node in microbatch.route)}
        )
        for microbatch in other.microbatches
    ]
    return main.model_copy(update={"microbatches": tuple(routes)})


def joining_steps(run: Run) -> list[int]:
    """Return the steps in which nodes that had come got their state."""
    entries = read_metrics(run.experiment.run_path / "metrics.jsonl")
    return [entry[Metric.STEP] for entry in entries if entry[Metric.PLAN] == JOINING_PLAN]


def epoch_plans(run: Run, kind: str = "plan") -> dict[int, Plan]:
    """Return the plans that are kept of the run's epochs, by the epoch's number."""
    found = sorted((run.experiment.run_path / "epochs").glob(f"*.{kind}.json"))
    return {int(path.name.split(".")[0].removeprefix("epoch-")): load_plan(path) for path in found}


def reference_losses(run: Run, num_steps: int) -> list[float]:
    """Return the losses of one process that walks the plan of every epoch for the steps that it had."""
    main, epochs = run.plan, run.experiment.run_path / "epochs"
    further = {path.stem: along(main, load_plan(path)) for path in sorted(epochs.iterdir())}
    names = [name for name in further if name.endswith(".plan")]
    lr = run.experiment.optimizer.lr
    experiment = make_experiment(
        run.folder, "alone", training={"max_steps": MAX_STEPS}, optimizer={"lr": lr}, recipe=RECIPE
    )
    with open_trainer(experiment, PlanSet(main, further), ALONE) as trainer:
        last_steps = [*(event.step for event in run.events), num_steps]
        schedule = EpochSchedule(last_steps, [MAIN_PLAN, *names], joining_steps(run))
        trainer.schedule = schedule  # type: ignore[assignment]  # same call
        stop = StopSignal()
        return [trainer.one_step(stop).metrics[Metric.TRAIN_LOSS] for _ in range(num_steps)]


def least_held(process: psutil.Process) -> tuple[int, int]:
    """Return the least threads and descriptors that a process has at several looks: some of them come and go."""
    looks = []
    for _ in range(20):
        looks.append((process.num_threads(), process.num_fds()))
        time.sleep(0.01)
    threads, descriptors = zip(*looks, strict=True)
    return min(threads), min(descriptors)


def wait_until_it_holds(process: psutil.Process, threads: int, descriptors: int) -> None:
    """Wait until a process has no more threads and descriptors than these."""
    deadline_s = time.monotonic() + LIMIT_S
    while process.num_threads() > threads or process.num_fds() > descriptors:
        assert time.monotonic() < deadline_s, (least_held(process), threads, descriptors)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "point"), [("node-0", "BACKWARD"), pytest.param("node-1", "STEP", marks=pytest.mark.extended)]
)
def test_others_go_on_where_a_process_died_and_take_it_in_again(tmp_path: Path, victim: str, point: str) -> None:
    run = Run(tmp_path, four_node_plan(), death_of(victim, point))
    dead = int(victim.removeprefix("node-"))
    run.ranks[dead].process.join(LIMIT_S)
    run.ranks.append(run.start(dead, "again.txt", TORCHELASTIC_RESTART_COUNT="1"))
    run.wait_until_in(victim)
    joined_step = run.wait_for_joining()
    survivor = psutil.Process(run.ranks[3].process.pid)
    threads, descriptors = least_held(survivor)
    run.ranks[2].signal(signal.SIGKILL)
    run.ranks[2].process.join(LIMIT_S)
    run.ranks.append(run.join("joined.txt", tmp_path / "own"))
    run.wait_until_in(SOLE)
    wait_until_it_holds(survivor, threads, descriptors + DESCRIPTORS_OF_AN_EPOCH - 1)
    outputs = [rank.output for rank in run.ranks]
    codes = run.finish()
    expected = [-signal.SIGKILL if rank in (dead, 2) else 75 for rank in range(WORLD_SIZE + 2)]
    assert codes == expected, [output.read_text()[-1500:] for output in outputs]
    events = run.events
    # A node that is ready at once may be in the very epoch that begins with its loss.
    assert [node for event in events for node in event.lost] == [victim, SOLE]
    assert [node for event in events for node in event.joined] == [victim, SOLE]
    # The first plan on a machine waits for its search to be compiled.
    assert max(event.total_s - event.durations_s["planning"] for event in events) < 10
    assert events[0].step == FATAL_STEP - 1
    (restored,) = events[-1].restored
    assert (restored.stage, restored.place in ("a copy", "a checkpoint")) == (2, True)
    plans = [*epoch_plans(run).values()]
    assert [{*plan.nodes} for plan in plans] == [{*event.members} for event in events]
    ((number, first),) = epoch_plans(run, "joining").items()  # for the state of SOLE, which nobody holds, all wait
    assert victim in next(event for event in events if event.epoch == number).joined
    assert ({*first.nodes}, first.order[victim]) == ({*run.plan.nodes}, ())
    assert joining_steps(run) == [joined_step]
    states = run.states(joined_step)
    assert states["node-0"] == states["node-1"]  # the one that came and the one that gave: bit by bit
    assert all((SOLE in event.members) != (2 in event.absent_stages) for event in events)
    disks = [latest_checkpoint(path) for path in (run.experiment.run_path, tmp_path / "own")]
    held = [set(held_files(path, read_metadata(path).files)) for path in disks if path is not None]
    assert held == [set(read_metadata(path).files) for path in disks if path is not None]  # all on both disks
    assert {path.name for path in (tmp_path / "own").iterdir()} >= {"config.yaml", "plan.json"}
    assert not (tmp_path / "own" / "owner.json").exists()
    assert (run.experiment.run_path / "members.json").stat().st_mode & 0o077 == 0
    page = write_run_report(run.experiment.run_path).read_text()
    assert f"{SOLE} joined" in page
    status = read_status(run.experiment.run_path)  # of the last epoch, whichever process was its first
    assert status is not None
    assert [node.node for node in status.nodes] == list(events[-1].members)
    assert status.step > events[-1].step
    found = losses(run.experiment.run_path)
    exact = events[-1].step  # from then on that stage is a few steps behind
    assert found[:exact] == pytest.approx(reference_losses(run, exact), abs=1e-5)
    assert all(map(math.isfinite, found[exact:]))
    assert len(found) >= exact + BEYOND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "comes_back", "backend"),
    [
        ("UPDATED", False, "zero_redundancy"),  # the node that moves was one of two that share out the state
        pytest.param("UPDATED", False, "replicated", marks=pytest.mark.extended),
        pytest.param("BACKWARD", True, "replicated", marks=pytest.mark.extended),
    ],
)
def test_another_node_takes_over_stage_0_and_nothing_is_lost(
    tmp_path: Path, point: str, *, comes_back: bool, backend: str
) -> None:
    death, listen = death_of("node-0", point), not comes_back
    run = Run(tmp_path, first_stage_alone_plan(), death, backend=backend, listen=listen, lost_stage="copy")
    run.ranks[0].process.join(LIMIT_S)
    run.wait_for_lines("events.jsonl", 1)
    if comes_back:
        run.ranks.append(run.start(0, "again.txt", TORCHELASTIC_RESTART_COUNT="1"))
        run.wait_until_in("node-0")
    outputs = [rank.output for rank in run.ranks]
    codes = [-signal.SIGKILL, 75, 75, *([75] if comes_back else [])]
    assert run.finish() == codes, [output.read_text()[-1500:] for output in outputs]
    (restored,) = run.events[0].restored
    assert (restored.stage, restored.place, restored.of_step) == (0, "a copy", run.events[0].step)
    plans = [*epoch_plans(run).values()]
    assert plans[0].stages[0].nodes == (restored.node,)
    if comes_back:
        assert "node-0" in plans[-1].stages[1].nodes  # it has the place of the one that took over its own
    found = losses(run.experiment.run_path)
    assert found == pytest.approx(reference_losses(run, len(found)), abs=1e-5)


@pytest.mark.slow
def test_a_stage_goes_on_from_the_checkpoint_of_disks_of_their_own(tmp_path: Path) -> None:
    faults = [{"node": "node-0", "step": 11, "at": "BACKWARD"}]  # when the checkpoint of step 4 is complete
    run = Run(
        tmp_path,
        first_stage_alone_plan(),
        {"faults": faults},
        own_disks=True,
        lost_stage="checkpoint",
        copy_interval=0,
    )
    run.ranks[0].process.join(LIMIT_S)
    run.wait_for_lines("events.jsonl", 1)
    outputs = [rank.output for rank in run.ranks]
    assert run.finish() == [-signal.SIGKILL, 75, 75], [output.read_text()[-1500:] for output in outputs]
    (restored,) = run.events[0].restored
    assert (restored.stage, restored.place, restored.of_step in (4, 8)) == (0, "a checkpoint", True)
    entries = read_metrics(run.experiment.run_path / "metrics.jsonl")
    assert entries[-1][Metric.STEP] >= run.events[0].step + BEYOND
    assert all(math.isfinite(entry[Metric.TRAIN_LOSS]) for entry in entries)


@pytest.mark.slow
def test_a_node_that_turns_slow_gets_less_to_do(tmp_path: Path) -> None:
    plan, slow = first_stage_alone_plan(time_scale_s=0.007), "node-1"
    paces = [{"node": slow, "step": 2, "factor": 4}]
    replan = {"enabled": True, "window": 3, "pause": 1, "search_s": 0.7, "niceness": 0}
    run = Run(tmp_path, plan, {"compute": True, "paces": paces}, lr=3e-4, replan=replan)
    relieved = run.wait_for_epoch(lambda other: len(other.order[slow]) < len(plan.order[slow]))
    run.wait_for_link_paces()
    outputs = [rank.output for rank in run.ranks]
    assert run.finish() == [75] * 3, [output.read_text()[-1500:] for output in outputs]
    event = run.events[relieved - 1]
    assert (event.lost, event.joined, event.members, event.interrupted) == ({}, (), plan.nodes, False)
    assert event.pace_change is not None
    assert event.pace_change.paces
    assert event.pace_change.time_ratio < 0.95
    assert str(event.pace_change) in write_run_report(run.experiment.run_path).read_text()
    steps = losses(run.experiment.run_path)
    assert len(steps) >= event.step + BEYOND
    assert steps == pytest.approx(reference_losses(run, len(steps)), abs=1e-5)


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("comes_back", [False, True])
def test_shared_out_state_of_a_lost_replica_is_with_the_others(tmp_path: Path, *, comes_back: bool) -> None:
    # It dies when all take the step, before it has sent what it alone updates.
    run = Run(tmp_path, first_stage_alone_plan(), death_of("node-1", "UPDATED"), backend="zero_redundancy")
    run.ranks[1].process.join(LIMIT_S)
    run.wait_for_lines("events.jsonl", 1)
    if comes_back:
        run.ranks.append(run.start(1, "again.txt", TORCHELASTIC_RESTART_COUNT="1"))
        run.wait_until_in("node-1")
    outputs = [rank.output for rank in run.ranks]
    codes = [75, -signal.SIGKILL, 75, *([75] if comes_back else [])]
    assert run.finish() == codes, [output.read_text()[-1500:] for output in outputs]
    assert (run.events[0].step, run.events[0].restored) == (FATAL_STEP, ())
    found = losses(run.experiment.run_path)
    assert found == pytest.approx(reference_losses(run, len(found)), abs=1e-5)


def report(step: int, contributed: int, *, left: bool = False) -> ProgressReport:
    return ProgressReport(step=step, contributed=contributed, totals=(float(step),), work_is_left=left)


def test_interrupted_step_begins_again_where_nobody_has_taken_it() -> None:
    reports = {"a": report(3, 4), "b": report(3, 3)}
    assert settle(reports) == Settlement(3, (3.0,), work_is_left=False, standing=("a", "b"))


def test_step_that_one_has_taken_is_taken_by_all() -> None:
    reports = {"a": report(3, 4), "b": report(4, 4)}
    assert settle(reports) == Settlement(4, (4.0,), work_is_left=True, standing=("a", "b"))


def test_what_a_newcomer_does_not_know_is_taken_from_another() -> None:
    newcomer = ProgressReport(step=4, contributed=4)
    assert settle({"new": newcomer, "a": report(4, 4), "b": report(3, 4)}).totals == (4.0,)
    with pytest.raises(CommunicationError, match="have come lately"):
        settle({})


def test_work_behind_a_step_is_done_again_where_one_has_not_finished_it() -> None:
    reports = {"a": report(4, 4), "b": report(4, 4, left=True)}
    assert settle(reports).work_is_left


def test_a_process_that_cannot_follow_ends_the_run() -> None:
    with pytest.raises(CommunicationError, match="b is at step 2"):
        settle({"a": report(4, 4), "b": report(2, 3)})
