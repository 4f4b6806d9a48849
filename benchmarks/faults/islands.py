"""Hosts that are cut off: `partition` (two of seven), `cut` (one, and healed again); `calm`, where none may be lost.

Each process has a network namespace of its own, which needs root. A cable that is pulled tells nobody.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from lossy_run import (
    LIMIT_S,
    NUM_NODES,
    SILENCE_S,
    Processes,
    lines_of,
    loss_difference,
    make_experiment,
    wait_for,
    wait_until_under_way,
)
from outcomes import Loss, Outcome, Row, median
from strikes import victims

from common.hosts import Hosts
from skippipe.config.experiment import Experiment

STEPS = 60
"""Of a run that is cut."""
HEALED_S = (1.2, 2.5)
"""Between these multiples of the limit after the cut all cables are put back: before the lost have ended, or later."""
ENDLESS = 1_000_000
HOGS = 4
"""Processes that compute in vain, beside 7 on 2 cores, in a try with load."""
COMPARED_STEPS = 300
TRIALS = ("stopped", "cut", "load")


def cut_off(folder: Path, plan: Path, kind: str, number: int) -> Outcome:
    """Train once; cut two hosts off together (`partition`), or one (`cut`), for longer than the limit."""
    experiment, outcome = make_experiment(folder, f"{kind}-{number}", STEPS), Outcome(kind, number)
    with Hosts(NUM_NODES) as hosts:
        processes = Processes(experiment, plan, hosts)
        try:
            _cut(experiment, plan, processes, hosts, outcome)
        finally:
            outcome.exit_codes = processes.finish()
        outcome.leftover = sum(process.is_alive() for process in processes)
    outcome.last_words = [processes.last_words(rank) for rank in range(NUM_NODES)]
    lost = {loss.rank for loss in outcome.losses}
    outcome.expected_codes = [1 if rank in lost else 0 for rank in range(NUM_NODES)]
    if not outcome.error:
        outcome.missing_steps = STEPS - len(lines_of(experiment.run_path / "metrics.jsonl"))
        outcome.loss_difference = loss_difference(folder, experiment, plan)
    return outcome


def _cut(experiment: Experiment, plan: Path, processes: Processes, hosts: Hosts, outcome: Outcome) -> None:
    run = wait_until_under_way(experiment, outcome.kind, outcome.number)
    if run is None:
        outcome.error = "no step was finished"
        return
    generator, metrics, events, deadline_s = run
    time.sleep(generator.uniform(0.0, 0.5))
    chosen = list(victims(plan, generator, 2 if outcome.kind == "partition" else 1))
    outcome.losses = [Loss(node, rank) for node, rank in chosen]
    heal_s = SILENCE_S * generator.uniform(*HEALED_S)
    begun_s = time.monotonic()
    if outcome.kind == "partition":
        hosts.part([rank for _, rank in chosen])
    else:
        hosts.cut(chosen[0][1])
    if not wait_for(events, 1, begun_s + LIMIT_S):
        outcome.error = f"the loss of {' and '.join(node for node, _ in chosen)} was followed by no epoch"
        return
    went_on_s, before = time.monotonic(), len(lines_of(metrics))
    if before < STEPS and not wait_for(metrics, before + 1, deadline_s):
        outcome.error = "no step after the cut"
    next_step_s = time.monotonic() - begun_s
    time.sleep(max(0.0, begun_s + heal_s - time.monotonic()))
    for _, rank in chosen:
        hosts.heal(rank)
    for loss in outcome.losses:
        loss.recovery_s, loss.next_step_s = lines_of(events)[0]["total_s"], next_step_s
        processes[loss.rank].join(LIMIT_S)
        loss.ended_s = time.monotonic() - begun_s
        outcome.late_writes += processes.writes_after(loss.rank, went_on_s)


def calm(folder: Path, plan: Path, tries: int, seed: int) -> Row:
    """Train through pauses, cuts and load that last shorter than the limit; count epochs that ended all the same."""
    experiment = make_experiment(folder, f"calm-{seed}", ENDLESS)
    metrics, events = experiment.run_path / "metrics.jsonl", experiment.run_path / "events.jsonl"
    generator, longest_s = random.Random(f"calm/{seed}"), 0.0
    done = dict.fromkeys(TRIALS, 0)
    waits_s: list[float] = []
    with Hosts(NUM_NODES) as hosts:
        processes = Processes(experiment, plan, hosts)
        try:
            wait_for(metrics, 2, time.monotonic() + LIMIT_S)
            for number in range(tries):
                what = TRIALS[number % len(TRIALS)]
                duration_s = SILENCE_S * generator.uniform(0.2, 0.75)
                _disturb(what, duration_s, generator.randrange(NUM_NODES), processes, hosts)
                begun_s, before = time.monotonic(), len(lines_of(metrics))
                if not wait_for(metrics, before + 2, begun_s + LIMIT_S):
                    break
                waits_s.append(time.monotonic() - begun_s)
                longest_s = max(longest_s, duration_s)
                done[what] += 1
                if lines_of(events):
                    break
        finally:
            process = processes[0].pid
            if processes[0].is_alive() and process is not None:
                os.kill(process, signal.SIGTERM)
            codes = processes.finish()
    alarms = [event["reason"] for event in lines_of(events)]
    steps = len(lines_of(metrics))
    return {
        "tries": sum(done.values()),
        **{f"of them {what}": count for what, count in done.items()},
        "longest s": round(longest_s, 2),
        "false alarms": len(alarms),
        "steps": steps,
        "two more steps after one, median s": median(waits_s),
        "all ended well": codes == [75] * NUM_NODES,
        "largest difference of a loss": loss_difference(folder, experiment, plan) if not alarms else None,
        "failed": [*alarms, *([] if codes == [75] * NUM_NODES else [f"exit codes {codes}"])],
    }


def _disturb(what: str, duration_s: float, rank: int, processes: Processes, hosts: Hosts) -> None:
    process = processes[rank].pid
    assert process is not None
    if what == "stopped":
        os.kill(process, signal.SIGSTOP)
        time.sleep(duration_s)
        os.kill(process, signal.SIGCONT)
    elif what == "cut":
        hosts.cut(rank)
        time.sleep(duration_s)
        hosts.heal(rank)
    else:
        hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(HOGS)]
        time.sleep(duration_s)
        for hog in hogs:
            hog.kill()
            hog.wait()
