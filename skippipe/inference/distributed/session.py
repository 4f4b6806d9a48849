"""A model for a command, in one process or over those that torchrun started."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skippipe.errors import InputError, SkipPipeError
from skippipe.inference.decoder import Decoder
from skippipe.inference.distributed.connections import Connections, Endpoint, own_address
from skippipe.inference.distributed.distributed_decoder import DistributedDecoder
from skippipe.inference.distributed.stage_assignment import StageAssignment, assign_stages
from skippipe.inference.distributed.worker import Worker
from skippipe.inference.distributed.worker_pool import WorkerPool
from skippipe.inference.inference_run import InferenceRun, read_inference_run
from skippipe.inference.model_loading import LoadedModel, is_directory, load_model, loaded
from skippipe.model.device import choose_device
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.exchange import all_gather_json, wait_for_readers

MEETING_S = 120.0
"""How long processes wait for each other; after that the run says how long."""
HEAD_START_S = 0.3
"""How much sooner rank 0 says what is wrong than another rank ends, upon which torchrun ends them all."""
TOPIC = "inference"


@contextmanager
def open_model(
    path: Path, *, device: str = "auto", num_stages: int | None = None, absent: Collection[str] = ()
) -> Iterator[LoadedModel | None]:
    """Yield the model of a run or a directory; `absent` are nodes of the plan that are gone.

    Where several processes were started, one of them gets the model, with layers that the others hold. Each of these
    serves until that one leaves the context; then it gets None, or ends with the exit code of what went wrong there.
    """
    with closing(DistributedContext.from_environment(MEETING_S, process_groups=False)) as context:
        if context.store is None:
            yield load_model(path, device=device, num_stages=num_stages, absent=absent)
            return
        run, cast, links = _meet(context, path, num_stages, absent)
        with closing(links):
            chosen = choose_device(device, context.local_rank)
            if context.rank == cast.driver:
                with _driving(run, cast, links, chosen) as model:
                    yield model
                return
            stages = cast.stages_of[context.rank]
            worker = Worker(links, cast.driver, chosen)
            code = worker.serve(lambda: Decoder(run.load_stages(stages, chosen), run.bounds))
            if code:
                raise SystemExit(code)
            yield None


def _meet(
    context: DistributedContext, path: Path, num_stages: int | None, absent: Collection[str]
) -> tuple[InferenceRun, StageAssignment, Connections]:
    """Return the run, who holds what of it, and the way to the others. What is wrong is said by rank 0 alone."""
    met: list[tuple[InferenceRun, Connections]] = []

    def introduce() -> dict[str, Any]:
        try:
            run = _read(path, num_stages)
            address = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            links = Connections(context.rank, address, run.experiment.comm.timeout_s)
        except SkipPipeError as error:
            return {"failed": str(error), "exit_code": error.exit_code}
        met.append((run, links))
        plan = run.plan.hash if run.plan is not None else ""
        node = os.environ.get("SKIPPIPE_NODE") or None
        return {"door": links.door, "node": node, "checkpoint": run.checkpoint.name, "plan": plan}

    answers = all_gather_json(context, TOPIC, introduce)
    try:
        _check(answers)
        run, links = met[0]
        cast = assign_stages(run, [answer["node"] for answer in answers], absent)
    except SkipPipeError as error:
        if context.rank:
            time.sleep(HEAD_START_S)
            raise SystemExit(error.exit_code) from None
        wait_for_readers(context, TOPIC)
        raise
    links.know([Endpoint(*answer["door"]) for answer in answers])
    oldest = min(answer["checkpoint"] for answer in answers)  # training may go on meanwhile
    return replace(run, checkpoint=run.checkpoint.with_name(oldest)), cast, links


def _read(path: Path, num_stages: int | None) -> InferenceRun:
    if is_directory(path):
        raise InputError(f"{path}: several processes serve runs alone; skippipe import {path} RUN makes one")
    return read_inference_run(path, num_stages)


def _check(answers: Sequence[Mapping[str, Any]]) -> None:
    """Raise what the first rank met that failed, and `InputError` where ranks see different plans."""
    for rank, answer in enumerate(answers):
        if "failed" in answer:
            failure = SkipPipeError(f"rank {rank}: {answer['failed']}" if rank else answer["failed"])
            failure.exit_code = int(answer["exit_code"])
            raise failure
    for rank, answer in enumerate(answers):
        if answer["plan"] != answers[0]["plan"]:
            raise InputError(f"rank {rank} sees another plan.json than rank 0; give all of them the same run")


@contextmanager
def _driving(
    run: InferenceRun, cast: StageAssignment, links: Connections, device: torch.device
) -> Iterator[LoadedModel]:
    crew = WorkerPool(links, cast, run.experiment.comm.timeout_s)
    code = 1
    try:
        crew.assemble()
        skeleton = run.load_stages(cast.stages_of[cast.driver], device)
        crew.wait_until_ready()
        yield loaded(run, DistributedDecoder(skeleton, run, crew))
        code = 0
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        crew.end(code)
