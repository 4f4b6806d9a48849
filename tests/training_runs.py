"""Small experiments on real text, and the ranks that train them."""

import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from processes import ForkedProcess, free_port, preloaded, run_skippipe
from random_plans import random_plan

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment
from skippipe.monitor.metrics_file import read_metrics
from skippipe.planning.sharing import share_plans
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import train
from skippipe.training.trainer import TrainingSummary
from skippipe_scheduler.plan.plan import Plan

M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: from which size on a block is mapped by itself."""
WORLD_SIZE = 3
"""Ranks of the runs with several processes."""
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
CLUSTER = """
format: skippipe.cluster/1
name: here
nodes:
  - {name: node, count: 4, region: here, compute_tflop_per_s: 0.05, memory_gib: 4}
links:
  contention: none
  within_region: {latency_ms: 0.05, gbit_per_s: 20}
"""


def small_plan(*, num_stages: int = 3, layers_per_stage: int = 2) -> Plan:
    """Return a plan of 4 nodes, 6 layers and 4 microbatches, each over 2 stages."""
    return random_plan(
        5, num_nodes=4, num_stages=num_stages, route_length=2, num_microbatches=4, layers_per_stage=layers_per_stage
    )


def ranks_plan() -> Plan:
    """Return a plan of `WORLD_SIZE` nodes, in which one of the 2 stages has 2 replicas."""
    return random_plan(5, num_nodes=WORLD_SIZE, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=3)


MODEL_OPTIONS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def make_experiment(folder: Path, name: str = "run", **sections: Any) -> Experiment:
    """Return an experiment in `folder`; `sections` are laid over it, key by key."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        (folder / "cluster.yaml").write_text(CLUSTER)
        for number in range(12):
            words = [f"line {line} of text {number} has {line * number} words\n" for line in range(60)]
            (text / f"{number}.txt").write_text("".join(words))
    content: dict[str, Any] = {
        "name": name,
        "run_dir": str(folder / name),
        "seed": 3,
        "cluster": str(folder / "cluster.yaml"),
        "model": {"options": MODEL_OPTIONS},
        "data": {
            "source": "text",
            "paths": [str(text)],
            "validation_fraction": 0.3,
            "cache_dir": str(folder / "cache"),
        },
        "pipeline": {"num_stages": 3, "planner": {"time_limit_s": 0.5}},
        "training": {
            "max_steps": 6,
            "num_microbatches": 4,
            "micro_batch_size": 2,
            "sequence_length": 16,
            "device": "cpu",
            "threads": 1,
        },
        "optimizer": {"lr": 3e-3},  # larger ones amplify fp32 rounding beyond what the tests compare
        "lr_scheduler": {"warmup_steps": 2},
        "checkpoint": {"interval": 2},
        "evaluation": {"interval": 3, "batches": 1},
        "logging": {"wandb": {"mode": "disabled"}},
        "comm": {"timeout_s": 60},
        "recovery": {"enabled": False},
    }
    for section, given in sections.items():
        content[section] = content.get(section, {}) | given if isinstance(given, dict) else given
    return Experiment.model_validate(content)


def train_alone(experiment: Experiment, plan: Plan | None = None) -> TrainingSummary:
    """Train in this process."""
    return train(experiment, plan or small_plan(), ALONE)


def losses(folder: Path) -> list[float]:
    """Return the losses of a run, after checking that every step is there exactly once, in order."""
    entries = read_metrics(folder / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["train/loss"] for entry in entries]


def write_inputs(experiment: Experiment, plan: Plan, folder: Path) -> list[str]:
    """Write the experiment and the plan; return the arguments that name them."""
    save_experiment(experiment, folder / f"{experiment.name}.yaml")
    plan.save(folder / "given.plan.json")
    return ["--config", str(folder / f"{experiment.name}.yaml"), "--plan", str(folder / "given.plan.json")]


def start_torchrun(arguments: list[str]) -> subprocess.Popen[str]:
    """Start `skippipe train` under torchrun as users do, with the exit code of the ranks."""
    launcher = [sys.executable, "-m", "skippipe.cli.agent", "--standalone", "--nproc-per-node", str(WORLD_SIZE)]
    return subprocess.Popen(
        [*launcher, "-m", "skippipe", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_on_ranks(
    experiment: Experiment,
    plan: Plan | None,
    blocked_rank: int = -1,
    world_size: int = WORLD_SIZE,
    *,
    return_memory: bool = False,
    own_disks: bool = False,
) -> list[str]:
    """Train on one process per node; return what each wrote to standard error, after checking that none failed.

    Without a plan rank 0 finds or solves it for `world_size` nodes, with those that the recipe needs. The processes
    are forked from one server that has imported everything. On `blocked_rank` the disk is full until its
    first checkpoint has failed. With `return_memory`, blocks that are given back leave the process at once, so that
    resident memory is what is in use. With `own_disks` each rank has a run directory of its own, `disk_of` it.
    """
    context = preloaded()
    port, world_size = free_port(), len(plan.nodes) if plan else world_size
    processes, logs = [], []
    for rank in range(world_size):
        place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        logs.append(experiment.run_path.with_name(f"{experiment.name}-{rank}.log"))
        own = experiment.model_copy(update={"run_dir": str(disk_of(experiment.run_path, rank))})
        arguments = (
            own if own_disks else experiment,
            plan,
            {key: str(value) for key, value in place.items()},
            logs[-1],
            rank == blocked_rank,
            return_memory,
        )
        processes.append(context.Process(target=_train_rank, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(100)
        if process.exitcode is None:
            process.kill()
            process.join()
    texts = [log.read_text() for log in logs]
    assert [process.exitcode for process in processes] == [0] * world_size, texts
    return texts


def on_ranks(task: Callable[..., None], *arguments: Any) -> None:
    """Call `task(rank, *arguments)` in one process per rank, each with its place in the environment; none may fail."""
    port, context = free_port(), preloaded()
    processes = []
    for rank in range(WORLD_SIZE):
        place = {"RANK": rank, "WORLD_SIZE": WORLD_SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()}
        processes.append(context.Process(target=_on_rank, args=(environment, task, rank, *arguments)))
        processes[-1].start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * WORLD_SIZE


def _on_rank(environment: dict[str, str], task: Callable[..., None], rank: int, *arguments: Any) -> None:
    os.environ.update(environment)
    task(rank, *arguments)


def disk_of(run_dir: Path, rank: int) -> Path:
    """Return the run directory of a rank that has one of its own."""
    return run_dir.with_name(f"{run_dir.name}-on-{rank}")


def _train_rank(
    experiment: Experiment, plan: Plan | None, place: dict[str, str], log: Path, blocked: bool, return_memory: bool
) -> None:
    if return_memory:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    os.environ.update(place)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    logging.basicConfig(level=logging.WARNING)
    if blocked:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
        logging.getLogger("skippipe.checkpoint.writer").addFilter(_make_room)
    with closing(DistributedContext.from_environment(60.0)) as context:
        train(experiment, plan or share_plans(experiment, None, context), context)


def _make_room(record: logging.LogRecord) -> bool:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return True


def start_ranks(config: Path, plan: Path) -> list[ForkedProcess]:
    """Start `skippipe train` once per rank, without waiting for imports."""
    return _start_ranks(_train, "ranks", config, plan, 0)


def start_ranks_that_die_while_saving(config: Path, plan: Path, step: int) -> list[ForkedProcess]:
    """Start `skippipe train` once per rank; rank 0 is killed in the middle of the checkpoint of `step`."""
    return _start_ranks(_die_while_saving, "dying", config, plan, step)


def start_ranks_in_a_long_step(config: Path, plan: Path, step: int) -> list[ForkedProcess]:
    """Start `skippipe train` once per rank; in the step after `step` each origin gets a SIGTERM, then computes long."""
    return _start_ranks(_compute_long, "long", config, plan, step)


def _start_ranks(
    run: Callable[[Path, Path, int, Path, dict[str, str]], None], name: str, config: Path, plan: Path, step: int
) -> list[ForkedProcess]:
    port, context = free_port(), preloaded()
    ranks = []
    for rank in range(WORLD_SIZE):
        place = {"RANK": rank, "WORLD_SIZE": WORLD_SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = config.with_name(f"{name}-{rank}.txt")
        environment = {key: str(value) for key, value in place.items()}
        process = context.Process(target=run, args=(config, plan, step, output, environment))
        process.start()
        ranks.append(ForkedProcess(process, output))
    return ranks


def _train(config: Path, plan: Path, step: int, output: Path, environment: dict[str, str]) -> None:
    run_skippipe(["train", "--config", str(config), "--plan", str(plan)], output, environment)


def _die_while_saving(config: Path, plan: Path, fatal_step: int, output: Path, environment: dict[str, str]) -> None:
    """Run `skippipe train` as it is, but with a kill before the checkpoint of `fatal_step` gets its name."""
    from skippipe.checkpoint import writer as checkpoint_writer
    from skippipe.checkpoint.reader import Metadata

    finish = checkpoint_writer._finish

    def finish_or_die(aside: Path, final: Path, metadata: Metadata, check: Callable[[], None] = lambda: None) -> None:
        if metadata.step == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(aside, final, metadata, check)

    checkpoint_writer._finish = finish_or_die
    run_skippipe(["train", "--config", str(config), "--plan", str(plan)], output, environment)


def _compute_long(config: Path, plan: Path, last_step: int, output: Path, environment: dict[str, str]) -> None:
    """Run `skippipe train` as it is, but with a step that takes longer than anybody waits after a signal."""
    from skippipe.data.samples import SampleOrder

    batch = SampleOrder.batch
    signalled: list[int] = []

    def slow_batch(order: SampleOrder, step: int, *counts: int) -> Any:
        if step == last_step and not signalled:
            signalled.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
        return batch(order, step, *counts)

    SampleOrder.batch = slow_batch  # type: ignore[assignment,method-assign]  # in this process alone
    run_skippipe(["train", "--config", str(config), "--plan", str(plan)], output, environment)
