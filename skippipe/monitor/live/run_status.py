"""RUN/nodes.json: how a run and each of its nodes stand now, for who looks from outside."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Final, Literal

from pydantic import Field

from skippipe.errors import InputError, StorageError
from skippipe_scheduler.files import Count, Name, PositiveSeconds, Seconds, StrictModel, parse, read_json, replacing

FILE_NAME: Final = "nodes.json"
TimeShare = Annotated[float, Field(ge=0, le=1)]
TimeRatio = Annotated[float, Field(gt=0)]
"""By what factor something takes longer than planned."""


class NodeStatus(StrictModel):
    """One node; shares and pace are over the last steps, bytes are those of now."""

    node: Name
    """As in the cluster file; `all` where one process is all nodes."""
    stages: tuple[Count, ...]
    """Those that it holds."""
    busy_share: TimeShare
    """Of the time, that spent in tasks."""
    waiting_share: TimeShare
    """Of the time, that spent waiting for messages; the rest went into the reduction, the update and other waits."""
    pace: TimeRatio | None
    """Time of its tasks over that of the plan, median; None where it had no task."""
    process_bytes: Count
    """Resident memory of the process."""
    device_bytes: Count | None
    """GPU memory that torch holds; None on a CPU."""
    peak_bytes: Count
    """Most memory so far, of what the plan estimates."""
    estimated_bytes: Count
    """What the plan estimates."""


class LinkStatus(StrictModel):
    """A link that microbatches cross, both ways together."""

    nodes: tuple[Name, Name]
    planned_s: PositiveSeconds
    """Time of a message by the plan, mean of both ways."""
    message_bytes: Count | None
    """Size of a message; None where the plan does not say it."""
    pace: TimeRatio | None
    """Measured time of messages over that of the plan; None where the run has not measured it."""

    def gbit_per_s(self, pace: float = 1.0) -> float | None:
        """Return the rate of messages that take `pace` times as long as planned, latency included."""
        return None if self.message_bytes is None else 8e-9 * self.message_bytes / (self.planned_s * pace)


class RunStatus(StrictModel):
    """The content of the file."""

    format: Literal["skippipe.nodes/1"] = "skippipe.nodes/1"
    written_at_s: Seconds
    """When, in seconds since 1970."""
    step: Count
    """The last step that is taken."""
    max_steps: Count
    loss: float
    """Of that step, in nats per token."""
    tokens_per_s: Seconds
    iteration_s: Seconds
    predicted_s: Seconds
    """What the plan predicts for that."""
    plan_hash: str
    """Of the main plan of the present members."""
    nodes: tuple[NodeStatus, ...]
    """Those that are in the run, in rank order."""
    links: tuple[LinkStatus, ...]
    """Those with transfers long enough to be measured."""

    @property
    def is_finished(self) -> bool:
        """Whether the last step of the run is taken."""
        return self.step >= self.max_steps


def slowest_of(nodes: Sequence[NodeStatus]) -> NodeStatus | None:
    """Return the node whose tasks take longest beside the plan; None where there is nothing to compare."""
    paced = [node for node in nodes if node.pace is not None]
    return max(paced, key=lambda node: node.pace or 0.0) if len(paced) > 1 else None


def usual_pace(nodes: Sequence[NodeStatus]) -> float:
    """Return the median pace of nodes that have one."""
    return median(node.pace for node in nodes if node.pace is not None)


def read_status(run_dir: Path) -> RunStatus | None:
    """Return how a run stands, None before its first step; raise `InputError` where the directory or file is wrong."""
    path = run_dir / FILE_NAME
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such directory; give the run directory that `skippipe train` writes")
    return parse(RunStatus, read_json(path, InputError), str(path), InputError) if path.exists() else None


def write_status(status: RunStatus, run_dir: Path) -> None:
    """Replace the file; raise `StorageError` where that is impossible.

    Nothing is flushed to the disk: it would cost time, and after a crash of the machine nobody wants this file.
    """
    path = run_dir / FILE_NAME
    try:
        with replacing(path, durable=False) as stream:
            stream.write(f"{status.model_dump_json()}\n".encode())
    except OSError as reason:
        raise StorageError(f"{path}: cannot be written ({reason.strerror or reason})") from None
