"""`skippipe top`: looks at a run from another process, which reads its files and touches nothing."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from skippipe.cluster.run_trace import link_paces, read_trace
from skippipe.errors import InputError
from skippipe.monitor.live.run_status import FILE_NAME, LinkStatus, RunStatus, read_status
from skippipe.monitor.live.run_view import run_view
from skippipe.monitor.run_events import MembershipChange, read_changes
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import NodePair
from skippipe_scheduler.plan.validate import load_plan

WIDE: Final = 1000
"""Characters of a line where there is no terminal: nothing is cut."""


class RunWatch:
    """Looks at one run, once or again and again."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
        self._plan_hash: str | None = None
        self._plan: Plan | None = None
        self._traced_at_ns = 0
        self._paces: dict[NodePair, float] = {}

    @property
    def has_terminal(self) -> bool:
        """Whether there is a terminal to show something on."""
        return self._console.is_terminal

    def print_once(self) -> None:
        """Print how the run stands; raise `InputError` where there is nothing to print."""
        status = read_status(self._run_dir)
        if status is None:
            raise InputError(f"{self._run_dir / FILE_NAME}: no such file; a run writes it from its first step on")
        self._console.print(self._view(status))

    def watch(self, interval_s: float) -> None:
        """Show how the run stands until it has taken its last step, or until Ctrl-C; then print it once more.

        Raises `InputError` where the directory or a file in it is wrong.
        """
        status = read_status(self._run_dir)
        try:
            with Live(console=self._console, screen=True, auto_refresh=False) as live:
                while status is None or not status.is_finished:
                    live.update(self._view(status), refresh=True)
                    time.sleep(interval_s)
                    status = read_status(self._run_dir)
        except KeyboardInterrupt:
            pass
        self._console.print(self._view(status))

    def _view(self, status: RunStatus | None) -> RenderableType:
        if status is None:
            return Text(f"{self._run_dir}: no step is taken yet")
        changes = read_changes(self._run_dir)
        links = self._with_traced(status, changes)
        return run_view(self._run_dir.name, status.model_copy(update={"links": links}), changes, time.time())

    def _with_traced(self, status: RunStatus, changes: list[MembershipChange]) -> tuple[LinkStatus, ...]:
        """Return the links; those that the run does not measure itself have what its newest traces say."""
        if all(link.pace is not None for link in status.links):
            return status.links
        with suppress(OSError):  # a run that starts again removes them
            self._read_traces(status, changes)
        paces = self._paces
        return tuple(
            link if link.pace is not None else link.model_copy(update={"pace": paces.get(link.nodes)})
            for link in status.links
        )

    def _read_traces(self, status: RunStatus, changes: list[MembershipChange]) -> None:
        """Read what ranks have traced with the present plan, where that is another trace or plan than before."""
        folder = self._run_dir / "trace"
        times_ns = [path.stat().st_mtime_ns for path in folder.glob("rank-*.jsonl")]
        if self._plan_hash != status.plan_hash:
            self._plan_hash, self._traced_at_ns, self._paces = status.plan_hash, 0, {}
            self._plan = self._find_plan(status.plan_hash, changes)
        if self._plan is None or max(times_ns, default=0) == self._traced_at_ns:
            return
        self._traced_at_ns = max(times_ns, default=0)
        trace = read_trace(folder)
        begun = changes[-1].step if changes else 0
        trace.tasks = [task for task in trace.tasks if task.step > begun]
        planned_s = self._plan.costs.transfer_s
        given_s = {(source, sink): seconds for source, row in planned_s.items() for sink, seconds in row.items()}
        self._paces = link_paces(self._plan, given_s, trace)

    def _find_plan(self, plan_hash: str, changes: list[MembershipChange]) -> Plan | None:
        """Return the plan that the run follows, where its directory has it."""
        epochs = [f"epochs/epoch-{change.epoch:04d}.plan.json" for change in changes[-1:]]
        for path in (self._run_dir / name for name in (*epochs, "plan.json")):
            if path.exists() and (plan := load_plan(path)).hash == plan_hash:
                return plan
        return None
