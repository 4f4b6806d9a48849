"""What every rank knows, told to all: JSON through the store, so that nothing is unpickled."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from skippipe.errors import CommunicationError, SkipPipeError
from skippipe.runtime.ranks.context import DistributedContext

ANSWER_S = 2.0
"""How long a rank that failed stays, so that the others can read why."""
POLL_S = 0.02


def all_gather_json(
    context: DistributedContext, topic: str, action: Callable[[], Any], limit_s: float | None = None
) -> list[Any]:
    """Return what `action` returns (JSON) on every rank, in rank order. All ranks call this together, once a topic.

    A rank that says nothing within `limit_s` (default: the context's timeout) is given up.

    Where it raises a `SkipPipeError` on any rank, it raises on every rank, with the exit code of the first that failed.
    """
    failure: SkipPipeError | None = None
    try:
        own = {"value": action()}
    except SkipPipeError as reason:
        failure = reason
        own = {"error": str(reason), "exit_code": reason.exit_code}
    answers = (
        [own] if context.store is None else _exchange(context, context.store, topic, own, limit_s or context.timeout_s)
    )
    if failure is not None:
        wait_for_readers(context, topic)
        raise failure
    for rank, answer in enumerate(answers):
        if "error" in answer:
            elsewhere = SkipPipeError(f"rank {rank}: {answer['error']}")
            elsewhere.exit_code = int(answer["exit_code"])
            raise elsewhere
    return [answer["value"] for answer in answers]


def _exchange(
    context: DistributedContext, store: Store, topic: str, own: dict[str, Any], limit_s: float
) -> list[dict[str, Any]]:
    keys = [f"{topic}/{rank}" for rank in range(context.world_size)]
    failure = ""
    try:
        store.set(keys[context.rank], json.dumps(own))
        store.wait(keys, timedelta(seconds=limit_s))
        texts = [store.get(key) for key in keys]
        store.add(f"{topic}/read", 1)
    except RuntimeError as reason:
        failure = str(reason).splitlines()[0]
    if failure:
        raise CommunicationError(
            f"rank {context.rank} did not hear from all {context.world_size} ranks within {limit_s:g} s "
            f"({topic}): {failure}"
        )
    return [json.loads(text) for text in texts]


def wait_for_readers(context: DistributedContext, topic: str) -> None:
    """Stay until the others have read what was gathered: the store may end with this process."""
    if context.store is None:
        return
    deadline_s = time.monotonic() + ANSWER_S
    try:
        while context.store.add(f"{topic}/read", 0) < context.world_size and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    except RuntimeError:
        return
