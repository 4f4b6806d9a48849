"""Strangers connect thousands of times to the members of a run, which has to train on as if nobody came.

    python benchmarks/hostile/run.py [--connections N] [--seed S]

Four processes train, and every port that their membership and their exchanges listen on is attacked.
"""

import asyncio
import itertools
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
import psutil
from attacks import PATIENCE_S, Outcome, attacks, recording, strike

from common.command import write_whole
from common.one_machine import free_port, rank_environment
from common.small_experiment import NUM_NODES, small_experiment
from common.table import Result, machine, rows_table
from skippipe.config.experiment_file import save_experiment
from skippipe.membership.download import Source, fetch
from skippipe.membership.keys import run_keys
from skippipe.membership.live_run import FACTS, Contacts
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics
from skippipe.training.joining.join_run import read_contacts

HERE = Path(__file__).parent
ENDLESS = 1_000_000
"""Steps of a run that is stopped."""
BEFORE, AFTER = 40, 40
"""Steps before the first stranger comes, and after the last one has gone."""
SESSIONS = 4
"""Sessions of a member that are recorded and sent again."""
LIMIT_S = 120.0
STOPPED = 75
GROWTH_MIB = 2.0
"""More memory in a process than so much is growth: an allocator keeps some pieces of what 256 connections took."""


class Run:
    """Four processes that train until they are stopped."""

    def __init__(self, folder: Path, name: str, secret: str) -> None:
        experiment = small_experiment(
            folder,
            name,
            training={"max_steps": ENDLESS},
            lr_scheduler={"warmup_steps": 5},
            checkpoint={"interval": 100, "keep_last": 2},
            recovery={"enabled": True, "silence_s": 5.0, "planning_s": 0.2},
        )
        self.run_dir, config = experiment.run_path, folder / f"{name}.yaml"
        save_experiment(experiment, config)
        port, command = free_port(), [sys.executable, "-m", "skippipe", "train", "--config", str(config)]
        self._logs = [folder / f"{name}-{rank}.log" for rank in range(NUM_NODES)]
        self._processes = []
        for rank, path in enumerate(self._logs):
            environment = rank_environment(rank, NUM_NODES, "127.0.0.1", port) | {"SKIPPIPE_SECRET": secret}
            arguments = [*command, "--plan", str(folder / "given.plan.json")]
            with path.open("wb") as log:
                self._processes.append(
                    subprocess.Popen(arguments, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
                )

    @property
    def losses(self) -> list[float]:
        """The loss of every step so far."""
        path = self.run_dir / "metrics.jsonl"
        return [entry[Metric.TRAIN_LOSS] for entry in read_metrics(path)] if path.exists() else []

    def wait_for_steps(self, count: int) -> None:
        """Wait for so many steps; raises `ClickException` where a process ends before, or none is finished for long."""
        found, heard_s = 0, time.monotonic()
        while found < count:
            last, found = found, len(self.losses)
            if found > last:
                heard_s = time.monotonic()
            if time.monotonic() - heard_s > LIMIT_S or any(process.poll() is not None for process in self._processes):
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self._logs)
                raise click.ClickException(f"exit codes {[process.poll() for process in self._processes]}\n{logs}")
            time.sleep(0.5)

    def held(self) -> list[dict[str, float]]:
        """Return what each process holds: the least of some readings, without what comes and goes."""
        found = [psutil.Process(process.pid) for process in self._processes]
        readings = []
        for _ in range(20):
            readings.append([_held(process) for process in found])
            time.sleep(0.05)
        return [
            {name: min(each[name] for each in of_one) for name in of_one[0]} for of_one in zip(*readings, strict=True)
        ]

    def stop(self) -> list[int]:
        """Stop it, and return the exit codes."""
        self._processes[0].send_signal(signal.SIGTERM)
        return [process.wait(LIMIT_S) for process in self._processes]

    def kill(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()


def _held(process: psutil.Process) -> dict[str, float]:
    memory_mib = process.memory_info().rss / 2**20
    return {"threads": process.num_threads(), "descriptors": process.num_fds(), "memory, MiB": memory_mib}


def recorded(contacts: Contacts, secret: str) -> list[bytes]:
    """Return what a member sends that asks others' exchanges."""
    sessions = []
    for member in itertools.islice(itertools.cycle(contacts.members), SESSIONS):
        with recording(member.data_port) as (port, sent):
            assert fetch(Source("127.0.0.1", port), run_keys(secret), FACTS, 10.0) is not None
        sessions.append(bytes(sent))
    return sessions


class Growth(NamedTuple):
    """What each process held at two steps."""

    first_step: int
    first: list[dict[str, float]]
    last_step: int
    last: list[dict[str, float]]

    def beyond(self, undisturbed: "Growth") -> list[str]:
        """Say of what the processes hold more at the end than they did, beside what training itself takes."""
        found = []
        for rank, (first, last) in enumerate(zip(self.first, self.last, strict=True)):
            for name in first:
                usual = max(0.0, undisturbed.last[rank][name] - undisturbed.first[rank][name])
                if last[name] - first[name] - usual > (GROWTH_MIB if name.startswith("memory") else 0.0):
                    change = f"{first[name]:.1f} before, {last[name]:.1f} after"
                    found.append(f"rank {rank}: {name} {change}, {usual:+.1f} where nobody disturbs")
        return found


def attacked(run: Run, secret: str, connections: int, generator: random.Random) -> tuple[list[Result], Growth]:
    """Attack a run; return a row for each kind of connection, and what its processes held before and after."""
    run.wait_for_steps(BEFORE)
    contacts = read_contacts(run.run_dir / "members.json")
    ports = [port for member in contacts.members for port in (member.port, member.data_port)]
    kinds = attacks(recorded(contacts, secret))
    for attack in kinds.values():  # what is allocated once is there afterwards
        asyncio.run(strike(ports, attack, connections // 10, generator))
    first_step, first, rows = len(run.losses), run.held(), list[Result]()
    for kind, attack in kinds.items():
        steps, begun_s = len(run.losses), time.monotonic()
        outcome = asyncio.run(strike(ports, attack, connections // len(kinds), generator))
        rows.append(_row(kind, outcome, len(run.losses) - steps, time.monotonic() - begun_s))
        click.echo(rows[-1])
    last_step = len(run.losses) + AFTER
    run.wait_for_steps(last_step)
    return rows, Growth(first_step, first, last_step, run.held())


def undisturbed(run: Run, growth: Growth) -> Growth:
    """Let a run alone for as many steps as an attacked one has made; return what its processes held meanwhile."""
    run.wait_for_steps(growth.first_step)
    first = run.held()
    run.wait_for_steps(growth.last_step)
    return Growth(growth.first_step, first, growth.last_step, run.held())


def _row(kind: str, outcome: Outcome, steps: int, duration_s: float) -> Result:
    standing = outcome.ends["left standing"]
    return {
        "kind": kind,
        "connections": outcome.ends.total(),
        "closed by the member": outcome.ends["closed"],
        "not accepted": outcome.ends["refused"],
        "stood, longest": f"{outcome.longest_s:.1f} s",
        "bytes told, most": outcome.answer_bytes,
        "steps a second meanwhile": round(steps / duration_s, 1),
        "failed": [f"{kind}: {standing} still stand after {PATIENCE_S:g} s"] if standing else [],
    }


@click.command()
@click.option("--connections", default=10_000, show_default=True, help="Of all kinds together.")
@click.option("--seed", default=0, show_default=True, help="Gives what strangers send.")
def main(connections: int, seed: int) -> None:
    """Train twice, attacked and alone; write results.json and results.md beside this file."""
    from skippipe.planning.experiment_plan import plan_experiment

    with tempfile.TemporaryDirectory() as place:
        folder, secret = Path(place), secrets.token_hex(32)
        plan_experiment(small_experiment(folder, "planned")).save(folder / "given.plan.json")
        rows, losses = list[Result](), dict[str, list[float]]()
        growths, failed = dict[str, Growth](), list[str]()
        for name in ("attacked", "alone"):
            run = Run(folder, name, secret)
            try:
                if name == "attacked":
                    rows, growths[name] = attacked(run, secret, connections, random.Random(seed))
                else:
                    growths[name] = undisturbed(run, growths["attacked"])
                codes = run.stop()
            finally:
                run.kill()
            losses[name] = run.losses
            failed += _events(run.run_dir)
            failed += [f"{name}: exit codes {codes}"] if codes != [STOPPED] * NUM_NODES else []
    same = min(map(len, losses.values()))
    if losses["attacked"][:same] != losses["alone"][:same]:
        failed.append("the losses differ")
    failed += growths["attacked"].beyond(growths["alone"])
    result = {"rows": rows, "failed": failed, "steps": same}
    result |= {"date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    write_whole(HERE / "results.json", json.dumps(result, indent=1) + "\n")
    write_whole(HERE / "results.md", page(result))
    if failed or any(row["failed"] for row in rows):
        raise click.ClickException("not all is as it should be; see results.md")


def _events(run_dir: Path) -> list[str]:
    """Say whom the members took for lost or let in."""
    with suppress(FileNotFoundError):
        return [f"an event: {line}" for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return []


def page(result: Result) -> str:
    """Return the result as a page."""
    about = (
        "Made by `run.py`; see [the guide](../README.md). Four processes train, and strangers connect to the ports of "
        f"their membership and exchanges. Compared are {result['steps']} steps with those of a run that nobody "
        "disturbs: the losses have to be the same bit by bit, and no process may hold more than training itself takes."
    )
    failed = [f"- **{words}**" for words in result["failed"]] or ["- All is as it has to be."]
    where = f"- {result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    return "\n".join(["# Hostile connections", "", about, "", *rows_table(result["rows"]), *failed, where]) + "\n"


if __name__ == "__main__":
    main()
