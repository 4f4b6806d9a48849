"""A model for a command, in one process or over those that torchrun started."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skippipe.checkpoint.soundness import require_sound_checkpoint
from skippipe.errors import InputError, SkipPipeError
from skippipe.inference.decoder import Decoder
from skippipe.inference.distributed.connections import Connections, Endpoint
from skippipe.inference.distributed.distributed_decoder import DistributedDecoder
from skippipe.inference.distributed.stage_assignment import StageAssignment, assign_stages
from skippipe.inference.distributed.worker import Worker
from skippipe.inference.distributed.worker_pool import WorkerPool
from skippipe.inference.inference_run import InferenceRun, read_inference_run
from skippipe.inference.model_loading import LoadedModel, is_directory, load_model, loaded
from skippipe.membership.addresses import own_address
from skippipe.model.device import choose_device
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic


@contextmanager
def open_model(
    path: Path, *, device: str = "auto", num_stages: int | None = None, absent: Collection[str] = ()
) -> Iterator[LoadedModel | None]:
    """Yield the model of a run or a directory; `absent` are nodes of the plan that are gone.

    With one process it gets the whole model. With several, the driver (`StageAssignment.driver`) gets the model, whose
    layers the others hold. Each other process is a worker: it serves until the driver leaves this context, and then
    gets None. Where the driver failed, its workers end with its exit code.
    """
    with closing(DistributedContext.from_environment(time_limits.SERVING_MEETING_S, process_groups=False)) as context:
        if context.store is None:
            yield load_model(path, device=device, num_stages=num_stages, absent=absent)
            return
        run, assignment, links = _meet(context, path, num_stages, absent)
        with closing(links):
            chosen = choose_device(device, context.local_rank)
            if context.rank == assignment.driver:
                with _driving(run, assignment, links, chosen) as model:
                    yield model
                return
            stages = assignment.stages_of[context.rank]
            worker = Worker(links, assignment.driver, chosen)
            code = worker.serve(lambda: Decoder(run.load_stages(stages, chosen), run.bounds))
            if code:
                raise SystemExit(code)
            yield None


def _meet(
    context: DistributedContext, path: Path, num_stages: int | None, absent: Collection[str]
) -> tuple[InferenceRun, StageAssignment, Connections]:
    """Return the run, who holds what of it, and the way to the others. What is wrong is said by rank 0 alone."""
    try:
        run, links, door = on_all_ranks(context, Topic.SERVED_RUN, lambda: _prepare(context, path, num_stages))
        run = replace(run, checkpoint=require_sound_checkpoint(path, context))
        answers = all_gather_json(
            context,
            Topic.SERVING,
            lambda: _introduction(run, door),
            check=lambda answers: _assigned(run, answers, absent),
        )
    except SkipPipeError as error:
        if context.rank:
            time.sleep(time_limits.HEAD_START_S)
            raise SystemExit(error.exit_code) from None
        raise
    links.know([Endpoint(*answer["door"]) for answer in answers])
    assignment = _assigned(run, answers, absent)
    return run, assignment, links


def _prepare(
    context: DistributedContext, path: Path, num_stages: int | None
) -> tuple[InferenceRun, Connections, Endpoint]:
    """Read the run and let others connect to this process."""
    if is_directory(path):
        raise InputError(f"{path}: several processes serve runs alone; skippipe import {path} RUN makes one")
    run = read_inference_run(path, num_stages)
    address = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    links = Connections(context.rank, address, run.experiment.comm.timeout_s)
    return run, links, links.listen()


def _introduction(run: InferenceRun, door: Endpoint) -> dict[str, Any]:
    """Return what the others need to know of this process."""
    plan = run.plan.hash if run.plan is not None else ""
    node = os.environ.get("SKIPPIPE_NODE") or None
    return {"door": door, "node": node, "plan": plan}


def _assigned(run: InferenceRun, answers: Sequence[Mapping[str, Any]], absent: Collection[str]) -> StageAssignment:
    """Return which rank holds which stages; raise `InputError` where they see different plans or nobody has stage 0."""
    for rank, answer in enumerate(answers):
        if answer["plan"] != answers[0]["plan"]:
            raise InputError(f"rank {rank} sees another plan.json than rank 0; give all of them the same run")
    return assign_stages(run, [answer["node"] for answer in answers], absent)


@contextmanager
def _driving(
    run: InferenceRun, assignment: StageAssignment, links: Connections, device: torch.device
) -> Iterator[LoadedModel]:
    workers = WorkerPool(links, assignment, run.experiment.comm.timeout_s)
    code = 1
    try:
        workers.assemble()
        skeleton = run.load_stages(assignment.stages_of[assignment.driver], device)
        workers.wait_until_ready()
        yield loaded(run, DistributedDecoder(skeleton, run, workers))
        code = 0
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        workers.end(code)
