"""A tiny model, its batches, and processes that run plans together."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import ForkedProcess, free_port, preloaded
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from skippipe.config.experiment import Experiment
from skippipe.errors import SkipPipeError
from skippipe.model.architecture import build_config
from skippipe.runtime.distributed_runner import DistributedRunner
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_factory import make_runner, make_stage
from skippipe.runtime.runner_options import runner_options
from skippipe_scheduler.plan.plan import Plan, parse_plan

VOCABULARY = 64


def make_config(num_layers: int, *, tied: bool = False) -> PretrainedConfig:
    """Return a Llama of hidden size 32."""
    return build_config(
        "llama",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": num_layers,
            "max_position_embeddings": 32,
            "tie_word_embeddings": tied,
        },
    )


def make_experiment(**sections: object) -> Experiment:
    """Return an experiment of small microbatches on the CPU; `sections` are laid over it."""
    training = {"micro_batch_size": 2, "sequence_length": 8, "device": "cpu", "threads": 1}
    content = {"cluster": "none.yaml", "data": {"source": "python_stdlib"}, "seed": 7, **sections}
    given = content.get("training", {})
    assert isinstance(given, dict)
    content["training"] = training | given
    return Experiment.model_validate(content)


def make_batch(microbatch: int) -> tuple[Tensor, Tensor]:
    """Return (input_ids, labels), (2, 8) each, that depend on the microbatch alone."""
    generator = torch.Generator().manual_seed(microbatch)
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradients_of(runner: Runner) -> dict[str, Tensor]:
    """Return a copy of all gradients held by a runner."""
    return {
        name: parameter.grad.clone() for name, parameter in runner.parameters().items() if parameter.grad is not None
    }


@contextmanager
def counted_collectives() -> Iterator[Counter[int]]:
    """Count the collectives of this rank by the number of ranks in their group, while they do what they do."""
    counts: Counter[int] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "barrier")}

    def counting(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: Any, **options: Any) -> object:
            group = options.get("group") or next((a for a in arguments if isinstance(a, dist.ProcessGroup)), None)
            counts[dist.get_world_size(group)] += 1
            return original(*arguments, **options)

        return call

    for name, original in originals.items():
        setattr(dist, name, counting(original))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def start_ranks(folder: Path, mode: str, world_size: int, timeout_s: float = 60.0) -> list[ForkedProcess]:
    """Start `main` once per rank; each reads plans and writes results in `folder`. `mode` may be `module:function`.

    The processes are forked from one server that has imported everything, because that is what takes long.
    """
    context = preloaded()
    port = free_port()
    ranks = []
    for rank in range(world_size):
        environment = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        errors = folder / f"errors-{rank}.txt"
        errors.touch()
        process = context.Process(
            target=run_rank, args=(folder, mode, timeout_s, errors, {k: str(v) for k, v in environment.items()})
        )
        process.start()
        ranks.append(ForkedProcess(process, errors))
    return ranks


def finish_ranks(ranks: Sequence[ForkedProcess], timeout_s: float) -> list[tuple[int | None, str]]:
    """Return exit code (None where it had to be ended) and standard error of every rank."""
    deadline_s = time.monotonic() + timeout_s
    return [rank.finish(max(0.1, deadline_s - time.monotonic())) for rank in ranks]


def run_rank(folder: Path, mode: str, timeout_s: float, errors: Path, environment: dict[str, str]) -> None:
    """Run one rank in a new process: its own environment, standard error to a file."""
    os.environ.update(environment)
    with errors.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    sys.exit(main(folder, mode, timeout_s))


def make_with_options(path: Path, plan: Plan, context: DistributedContext) -> Runner:
    """Return the runner of this rank for a plan and the options that lie beside it.

    With `matching: order` messages match by order, NCCL's way, here on gloo.
    """
    sections = json.loads(path.with_suffix("").with_suffix(".options.json").read_text())
    matching = sections.pop("matching", "tags")
    experiment, config = make_experiment(**sections), make_config(plan.num_layers)
    if matching == "tags":
        return make_runner(experiment, plan, config, context)
    options = replace(runner_options(experiment, config, context), matching=matching)
    held = plan.stage_of[plan.nodes[context.rank]]
    return DistributedRunner.connect(plan, make_stage(plan, held, config, experiment.seed, options), context, options)


def run_gradients(folder: Path, context: DistributedContext) -> None:
    """Run one iteration of every plan; write this rank's gradients, its loss and the evaluated loss."""
    for path in sorted(folder.glob("*.plan.json")):
        plan = parse_plan(path)
        runner = make_with_options(path, plan, context)
        captured: dict[str, Tensor] = {}
        with counted_collectives() as collectives:
            for _ in range(2):  # the second one finds tags, gradients and losses of the first
                captured.clear()
                result = runner.train_iteration(make_batch, lambda: captured.update(gradients_of(runner)))  # noqa: B023
        name = path.name.removesuffix(".plan.json")
        save_file(captured, folder / f"{name}.{context.rank}.safetensors")
        numbers = {
            "loss": runner.sum_over_ranks([result.loss])[0],
            "evaluated": runner.evaluate(make_batch, 3),
            "owned": sorted(runner.owned_parameters()),
            "collectives": collectives[context.world_size],
            "spans": [span[:3] for span in result.spans],
        }
        (folder / f"{name}.{context.rank}.json").write_text(json.dumps(numbers))
        runner.barrier()
        runner.close()


def run_emulated(folder: Path, context: DistributedContext) -> None:
    """Run every plan a few times with emulation; write the measured durations."""
    for path in sorted(folder.glob("*.plan.json")):
        plan = parse_plan(path)
        runner = make_with_options(path, plan, context)
        results = [runner.train_iteration(make_batch, lambda: None) for _ in range(3)]
        measured = {
            "durations_s": [result.duration_s for result in results],
            "spans": [list(span) for span in results[-1].spans],
        }
        (folder / f"{path.name}.{context.rank}.json").write_text(json.dumps(measured))
        runner.close()


def run_until_stopped(folder: Path, context: DistributedContext, *, faulty_rank: int = -1) -> None:
    """Run iterations until something breaks; `faulty_rank` fails by itself in its second iteration."""
    path = next(folder.glob("*.plan.json"))
    plan: Plan = parse_plan(path)
    runner = make_with_options(path, plan, context)
    iteration = 0

    def step() -> None:
        if context.rank == faulty_rank and iteration == 2:
            raise ValueError("the optimizer met a number that is not finite")

    while True:
        iteration += 1
        runner.train_iteration(make_batch, step)
        (folder / f"ready-{context.rank}").touch()


def main(folder: Path, mode: str, timeout_s: float) -> int:
    """Run one rank; return its exit code."""
    context = DistributedContext.from_environment(timeout_s)
    try:
        if mode == "gradients":
            run_gradients(folder, context)
        elif mode == "emulated":
            run_emulated(folder, context)
        elif mode == "nccl":
            runner_options(make_experiment(comm={"backend": "nccl"}), make_config(2), context)
        elif ":" in mode:
            module, function = mode.split(":")
            getattr(import_module(module), function)(folder, context)
        else:
            run_until_stopped(folder, context, faulty_rank=2 if mode == "faulty" else -1)
    except SkipPipeError as error:
        print(f"skippipe: error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        context.close()
    return 0
