"""Ranks that train small plans under every optimizer back-end; a program, so that its imports are done once and forked.

Each case writes the parameters at the end, the gradient norms and what every rank held of the optimizer's state.
"""

import json
import math
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from processes import free_port
from safetensors.torch import load_file, save_file
from torch import Tensor

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_experiment
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_factory import make_runner
from skippipe.training.loop import train
from skippipe.training.optimizer import OptimizerBackend, make_optimizer
from skippipe_scheduler.plan.plan import Plan, parse_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from ranks import make_batch, make_config, make_experiment

STEPS = 6
MAX_NORM = 0.5
"""Below the gradient norms of all steps, so that clipping always acts."""


def experiment_of(case: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a case: its optimizer and dtype."""
    training = {"max_steps": STEPS, "gradient_normalization": "visits", "dtype": case.get("dtype", "float32")}
    return make_experiment(
        training=training | {"max_grad_norm": MAX_NORM},
        optimizer={"lr": 0.01} | case.get("optimizer", {}),
        lr_scheduler={"warmup_steps": 2},
    )


def train_steps(runner: Runner, optimizer: OptimizerBackend, steps: int) -> list[float]:
    """Train as the loop does; return the gradient norms before clipping."""
    norms = []

    def update() -> None:
        own = optimizer.squared_norm(runner.owned_parameters().values())
        norms.append(math.sqrt(runner.sum_over_ranks([own])[0]))
        optimizer.clip(norms[-1], MAX_NORM)
        optimizer.step()

    runner.reduce_with(optimizer.reduce)
    for _ in range(steps):
        runner.train_iteration(make_batch, update)
    return norms


def run_case(folder: Path, name: str, case: Mapping[str, Any], context: DistributedContext) -> None:
    """Train under one back-end after another, `STEPS` steps in all, handing state on through files."""
    plan: Plan = parse_plan(folder / f"{case['plan']}.plan.json")
    optimizers = case.get("chain", [case.get("optimizer", {})])
    norms: list[float] = []
    parameters: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for link, options in enumerate(optimizers):
        experiment = experiment_of({**case, "optimizer": options})
        runner = make_runner(experiment, plan, make_config(plan.num_layers), context)
        if parameters:
            next(iter(runner.stages.values())).load_global(parameters)
        optimizer = make_optimizer(experiment, runner)
        if link:
            optimizer.load(
                {key: tensor for key, tensor in state.items() if _parameter(key) in optimizer.names}, len(norms)
            )
        norms += train_steps(runner, optimizer, STEPS // len(optimizers))
        parameters = {key: parameter.detach().clone() for key, parameter in runner.parameters().items()}
        held = {key: tensor.contiguous() for key, tensor in optimizer.state(parameters).items()}
        save_file(held, folder / f"{name}.{link}.state.{context.rank}.safetensors")
        runner.barrier()
        state = merged_state(folder, f"{name}.{link}", plan)
        optimizer.close()
        runner.close()
    save_file(parameters, folder / f"{name}.{context.rank}.safetensors")
    (folder / f"{name}.{context.rank}.json").write_text(json.dumps(norms))


def merged_state(folder: Path, name: str, plan: Plan) -> dict[str, Tensor]:
    """Return the state that all ranks wrote."""
    merged: dict[str, Tensor] = {}
    for rank in range(len(plan.nodes)):
        merged |= load_file(folder / f"{name}.state.{rank}.safetensors")
    return merged


def _parameter(key: str) -> str:
    return key.rpartition(".")[0]


def run_rank(folder: Path, rank: int, environment: dict[str, str]) -> None:
    """Train the experiment, if there is one, and run all cases, in one process."""
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    context = DistributedContext.from_environment(60.0)
    if (folder / "experiment.yaml").exists():
        train(load_experiment(folder / "experiment.yaml", ()), parse_plan(folder / "two.plan.json"), context)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        run_case(folder, name, cast("dict[str, Any]", case), context)
    context.close()


def main(folder: Path, world_size: int) -> int:
    """Fork the ranks; return 0 where all of them ended well."""
    if any("deepspeed" in str(case) for case in json.loads((folder / "cases.json").read_text()).values()):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (DeepSpeed imports it late, and it takes long)
    environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(folder, rank, environment)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
