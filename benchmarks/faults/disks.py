"""Kill processes that share no disk while checkpoints are written, take disks away, and see what is gone on from.

    python benchmarks/faults/disks.py [--kills N] [--seed S]

Four processes with a run directory each. benchmarks/README.md says what has to hold.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from lossy_run import LIMIT_S, Processes, lines_of, wait_for

from common.small_experiment import NUM_NODES, small_experiment
from common.table import machine, rows_table
from skippipe.checkpoint.reader import complete_checkpoints
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric

HERE = Path(__file__).parent
BETWEEN = 4
"""Steps after a start until a process may be killed; every one of them is saved."""
GAP_S = 0.3
"""The kill comes up to so many seconds later: a step and its checkpoint take less."""


@dataclass
class Kill:
    """One process that was killed, and what the next start made of it."""

    rank: int
    disk_gone: bool
    on_all: int
    """Newest step that was saved on all disks before."""
    ended_s: float
    """Until the other processes had ended."""
    step: int = 0
    """Step behind which the next start continued."""
    started_s: float = 0.0
    """Until its first step was finished."""
    failed: list[str] = field(default_factory=list)


class Disks:
    """A run whose processes have a disk each."""

    def __init__(self, folder: Path, max_steps: int) -> None:
        saving = {"interval": 1, "keep_last": 2}
        self.experiment = experiment(folder, "lossy", max_steps, checkpoint=saving)
        self._plan = folder / "given.plan.json"
        self._losses: dict[int, float] = {}
        self._processes = Processes(self.experiment, self._plan, num_ranks=NUM_NODES, own_disks=True)

    def of(self, rank: int) -> Path:
        """Return the run directory of a rank."""
        return self._processes.experiment_of(rank).run_path

    @property
    def metrics(self) -> Path:
        """What rank 0 has written of the steps."""
        return self.of(0) / "metrics.jsonl"

    def kill(self, rank: int, *, disk_gone: bool) -> Kill:
        """Kill one process; the others end by themselves."""
        process = self._processes[rank].pid
        assert process is not None
        os.kill(process, signal.SIGKILL)
        begun_s = time.monotonic()
        self._processes.finish()
        ended_s = time.monotonic() - begun_s
        self._keep_losses()
        saved = [{int(path.name[5:]) for path in complete_checkpoints(self.of(each))} for each in range(NUM_NODES)]
        kill = Kill(rank, disk_gone, on_all=max(set.intersection(*saved), default=0), ended_s=round(ended_s, 1))
        if disk_gone:
            shutil.rmtree(self.of(rank))
        return kill

    def start_again(self, kill: Kill) -> None:
        """Start all again, as after a reboot of the host that was lost."""
        begun_s = time.monotonic()
        before = {entry[Metric.STEP] for entry in lines_of(self.metrics)}
        self._processes.log(0).unlink()
        self._processes = Processes(self.experiment, self._plan, num_ranks=NUM_NODES, own_disks=True)
        while True:
            words = self._processes.log(0).read_text() if self._processes.log(0).exists() else ""
            found = [line for line in words.splitlines() if line.startswith("continuing after step ")]
            steps = {entry[Metric.STEP] for entry in lines_of(self.metrics)}
            if found and max(steps - before, default=0) > int(found[0].split()[-1]):
                kill.step, kill.started_s = int(found[0].split()[-1]), time.monotonic() - begun_s
                break
            if found:
                before &= set(range(int(found[0].split()[-1]) + 1))
            if time.monotonic() - begun_s > LIMIT_S or not self._processes[0].is_alive():
                kill.failed.append(f"did not start again: {self._processes.last_words(0)}")
                return
            time.sleep(0.02)
        if kill.step < kill.on_all:
            kill.failed.append(f"continued after step {kill.step}, though step {kill.on_all} was on all disks")

    def finish(self) -> dict[int, float]:
        """End the run and return the loss of every step."""
        os.kill(self._processes[0].pid or 0, signal.SIGTERM)
        self._processes.finish()
        self._keep_losses()
        return self._losses

    def _keep_losses(self) -> None:
        self._losses |= {entry[Metric.STEP]: entry[Metric.TRAIN_LOSS] for entry in lines_of(self.metrics)}


def experiment(folder: Path, name: str, max_steps: int, **sections: Any) -> Experiment:
    """Return a small experiment whose processes do not outlive each other."""
    content: dict[str, Any] = {"training": {"max_steps": max_steps}, "recovery": {"enabled": False}}
    content |= {"comm": {"timeout_s": 60.0}, "lr_scheduler": {"warmup_steps": 5, "min_lr_ratio": 1.0}}
    return small_experiment(folder, name, evaluation={"interval": 0}, **content, **sections)


def undisturbed(folder: Path, num_steps: int) -> dict[int, float]:
    """Return the losses of the same run on one disk, to which nothing happens."""
    whole = experiment(folder, "whole", num_steps, checkpoint={"interval": 0})
    Processes(whole, folder / "given.plan.json", num_ranks=NUM_NODES).finish()
    return {entry[Metric.STEP]: entry[Metric.TRAIN_LOSS] for entry in lines_of(whole.run_path / "metrics.jsonl")}


def row(kills: list[Kill], losses: Mapping[int, float], expected: Mapping[int, float]) -> dict[str, Any]:
    """Return what came of it, as one row."""
    other = [step for step, loss in losses.items() if loss != expected.get(step)]
    failed = [f"kill {number}, rank {kill.rank}: {words}" for number, kill in enumerate(kills) for words in kill.failed]
    failed += [f"step {step}: {losses[step]} instead of {expected.get(step)}" for step in other[:3]]
    gone_back = [kill.step - kill.on_all for kill in kills if not kill.failed]
    return {
        "kills": len(kills),
        "of them with the disk gone": sum(kill.disk_gone for kill in kills),
        "went on": sum(not kill.failed for kill in kills),
        "steps": max(losses, default=0),
        "losses bit by bit those of an undisturbed run": not other and bool(losses),
        "steps beyond the newest on all disks, least": min(gone_back, default=None),
        "first step after a start, median s": round(statistics.median(kill.started_s for kill in kills), 1),
        "failed": failed,
    }


@click.command()
@click.option("--kills", default=20, show_default=True, help="Processes that are killed, one after the other.")
@click.option("--seed", default=0, show_default=True, help="Gives who is killed, when, and whose disk is taken.")
def main(kills: int, seed: int) -> None:
    """Make the run; write disks.json and disks.md beside this file."""
    from skippipe.planning.experiment_plan import plan_experiment

    generator, done = random.Random(seed), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan_experiment(experiment(folder, "planned", 1)).save(folder / "given.plan.json")
        disks = Disks(folder, max_steps=100_000)
        for number in range(kills):
            lines = len(lines_of(disks.metrics))
            if not wait_for(disks.metrics, lines + BETWEEN, time.monotonic() + LIMIT_S):
                raise SystemExit("no steps are finished")
            time.sleep(generator.uniform(0.0, GAP_S))
            done.append(disks.kill(generator.randrange(NUM_NODES), disk_gone=number % 2 == 1))
            disks.start_again(done[-1])
            click.echo(str(done[-1]))
            if done[-1].failed:
                break
        losses = disks.finish()
        result = row(done, losses, undisturbed(folder, max(losses)))
    where = machine(HERE) | {"date": datetime.now(UTC).date().isoformat()}
    (HERE / "disks.json").write_text(json.dumps({"row": result, **where}, indent=1) + "\n")
    (HERE / "disks.md").write_text(page(result, where))


def page(result: dict[str, Any], where: Mapping[str, Any]) -> str:
    """Return the result as a page."""
    about = (
        f"Made by `disks.py`; see [the guide](../README.md). {NUM_NODES} processes with a disk each save every step; "
        "one is killed at a random instant, every second time its disk is gone, and all start again with the same line."
    )
    place = f"- {where['cpu']}, {where['cores']} cores, commit {where['commit']}, {where['date']}"
    return "\n".join(["# Kills while disks are written", "", about, "", *rows_table([result]), place]) + "\n"


if __name__ == "__main__":
    main()
