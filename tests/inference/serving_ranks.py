"""A small run, what is asked of it, and processes that answer together."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from processes import free_port, preloaded, run_skippipe
from pydantic_core import to_json
from random_plans import random_plan
from torch import Tensor
from training_runs import MODEL_OPTIONS, make_experiment, train_alone

from skippipe.errors import SkipPipeError
from skippipe.inference.depth_schedule import segments
from skippipe.inference.distributed.frame_links import Frame
from skippipe.inference.distributed.serving_group import ServingGroup
from skippipe.inference.distributed.session import open_model
from skippipe.inference.distributed.worker import Worker
from skippipe.inference.evaluation.perplexity import PerplexityOptions, evaluate
from skippipe.inference.generation.drafts.drafter import FixedDraft
from skippipe.inference.generation.generation import generate
from skippipe.inference.generation.sampling import Sampling
from skippipe.inference.generation.speculative import draft_layers, speculate
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.policies.base import Policy, PolicyContext
from skippipe.inference.policies.construction import build_policy

PROMPTS = [[5, 17, 3, 60, 22, 9], [44], [1, 2, 3, 40]]
NEW = 8
KEEPS = {"full": 1.0, "random": 0.67, "stages:0,2,1": 1.0, "best": 0.67, "unified": 0.5, "skipdecode": 0.6, "exit": 0.5}
EVERYTHING = (*KEEPS, "sampled", "speculative exit", "speculative random", "logits", "evaluation")
DRIVER = 2
"""The rank of the one node with stage 0."""
Fault = tuple[int, signal.Signals]
"""In which pass a process gets which signal, before it has computed anything; one that drives, after which step."""


def make_run(folder: Path) -> Path:
    """Train a model of 6 layers whose weights are large enough for different tokens to come out.

    Stage 0 is held by node-2, stage 1 by node-3 and node-0, stage 2 by node-1.
    """
    plan = random_plan(5, num_nodes=4, num_stages=3, route_length=2, num_microbatches=4, layers_per_stage=2)
    experiment = make_experiment(
        folder,
        model={"options": MODEL_OPTIONS | {"initializer_range": 0.2}},
        training={"max_steps": 1},
        recovery={"silence_s": 2.0},
    )
    train_alone(experiment, plan)
    assert [stage.nodes for stage in plan.stages] == [("node-2",), ("node-3", "node-0"), ("node-1",)]
    return folder / "run"


def answer(model: LoadedModel, question: str) -> Any:
    """Return text and shares under a policy, or what else is asked for, as JSON keeps it."""
    kind, _, argument = question.partition(" ")
    if kind == "continue":
        return continued(model, PROMPTS[0], int(argument))
    if kind == "evaluation":
        options = PerplexityOptions(num_batches=2, repeats=1, prompt_length=4)
        return as_json(evaluate(model, policies=["full", "random", "unified"], keeps=[0.67], options=options))
    if kind == "speculative":
        draft = draft_layers(_policy(model, argument), model.decoder)
        return as_json(speculate(model.decoder, FixedDraft(model.decoder, draft), PROMPTS, max_new_tokens=NEW))
    if kind == "logits":
        layers_of = [_policy(model, "skipdecode").layers_at(position, 4) for position in range(11)]
        with torch.inference_mode():
            return model.decoder.logits(_calibration()[:, :-1], segments(layers_of)).tolist()
    sampling = Sampling(do_sample=kind == "sampled", temperature=1.5, repetition_penalty=1.2, seed=3)
    policy = _policy(model, "full" if kind == "sampled" else kind)
    generated = generate(model.decoder, policy, PROMPTS, max_new_tokens=NEW, sampling=sampling, progress=model.progress)
    return as_json(generated)


def as_json(result: Any) -> Any:
    """Return a result as JSON keeps it."""
    return json.loads(to_json(result))


def continued(model: LoadedModel, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Return a greedy answer of so many tokens, and what is missing."""
    policy = _policy(model, "full")
    generated = generate(model.decoder, policy, [list(prompt)], max_new_tokens=count, progress=model.progress)
    return {"tokens": generated.tokens[0], "share": generated.share_of_generated, "absence": model.decoder.absence}


def _policy(model: LoadedModel, name: str) -> Policy:
    context = PolicyContext(model.decoder, KEEPS[name], seed=1, num_generated=NEW, calibration=_calibration)
    return build_policy(name, context).sample(0)


def _calibration() -> Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(4))


def on_ranks(
    folder: Path,
    run_dir: Path,
    questions: Sequence[str],
    world_size: int,
    *,
    absent: Sequence[str] = (),
    num_stages: int | None = None,
    faults: Mapping[int, Fault] | None = None,
) -> tuple[dict[str, Any], list[int | None], list[str]]:
    """Ask a run on processes; return the answers, the exit code of every rank, and its standard error.

    `faults` are by rank.
    """
    result = folder / "answers.json"
    common, chosen = (run_dir, tuple(questions), tuple(absent), num_stages, result), faults or {}
    targets = [(*common, folder / f"{rank}.log", chosen.get(rank)) for rank in range(world_size)]
    codes, logs = _run(_answer, targets, folder)
    return (json.loads(result.read_text()) if result.exists() else {}), codes, logs


def command_on_ranks(folder: Path, arguments: Sequence[str], world_size: int) -> tuple[list[int | None], list[str]]:
    """Run a command on processes; return the exit code of every rank and what it printed."""
    targets = [(list(arguments), folder / f"{rank}.log") for rank in range(world_size)]
    return _run(run_skippipe, targets, folder)


def _run(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], folder: Path
) -> tuple[list[int | None], list[str]]:
    """Start a process for each rank, and wait for all that are not stopped."""
    context, port, world_size = preloaded(), free_port(), len(arguments)
    processes = []
    for rank, own in enumerate(arguments):
        place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(context.Process(target=target, args=(*own, {key: str(value) for key, value in place.items()})))
        processes[-1].start()
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and any(map(_is_running, processes)):
        time.sleep(0.01)
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    return codes, [(folder / f"{rank}.log").read_text() for rank in range(world_size)]


def _is_running(process: ForkServerProcess) -> bool:
    if process.exitcode is not None or process.pid is None:
        return False
    try:
        return bool(psutil.Process(process.pid).status() != psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True  # its exit code comes in a moment


def _answer(
    run_dir: Path,
    questions: Sequence[str],
    absent: Sequence[str],
    num_stages: int | None,
    result: Path,
    log: Path,
    fault: Fault | None,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(environment)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    if fault is not None:
        _break(*fault)
    try:
        with open_model(run_dir, device="cpu", num_stages=num_stages, absent=absent) as model:
            if model is not None:
                result.write_text(json.dumps({question: answer(model, question) for question in questions}))
    except SkipPipeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _break(at: int, how: signal.Signals) -> None:
    """Let this process get a signal when it is about to run its part of one pass."""
    follow = Worker._follow

    def follow_or_break(self: Worker, frame: Frame) -> None:
        if frame.header.get("pass", 0) % 2**32 == at:
            os.kill(os.getpid(), how)
        follow(self, frame)

    tell_step = ServingGroup.tell_step

    def tell_or_break(self: ServingGroup, number: int, value: Any, draws: Tensor | None) -> None:
        tell_step(self, number, value, draws)
        if number == at:
            os.kill(os.getpid(), how)

    Worker._follow = follow_or_break  # type: ignore[method-assign]  # the fault is put in here alone
    ServingGroup.tell_step = tell_or_break  # type: ignore[method-assign]  # the same
