"""Kill ranks, agents and the store's host under real torchrun agents; see whether runs recover, or end, as promised.

    python benchmarks/launchers/run.py [--only NAME]

Every row starts two agents (or one, standalone) that train a small model, does one thing to them, and looks at what
follows: a run whose rank was killed must end with exit code 0 and with losses that are to the bit those of a run
that nothing happened to; the others of a lost agent, a frozen store or a host that is cut off must end in time.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
import psutil

from common.command import chosen
from common.hosts import Hosts, why_not
from common.one_machine import free_port
from common.promises import Row, record_promises, unless
from common.small_experiment import small_experiment
from skippipe.config.experiment_file import save_experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

HERE = Path(__file__).parent
STEPS = 60
TIMEOUT_S = 20.0
"""`comm.timeout_s` of all runs."""
RANKS = 4
LAUNCHES = ("standalone", "static", "c10d")
MOMENTS = ("before the first step", "early", "late", "while saving")
MAX_RESTARTS = 3


@dataclass
class Launch:
    """Agents that were started for one run, and where their output goes."""

    folder: Path
    run_dir: Path
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ranks(self, agent: int | None = None) -> list[psutil.Process]:
        """Return the training processes of one agent, or of all."""
        agents = self.agents if agent is None else [self.agents[agent]]
        found = []
        for each in agents:
            try:
                found += psutil.Process(each.pid).children()
            except psutil.Error:
                continue
        return [process for process in found if _trains(process)]

    def steps(self) -> int:
        """Return how many steps are recorded."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait(self, seconds: float) -> list[int | None]:
        """Wait for all agents; return their exit codes, None for those that had to be killed."""
        deadline_s = time.monotonic() + seconds
        codes: list[int | None] = []
        for agent in self.agents:
            try:
                codes.append(agent.wait(max(0.1, deadline_s - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        return codes

    def end(self, leftover: Sequence[psutil.Process] = ()) -> None:
        """End what still runs."""
        for process in [*self.ranks(), *leftover, *self.agents]:
            try:
                process.kill()
            except (psutil.Error, OSError):
                continue

    def output(self) -> str:
        """Return what all printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("agent-*.log")))


def _trains(process: psutil.Process) -> bool:
    try:
        return "skippipe" in process.cmdline()
    except psutil.Error:
        return False


def make_experiment(folder: Path, name: str) -> Path:
    """Write a small experiment and its text; return the file."""
    experiment = small_experiment(
        folder,
        name,
        pipeline={"planner": {"time_limit_s": 2}},
        training={"max_steps": STEPS},
        comm={"timeout_s": TIMEOUT_S},
    )
    path = folder / f"{name}.yaml"
    save_experiment(experiment, path)
    return path


def start(folder: Path, name: str, launch: str, max_restarts: int = MAX_RESTARTS, hosts: Hosts | None = None) -> Launch:
    """Start the agents of a run, on this machine or each on a host of its own."""
    experiment = make_experiment(folder, name)
    logs = folder / f"{name}-logs"
    logs.mkdir()
    started = Launch(logs, folder / name)
    port = free_port()
    address = "127.0.0.1" if hosts is None else hosts.address(0)
    plan = ["--plan", str(folder / "plan.json")] if (folder / "plan.json").exists() else []
    for host in range(1 if launch == "standalone" else 2):
        two_hosts = ["--nnodes=2", f"--nproc-per-node={RANKS // 2}"]
        places = {
            "standalone": ["--standalone", f"--nproc-per-node={RANKS}"],
            "static": [*two_hosts, f"--node-rank={host}", f"--master-addr={address}", f"--master-port={port}"],
            "c10d": [
                *two_hosts,
                "--rdzv-backend=c10d",
                "--rdzv-id=kills",
                f"--rdzv-endpoint={address}:{port}",
                f"--rdzv-conf=is_host={host == 0:d}",
            ],
        }
        where = [] if hosts is None else hosts.prefix(host)
        own = [] if hosts is None else [f"--local-addr={hosts.address(host)}"]  # host names mean nothing there
        agent_line = [*where, sys.executable, "-m", "torch.distributed.run", *own, *places[launch]]
        training_line = ["-m", "skippipe", "train", "--config", str(experiment), *plan]
        with (logs / f"agent-{host}.log").open("w") as log:
            agent = subprocess.Popen(
                [*agent_line, f"--max-restarts={max_restarts}", *training_line],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.agents.append(agent)
    return started


def await_moment(launch: Launch, moment: str, seed: random.Random) -> None:
    """Wait until the run is where something shall happen to it."""
    wanted = {"before the first step": 0, "early": 2, "late": seed.randrange(20, 40), "while saving": 10}[moment]
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        if wanted == 0 and len(launch.ranks()) == RANKS:
            time.sleep(seed.uniform(2, 8))
            return
        saving = (launch.run_dir / "checkpoints").glob(".step-*.tmp")
        if wanted and launch.steps() >= wanted and (moment != "while saving" or any(saving)):
            return
        time.sleep(0.002)
    raise RuntimeError(f"the run did not come to the moment {moment!r}:\n{launch.output()}")


def kill_a_rank(folder: Path, launch: str, moment: str, victim: int, reference: Sequence[float]) -> dict[str, Any]:
    """Kill one rank; the run must recover alone and have the losses of the reference."""
    name = f"{launch}-{moment.replace(' ', '-')}-{victim}"
    run = start(folder, name, launch)
    try:
        await_moment(run, moment, random.Random(f"{name}"))
        step = run.steps()
        start_s = time.monotonic()
        run.ranks()[victim].kill()
        codes = run.wait(300)
    finally:
        run.end()
    losses = [entry[Metric.TRAIN_LOSS] for entry in read_metrics(run.run_dir / "metrics.jsonl")]
    met = codes == [0] * len(codes) and losses == list(reference)
    return {"killed after step": step, "exit codes": codes, "bitwise": losses == list(reference)} | {
        "seconds to the end": round(time.monotonic() - start_s, 1),
        "met": met,
        **({} if met else {"output": run.output()[-6000:]}),
    }


def kill_an_agent(folder: Path, launch: str, victim: int) -> dict[str, Any]:
    """Kill one agent alone: its ranks must be gone within 10 s, and those of the other agent after that."""
    run = start(folder, f"{launch}-agent-{victim}", launch, max_restarts=0)
    orphans: list[psutil.Process] = []
    try:
        await_moment(run, "early", random.Random(victim))
        orphans, others = run.ranks(victim), run.ranks(1 - victim)
        start_s = time.monotonic()
        run.agents[victim].kill()
        gone_s, others_s = (_seconds_until_gone(each, start_s) for each in (orphans, others))
    finally:
        run.end(orphans)
    met = gone_s is not None and gone_s < 10 and others_s is not None
    return {"its ranks gone after s": gone_s, "others gone after s": others_s, "met": met} | (
        {} if met else {"output": run.output()[-6000:]}
    )


def freeze_the_host(folder: Path, launch: str, *, agent_only: bool) -> dict[str, Any]:
    """Freeze the agent that holds the store, alone or with its ranks; the others must end in time and name it."""
    run = start(folder, f"{launch}-frozen-{'agent' if agent_only else 'host'}", launch, max_restarts=0)
    frozen: list[psutil.Process] = []
    try:
        await_moment(run, "early", random.Random(1))
        others = run.ranks(1) + (run.ranks(0) if agent_only else [])
        frozen = [psutil.Process(run.agents[0].pid), *([] if agent_only else run.ranks(0))]
        start_s = time.monotonic()
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        others_s = _seconds_until_gone(others, start_s)
    finally:
        run.end(frozen)
    named = "the store at 127.0.0.1:" in run.output() or "rank 0" in run.output()
    met = others_s is not None and others_s < TIMEOUT_S + 5 and named
    return {"others gone after s": others_s, "limit s": TIMEOUT_S + 5, "named": named, "met": met} | (
        {} if met else {"output": run.output()[-6000:]}
    )


def cut_a_host(folder: Path, launch: str, victim: int) -> dict[str, Any]:
    """Cut a host off the network without a word; the others must end in time and name it. Its own are timed too."""
    with Hosts(2) as hosts:
        run = start(folder, f"{launch}-cut-{victim}", launch, max_restarts=0, hosts=hosts)
        both = [run.ranks(host) for host in range(2)]
        try:
            await_moment(run, "early", random.Random(victim))
            both = [run.ranks(host) for host in range(2)]
            start_s = time.monotonic()
            hosts.cut(victim)
            others_s, own_s = (_seconds_until_gone(both[host], start_s) for host in (1 - victim, victim))
        finally:
            run.end([rank for ranks in both for rank in ranks])
    said = (run.folder / f"agent-{1 - victim}.log").read_text(errors="replace")
    wanted = [f"rank {victim * RANKS // 2 + index} (" for index in range(RANKS // 2)]
    named = any(name in said for name in [*wanted, *([f"the store at {hosts.address(0)}:"] if victim == 0 else [])])
    met = named and others_s is not None and others_s < TIMEOUT_S + 5
    return {"others gone after s": others_s, "its own gone after s": own_s, "limit s": TIMEOUT_S + 5} | (
        {"named": named, "met": met} | ({} if met else {"output": run.output()[-6000:]})
    )


def restart_the_finished(folder: Path, launch: str, times: int) -> dict[str, Any]:
    """Start a finished run again; there is nothing to do, so all must end with exit code 0."""
    codes = []
    for _ in range(times):
        run = start(folder, "finished", launch, max_restarts=0)
        codes.append(run.wait(120))
        run.end()
        logs = sorted(run.folder.iterdir())
        for log in logs:
            log.unlink()
        run.folder.rmdir()
    return {"starts": times, "exit codes": codes, "met": all(code == 0 for each in codes for code in each)}


def _seconds_until_gone(processes: Sequence[psutil.Process], start_s: float) -> float | None:
    """Return the seconds from `start_s` until none of the processes lives; None after a minute."""
    while any(map(_lives, processes)):
        if time.monotonic() - start_s > 60:
            return None
        time.sleep(0.05)
    return round(time.monotonic() - start_s, 1)


def _lives(process: psutil.Process) -> bool:
    """Say whether a process still does something: where its agent is frozen, an ended one stays as a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def rows(folder: Path, reference: Sequence[float]) -> dict[str, Row]:
    """Return all rows by name."""
    found: dict[str, Row] = {}
    for number, launch in enumerate(LAUNCHES):
        for index, moment in enumerate(MOMENTS):
            victim = (number + index) % RANKS
            row = partial(kill_a_rank, folder, launch, moment, victim, reference)
            found[f"{launch}: rank {victim} killed {moment}"] = row
    for launch in ("static", "c10d"):
        for victim in range(2):
            found[f"{launch}: agent {victim} killed alone"] = partial(kill_an_agent, folder, launch, victim)
    for alone in (False, True):
        what = "agent" if alone else "host"
        found[f"static: {what} of the store frozen"] = partial(freeze_the_host, folder, "static", agent_only=alone)
    for launch in ("static", "c10d"):
        for victim in range(2):
            what = "host of the store" if victim == 0 else "another host"
            found[f"{launch}: {what} cut off"] = unless(why_not(), partial(cut_a_host, folder, launch, victim))
    found["static: nothing to do, started again"] = partial(restart_the_finished, folder, "static", 10)
    return found


def reference_losses(folder: Path) -> list[float]:
    """Train undisturbed; keep the plan for all runs; return the losses."""
    run = start(folder, "finished", "static", max_restarts=0)
    codes = run.wait(300)
    if codes != [0, 0]:
        raise RuntimeError(f"the undisturbed run ended with {codes}:\n{run.output()}")
    for log in run.folder.iterdir():
        log.rename(folder / f"reference-{log.name}")
    run.folder.rmdir()
    (folder / "plan.json").write_text((run.run_dir / "plan.json").read_text())
    return [entry[Metric.TRAIN_LOSS] for entry in read_metrics(run.run_dir / "metrics.jsonl")]


@click.command()
@click.option("--only", multiple=True, help="Rows whose names contain this; the others keep their results.")
def main(only: tuple[str, ...]) -> None:
    """Run the rows and write results.json and results.md beside this file."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = chosen(rows(folder, ()), only)
        found = rows(folder, reference_losses(folder))
        record_promises(found, names, HERE, ("Kills, lost agents, frozen and cut hosts", "what happens"))


if __name__ == "__main__":
    main()
