"""What recovery costs where nothing is lost: the same processes train with it and without it, in turn.

Between two connections of a block nothing is measured. Plans are not made ahead, which ends some time after a start.
"""

import math
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lossy_run import NUM_NODES, PORT, PRELOADED, become_rank, make_experiment
from outcomes import Row

from common.hosts import Hosts
from common.one_machine import free_port, rank_environment
from skippipe.config.experiment import Experiment
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics

STEPS = 60
"""Of a block."""
WARM_STEPS = 10
"""Of them, those that are not counted."""
SOLE_SIZES = (3, 3, 1)
"""Stages of which one has a single node, of which a copy is made every `recovery.copy_interval` steps."""
MBIT_PER_S = 40.0
"""Of each host, each way, on shaped links: messages then take much of an iteration."""
ARMS = ("on", "off")


def steady(folder: Path, blocks: int, *, shaped: bool = False, backend: str = "replicated") -> Row:
    """Train `blocks` blocks with recovery and as many without; return medians of iterations and their ratio."""
    from skippipe.planning.experiment_plan import plan_experiment

    name = f"{'shaped' if shaped else 'local'}-{backend}"
    experiments = list(_experiments(folder, name, blocks, backend))
    plan = folder / f"{name}.plan.json"
    plan_experiment(experiments[0]).save(plan)
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(NUM_NODES)) if shaped else None
        if hosts is not None:
            for host in range(NUM_NODES):
                hosts.shape(host, MBIT_PER_S)
        codes = _train_in_turn(folder / name, experiments, plan, hosts)
    if any(codes):
        return {"failed": [f"exit codes {codes}"]}
    arms = {
        arm: [_iterations_s(experiment) for experiment in experiments if experiment.name.endswith(arm)] for arm in ARMS
    }
    pairs = zip(*(map(statistics.median, arms[arm]) for arm in ARMS), strict=True)
    ratios = [without_s / with_s for with_s, without_s in pairs]
    return {
        "links": f"{MBIT_PER_S:g} Mbit/s" if shaped else "local",
        "blocks": blocks,
        "steps of each": STEPS - WARM_STEPS,
        **{f"recovery {arm}, median ms": round(1000 * _median_s(arms[arm]), 2) for arm in ARMS},
        "off / on, of all": round(_median_s(arms["off"]) / _median_s(arms["on"]), 3),
        "off / on, median of pairs": round(statistics.median(ratios), 3),
        "least and most": f"{min(ratios):.3f} to {max(ratios):.3f}",
        "standard error of their mean": round(statistics.stdev(ratios) / math.sqrt(blocks), 4),
        "failed": [],
    }


def _experiments(folder: Path, name: str, blocks: int, backend: str) -> Iterator[Experiment]:
    """Yield the experiment of each block, in turn; `on` and `off` change places from pair to pair."""
    sections: dict[str, Any] = {
        "model": {
            "options": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 259}
            | {"num_attention_heads": 4, "num_key_value_heads": 2}
        },
        "pipeline": {"stage_sizes": SOLE_SIZES, "planner": {"max_evaluations": 200}},
        "optimizer": {"backend": backend},
        "checkpoint": {"interval": 0},
        "evaluation": {"interval": 0},
        "training": {"max_steps": STEPS, "num_microbatches": 6, "sequence_length": 32},
    }
    for block in range(blocks):
        for arm in ARMS if block % 2 == 0 else reversed(ARMS):
            recovery = {"enabled": arm == "on", "silence_s": 10.0, "plans_ahead": False}
            yield make_experiment(folder, f"{name}-{block}-{arm}", STEPS, recovery=recovery, **sections)


def _train_in_turn(folder: Path, experiments: Sequence[Experiment], plan: Path, hosts: Hosts | None) -> list[Any]:
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    address = ("127.0.0.1", free_port()) if hosts is None else (hosts.address(0), PORT)
    processes = []
    for rank in range(NUM_NODES):
        environment = rank_environment(rank, NUM_NODES, *address)
        name = None if hosts is None else hosts.name(rank)
        arguments = (experiments, plan, environment, folder / f"{rank}.log", name)
        processes.append(context.Process(target=train_all, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def train_all(
    experiments: Sequence[Experiment], plan: Path, place: dict[str, str], log: Path, host: str | None
) -> None:
    """Train all experiments, one after another, as one rank."""
    from skippipe.runtime.ranks.context import DistributedContext
    from skippipe.training.loop import train
    from skippipe_scheduler.plan.validate import load_plan

    become_rank(place, log, host)
    context, loaded = DistributedContext.from_environment(120.0), load_plan(plan)
    launched = context.store
    for experiment in experiments:
        train(experiment, loaded, context)
        context.store = launched  # that of an epoch ends with it
    context.close()


def _iterations_s(experiment: Experiment) -> list[float]:
    entries = read_metrics(experiment.run_path / "metrics.jsonl")
    return [float(entry[Metric.ITERATION_S]) for entry in entries[WARM_STEPS:]]


def _median_s(blocks: Sequence[Sequence[float]]) -> float:
    return statistics.median(duration_s for block in blocks for duration_s in block)
