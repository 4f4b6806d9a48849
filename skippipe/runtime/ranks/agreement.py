"""How ranks agree: what one of them cannot do, none does, and all hear why at the same place.

Every rank does its part and tells the others, as JSON through the store (nothing is unpickled), what came of it. Where
that was an error on any rank, every rank raises one: its own where it has one, else that of the first rank that failed,
with that rank's number in front, its class and its exit code. All ranks take part in the same order; messages are lost
with a rank that dies, so the others then give up after the timeout.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from skippipe.errors import CommunicationError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.remote_errors import error_content, error_elsewhere
from skippipe.runtime.ranks.store_names import Topic

Result = TypeVar("Result")


def on_all_ranks(
    context: DistributedContext, topic: Topic, action: Callable[[], Result], *, limit_s: float | None = None
) -> Result:
    """Return what `action` returns here, once it has succeeded on every rank.

    Raises on every rank where it raises on any, and `CommunicationError` where a rank says nothing within `limit_s`
    (default: the context's timeout).
    """
    result, _ = _agree(context, topic, action, lambda _: None, limit_s)
    return result


def all_gather_json(
    context: DistributedContext,
    topic: Topic,
    action: Callable[[], Any],
    *,
    check: Callable[[Sequence[Any]], object] | None = None,
    limit_s: float | None = None,
) -> list[Any]:
    """Return what `action` returns (JSON) on each rank, in rank order; raises as `on_all_ranks` does.

    `check` gets the same on every rank and may raise: it does so everywhere, once all ranks have been told.
    """
    _, answers = _agree(context, topic, action, lambda value: value, limit_s)
    try:
        if check is not None:
            check(answers)
    except Exception:
        context.leave_meeting()
        raise
    return answers


def on_first_rank(
    context: DistributedContext, topic: Topic, action: Callable[[], Any], *, limit_s: float | None = None
) -> Any:
    """Return on every rank what `action` returns (JSON) on rank 0, which alone calls it; see `on_all_ranks`."""
    return all_gather_json(context, topic, lambda: action() if context.rank == 0 else None, limit_s=limit_s)[0]


def _agree(
    context: DistributedContext,
    topic: Topic,
    action: Callable[[], Result],
    content_of: Callable[[Result], Any],
    limit_s: float | None,
) -> tuple[Result, list[Any]]:
    """Return this rank's result and the contents of all."""
    try:
        result = action()
        own = json.dumps({"value": content_of(result)})
    except Exception as failure:
        _tell(context, topic, failure, limit_s)
        raise
    answers = [json.loads(text) for text in context.meet(topic, own, limit_s)]
    for rank, answer in enumerate(answers):
        if "error" in answer:
            context.leave_meeting()
            raise error_elsewhere(answer["error"], f"rank {rank}")
    return result, [answer["value"] for answer in answers]


def _tell(context: DistributedContext, topic: Topic, failure: Exception, limit_s: float | None) -> None:
    """Tell the others of a failure here, and stay until they have read it.

    They may be long in coming. But where the failure is that one of them is lost, it never comes.
    """
    if isinstance(failure, CommunicationError):
        limit_s = time_limits.LAST_WORDS_S
    with suppress(CommunicationError):  # what failed here says more
        context.meet(topic, json.dumps({"error": error_content(failure)}), limit_s)
    context.leave_meeting(heard=True)
