"""One of several processes that serve a model: how they meet, load, and drive or work."""

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
from skippipe.inference.distributed.distributed_decoder import DistributedDecoder
from skippipe.inference.distributed.frame_links import FrameLinks
from skippipe.inference.distributed.serving_group import ServingGroup
from skippipe.inference.distributed.stage_assignment import StageAssignment, assign_stages
from skippipe.inference.distributed.worker import Worker
from skippipe.inference.distributed.worker_pool import WorkerPool
from skippipe.inference.inference_run import InferenceRun, read_inference_run
from skippipe.inference.model_loading import LoadedModel, is_directory, loaded
from skippipe.inference.task_progress import KnownSteps, TaskProgress
from skippipe.membership.addresses import own_address
from skippipe.membership.keys import run_keys
from skippipe.membership.membership import Membership
from skippipe.membership.shared_secret import own_secret
from skippipe.model.device import choose_device
from skippipe.model.skeleton import Skeleton
from skippipe.runtime.epochs.agreed_secret import agreed_secret
from skippipe.runtime.epochs.first_epoch import begin_together
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic


@contextmanager
def serve_together(
    context: DistributedContext, path: Path, *, device: str, num_stages: int | None, absent: Collection[str]
) -> Iterator[LoadedModel | None]:
    """Yield the model in the process that drives the others; None in each of these, once all is done.

    Where the one that drives is lost, the next one gets the model, with what that has done of the task.
    """
    run, host, assignment = _meet(context, path, num_stages, absent)
    with _open_group(context, run, host, assignment) as group:
        try:
            chosen, skeleton = _load(context, run, group, assignment.stages_of[context.rank], device)
            worker = Worker(group, Decoder(skeleton, run.bounds), chosen)
            worker.serve()
            if group.end_code is None:
                with _driving(run, group, skeleton, worker.known) as model:
                    yield model
                return
        except SkipPipeError as error:
            if group.drives or group.end_code is None:
                raise
            raise SystemExit(error.exit_code) from None  # the driver says what it is
        if group.end_code:
            raise SystemExit(group.end_code)
        yield None


def _meet(
    context: DistributedContext, path: Path, num_stages: int | None, absent: Collection[str]
) -> tuple[InferenceRun, str, StageAssignment]:
    """Return the run, this host's address, and who holds what. What is wrong is said by rank 0 alone."""
    try:
        run, host = on_all_ranks(context, Topic.SERVED_RUN, lambda: _prepare(path, num_stages))
        run = replace(run, checkpoint=require_sound_checkpoint(path, context))
        answers = all_gather_json(
            context,
            Topic.SERVING,
            lambda: _introduction(run),
            check=lambda answers: _assigned(run, answers, absent),
        )
    except SkipPipeError as error:
        if context.rank:
            time.sleep(time_limits.HEAD_START_S)
            raise SystemExit(error.exit_code) from None
        raise
    return run, host, _assigned(run, answers, absent)


def _prepare(path: Path, num_stages: int | None) -> tuple[InferenceRun, str]:
    """Read the run, and find the address by which others reach this host."""
    if is_directory(path):
        raise InputError(f"{path}: several processes serve runs alone; skippipe import {path} RUN makes one")
    run = read_inference_run(path, num_stages)
    return run, own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def _introduction(run: InferenceRun) -> dict[str, Any]:
    """Return what the others need to know of this process."""
    return {
        "node": os.environ.get("SKIPPIPE_NODE") or None,
        "plan": run.plan.hash if run.plan is not None else "",
    }


def _assigned(run: InferenceRun, answers: Sequence[Mapping[str, Any]], absent: Collection[str]) -> StageAssignment:
    """Return which rank holds which stages; raise `InputError` where they see different plans or nobody has stage 0."""
    for rank, answer in enumerate(answers):
        if answer["plan"] != answers[0]["plan"]:
            raise InputError(f"rank {rank} sees another plan.json than rank 0; give all of them the same run")
    return assign_stages(run, [answer["node"] for answer in answers], absent)


@contextmanager
def _open_group(
    context: DistributedContext, run: InferenceRun, host: str, assignment: StageAssignment
) -> Iterator[ServingGroup]:
    """Give the group, once all are connected. The driver is its first member: of two islands alike, its goes on."""
    secret = agreed_secret(context, Topic.MEMBERSHIP_KEY, own_secret())
    silence_s, name = run.experiment.recovery.silence_s, assignment.names[context.rank]
    with (
        closing(FrameLinks(run_keys(secret), silence_s)) as links,
        closing(Membership.open(name, host, secret, silence_s, data_port=links.port)) as membership,
    ):
        begin_together(membership, context, run.experiment.comm.timeout_s, assignment.drivers[0])
        group = ServingGroup(membership, links, assignment, context.rank)
        try:
            yield group
        finally:
            if group.end_code is not None:  # all have agreed on the end, be it an error's
                membership.leave()


def _load(
    context: DistributedContext, run: InferenceRun, group: ServingGroup, stages: Sequence[int], device: str
) -> tuple[torch.device, Skeleton]:
    """Return this process's device and stages, once all have theirs; raise what any of them met with that."""
    try:
        chosen = choose_device(device, context.local_rank)
        skeleton = run.load_stages(stages, chosen)
    except SkipPipeError as error:
        group.fail(error)
        raise
    group.next_epoch()
    return chosen, skeleton


@contextmanager
def _driving(run: InferenceRun, group: ServingGroup, skeleton: Skeleton, known: KnownSteps) -> Iterator[LoadedModel]:
    """Give the model to the driver; at the end all others end with its exit code."""
    model = loaded(run, DistributedDecoder(skeleton, run, WorkerPool(group)))
    code = 1
    try:
        yield replace(model, progress=TaskProgress(known, group.tell_step))
        code = 0
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        group.end(code)
