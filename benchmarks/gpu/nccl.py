"""NCCL as far as one card allows: a group of one rank, a pair on one card, and the order that NCCL needs, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import several_ranks
import torch
from setting import Bar, Figures, make_experiment, plans_of

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment

PROGRAM = """
import os, torch, torch.distributed as dist
torch.cuda.set_device(0)
dist.init_process_group("nccl")
numbers = torch.full((1000,), float(dist.get_rank() + 1), device="cuda")
dist.all_reduce(numbers)
if dist.get_world_size() > 1:
    other = 1 - dist.get_rank()
    received = torch.empty(1000, device="cuda")
    work = dist.batch_isend_irecv([dist.P2POp(dist.isend, numbers, other), dist.P2POp(dist.irecv, received, other)])
    [request.wait() for request in work]
    assert torch.equal(received, numbers)
torch.cuda.synchronize()
assert float(numbers[0]) == sum(range(1, dist.get_world_size() + 1)), float(numbers[0])
dist.destroy_process_group()
"""
TIMEOUT_S = 60


def experiments(folder: Path, *, rehearse: bool) -> list[Experiment]:
    """Return the one whose messages are known by their order alone, as NCCL knows them."""
    return [
        make_experiment(
            folder,
            "ordered",
            "124M",
            rehearse=rehearse,
            num_nodes=2,
            pipeline={"num_stages": 2},
            training={"max_steps": several_ranks.STEPS, "dtype": "float32", "micro_batch_size": 1, "threads": 1},
            comm={"backend": "gloo"},
        )
    ]


def measure(figures: Figures, folder: Path, carried: Path | None) -> None:
    """Say of each part whether it was shown here."""
    for count, what in ((1, "a group of one rank"), (2, "a pair on one card, all-reduce and point to point")):
        shown, why = _group(count)
        figures.add(f"NCCL, {what}: {why}", float(shown), "shown", Bar(at_least=1) if shown else None)
    (experiment,) = experiments(folder, rehearse=figures.rehearse)
    config, path = folder / "ordered.yaml", folder / "ordered.json"
    save_experiment(experiment, config)
    plans_of(experiment, carried).main.save(path)
    together, alone = (_loss(config, path, count) for count in (2, 1))
    difference = abs(together - alone) / alone
    label = "loss of two ranks beside one process, messages known by their order alone"
    figures.add(label, difference, "relative", several_ranks.LOSS_BAR)


def _loss(config: Path, plan: Path, count: int) -> float:
    """Return the loss of one iteration on `count` ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__).with_name("ordered_rank.py")), str(config), str(plan)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _group(count: int) -> tuple[bool, str]:
    """Try a group of `count` ranks on the first card; return whether it works, and which version or why not."""
    if not torch.cuda.is_available():
        return False, "not shown, no GPU"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--no-python"]
    command = [sys.executable, "-m", *launcher, sys.executable, "-c", PROGRAM]
    version = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        done = subprocess.run(
            command, env=dict(os.environ), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"not shown, NCCL {version} gave no answer in {TIMEOUT_S} s"
    if done.returncode == 0:
        return True, f"NCCL {version}"
    reasons = [line for line in done.stderr.splitlines() if "NCCL" in line or "Duplicate GPU" in line]
    return False, f"not shown, NCCL {version}: {reasons[-1][-160:] if reasons else 'see the log'}"
