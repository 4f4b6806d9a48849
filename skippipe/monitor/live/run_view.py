"""What `skippipe top` shows of a run. Texts are `Text`, as names may look like rich's markup."""

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from skippipe.monitor.live.run_status import LinkStatus, NodeStatus, RunStatus, slowest_of, usual_pace
from skippipe.monitor.run_events import MembershipChange
from skippipe_scheduler.problem.memory import GIB

NONE: Final = "-"
SHOWN_LINKS: Final = 8
SHOWN_CHANGES: Final = 5
SILENT_STEPS: Final = 3
"""Steps whose time has passed without one: something is slow, or the run has ended."""
LEAST_SILENCE_S: Final = 10.0


def run_view(name: str, status: RunStatus, changes: Sequence[MembershipChange], now_s: float) -> RenderableType:
    """Return how a run stands at `now_s`, seconds since 1970, and how its membership has changed."""
    parts: list[RenderableType] = [
        _headline(name, status, now_s),
        _nodes_table(status, changes),
        _slowest(status.nodes),
    ]
    if status.links:
        parts.append(_links_table(status.links))
    parts += [Text(f"{change.time}  {change}") for change in changes[-SHOWN_CHANGES:]]
    return Group(*parts)


def _headline(name: str, status: RunStatus, now_s: float) -> Text:
    age_s = max(0.0, now_s - status.written_at_s)
    line = Text(f"{name}  ", style="bold")
    line.append(
        f"step {status.step}/{status.max_steps}  loss {status.loss:.4f}  {status.tokens_per_s:,.0f} tokens/s  "
        f"{status.iteration_s:.3f} s (plan {status.predicted_s:.3f})  ",
        style="not bold",
    )
    if status.is_finished:
        line.append("finished", style="green")
    elif age_s > max(LEAST_SILENCE_S, SILENT_STEPS * status.iteration_s):
        line.append(f"no step for {age_s:.0f} s", style="red")
    else:
        line.append(f"{age_s:.0f} s ago", style="not bold")
    return line


def _nodes_table(status: RunStatus, changes: Sequence[MembershipChange]) -> Table:
    has_gpu = any(node.device_bytes is not None for node in status.nodes)
    device = ["GPU\nGiB"] if has_gpu else []
    numbers = ["busy", "waiting", "pace", "process\nGiB", *device, "peak\nGiB", "plan\nGiB"]
    table = _table(["node", "stages", "state"], numbers)
    present = {node.node for node in status.nodes}
    joined = {name for change in changes for name in change.joined}
    slowest = slowest_of(status.nodes)
    for node in status.nodes:
        cells = [
            f"{node.busy_share:.0%}",
            f"{node.waiting_share:.0%}",
            NONE if node.pace is None else f"{node.pace:.3g}",
            _gib(node.process_bytes),
            *([_gib(node.device_bytes)] if has_gpu else []),
            _gib(node.peak_bytes),
            _gib(node.estimated_bytes),
        ]
        stages = ", ".join(map(str, node.stages))
        row = [node.node, stages, "joined" if node.node in joined else "in", *cells]
        table.add_row(*map(Text, row), style="yellow" if node is slowest else None)
    lost = dict.fromkeys(name for change in changes for name in change.lost if name not in present)
    for name in lost:
        table.add_row(Text(name), Text(NONE), Text("lost"), style="red")
    return table


def _slowest(nodes: Sequence[NodeStatus]) -> Text:
    slowest = slowest_of(nodes)
    if slowest is None or slowest.pace is None:
        return Text("slowest: not known, as it takes several nodes with tasks")
    times = f"{slowest.pace:.3g} times as long as planned; median {usual_pace(nodes):.3g}"
    return Text(f"slowest: {slowest.node}, whose tasks take {times}")


def _links_table(links: Sequence[LinkStatus]) -> Table:
    numbers = ["planned\nms", "measured\nms", "planned\nGbit/s", "measured\nGbit/s", "pace"]
    table = _table(["link"], numbers)
    worst = sorted(links, key=lambda link: -(link.pace or 0.0))
    for link in worst[:SHOWN_LINKS]:
        paced = None if link.pace is None else link.pace * link.planned_s
        row = [
            " - ".join(link.nodes),
            f"{1e3 * link.planned_s:.1f}",
            NONE if paced is None else f"{1e3 * paced:.1f}",
            _rate(link.gbit_per_s()),
            NONE if link.pace is None else _rate(link.gbit_per_s(link.pace)),
            NONE if link.pace is None else f"{link.pace:.3g}",
        ]
        table.add_row(*map(Text, row))
    if len(links) > SHOWN_LINKS:
        table.add_row(Text(f"{len(links) - SHOWN_LINKS} more"))
    return table


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return a table without rows; where there is too little room, words are broken and numbers stay whole."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _gib(size_bytes: int | None) -> str:
    return NONE if size_bytes is None else f"{size_bytes / GIB:.3g}"


def _rate(gbit_per_s: float | None) -> str:
    return NONE if gbit_per_s is None else f"{gbit_per_s:.3g}"
