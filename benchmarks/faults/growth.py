"""What grows in processes that outlive many changes of membership: one node after another is killed and comes back."""

import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import click
import psutil
from lossy_run import LIMIT_S, Processes, lines_of, make_experiment, wait_for
from outcomes import Row

MODEL = {
    "options": {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}
}
"""A stage and its optimizer state of 9 MB: who keeps one of an epoch that has ended is seen."""
ENDLESS = 1_000_000
"""The run is stopped: a process that comes back needs as many steps of the others as it needs."""
STOPPED = 75
"""Exit code of a process that a signal has stopped between two steps."""
LEFT_S = 5.0
"""Seconds in which the children of a process that has ended have to end."""
READINGS = 20
READING_S = 0.05
"""Between two readings: what lasts for shorter than all of them, as a question to another process, does not count."""
MIB = 2**20
GROWTH_MIB = 0.5
"""More than so much memory in a change is growth: an 18th of a state. An allocator that keeps pieces stays below it."""
Counts = dict[str, float]


def growth(folder: Path, plan: Path, steps: int, changes: int) -> Row:
    """Train while one node of each stage in turn dies and comes back; return what the others hold, first and last."""
    experiment = make_experiment(
        folder, "growth", ENDLESS, model=MODEL, checkpoint={"interval": 20}, evaluation={"interval": 10, "batches": 1}
    )
    metrics, events = experiment.run_path / "metrics.jsonl", experiment.run_path / "events.jsonl"
    mortal, problem = _mortal(plan), ""
    processes = Processes(experiment, plan)
    survivors = [psutil.Process(process.pid) for rank, process in enumerate(processes) if rank not in mortal]
    newest, held, shared = dict(enumerate(processes)), list[list[Counts]](), list[Counts]()
    for number, rank in enumerate(islice(cycle(mortal), changes)):
        if not wait_for(metrics, 2 + number * steps // (changes + 1), time.monotonic() + LIMIT_S):
            problem = f"no more steps after {number} deaths"
            break
        newest[rank].kill()
        processes.begin(rank)
        newest[rank] = processes[-1]
        if not _wait_until_whole(events, number + 1):
            problem = f"rank {rank} did not come back after death {number + 1}"
            break
        held.append(_least_held(survivors))
        shared.append(_shared(experiment.run_path))
        click.echo(f"rank {rank} is back: {_most(held[-1])}, {shared[-1]}")
    if not problem and not wait_for(metrics, steps, time.monotonic() + LIMIT_S):
        problem = f"no {steps} steps after the last return"
    children = [child for process in survivors if process.is_running() for child in process.children(recursive=True)]
    processes[-1].terminate()
    codes, found = processes.finish(), [entry["step"] for entry in lines_of(metrics)]
    failed = [problem] if problem else []
    if codes != [STOPPED if process in newest.values() else -signal.SIGKILL for process in processes]:
        failed.append(f"exit codes {codes}")
    if found != list(range(1, len(found) + 1)):
        failed.append("a step is missing, or there twice")
    failed += [f"{child} has outlived the run" for child in psutil.wait_procs(children, timeout=LEFT_S)[1]]
    settled = len(mortal) - 1
    return {
        "steps": len(found),
        "deaths and returns": len(held),
        **_row([_most(each) for each in held[settled:]], failed),
        **_row(shared[settled:], failed),
        "failed": failed,
    }


def _most(of_all: Sequence[Counts]) -> Counts:
    return {name: round(max(each[name] for each in of_all), 1) for name in of_all[0]}


def _mortal(plan_path: Path) -> Sequence[int]:
    """Return the lowest rank of each stage, so that rank 0 is one of them, and a node of each stage is left."""
    from skippipe_scheduler.plan.validate import load_plan

    plan = load_plan(plan_path)
    return sorted(min(plan.rank_of[node] for node in stage.nodes) for stage in plan.stages)


def _wait_until_whole(events: Path, num_returns: int) -> bool:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        if sum(len(event["joined"]) for event in lines_of(events)) >= num_returns:
            return True
        time.sleep(0.02)
    return False


def _least_held(processes: Sequence[psutil.Process]) -> list[Counts]:
    """Return the least of each that every process holds within a second."""
    readings = []
    for _ in range(READINGS):
        readings.append([_held(process) for process in processes])
        time.sleep(READING_S)
    return [{name: min(each[name] for each in of_one) for name in of_one[0]} for of_one in zip(*readings, strict=True)]


def _held(process: psutil.Process) -> Counts:
    """Return what a process holds now."""
    counts = dict.fromkeys(("sockets", "pipes", "files", "other descriptors"), 0.0)
    for target in _targets(process.pid):
        kind = next((kind for kind in ("socket", "pipe") if target.startswith(f"{kind}:")), None)
        counts[f"{kind}s" if kind else "files" if target.startswith("/") else "other descriptors"] += 1
    return {
        "threads": process.num_threads(),
        **counts,
        "child processes": len(process.children(recursive=True)),
        "memory, MiB": process.memory_info().rss / MIB,
    }


def _targets(process_id: int) -> Iterator[str]:
    for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since then
            yield os.readlink(descriptor)


def _shared(run_dir: Path) -> Counts:
    """Return what is left on the host; the plan of each epoch is kept on purpose."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.parent.name != "epochs"]
    return {"files in RUN": len(files), "files in /dev/shm": len(os.listdir("/dev/shm"))}


def _row(samples: Sequence[Counts], failed: list[str]) -> Row:
    """Return first, last and slope of each; what still grows with the later half of the changes is a failure."""
    row: Row = {}
    for name in samples[0] if len(samples) > 1 else ():
        values = [sample[name] for sample in samples]
        half = len(values) // 2
        row[name] = f"{values[0]:g} to {values[-1]:g}, {_slope(values[half:]):+.2f} a change in the later half"
        allowed = GROWTH_MIB if name.startswith("memory") else 0.0
        if min(values[half:]) > max(values[:half]) and _slope(values[half:]) > allowed:
            failed.append(f"{name}: {values}")
    return row


def _slope(values: Sequence[float]) -> float:
    return statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0
