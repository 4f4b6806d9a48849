"""What a user sees of a search while it runs, and how Ctrl-C ends it."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from skippipe_scheduler.options import Progress


class SearchDisplay:
    """One line on standard error for each solve, kept up to date on a terminal.

    While it is open, the first Ctrl-C sets `stop`, so that searches end with the best they have; the second one ends
    the program.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._title = ""
        self._live = sys.stderr.isatty()
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._live and self._title:
            click.echo(err=True)

    def begin(self, title: str) -> None:
        """Start the line of one solve."""
        if self._live and self._title:
            click.echo(err=True)
        self._title = title
        click.echo(f"solving: {title} ...", err=True, nl=not self._live)

    def update(self, progress: "Progress") -> None:
        """Show a better plan: its iteration time, the bound and the gap."""
        if not self._live:
            return
        gap = 1 - progress.lower_bound_s / progress.iteration_s
        click.echo(
            f"\rsolving: {self._title}  {progress.elapsed_s:6.1f} s  best {progress.iteration_s:.3f} s  "
            f"bound {progress.lower_bound_s:.3f} s  gap {gap:.1%} ",
            err=True,
            nl=False,
        )

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.stop.set()
        signal.signal(signal.SIGINT, self._before)
        click.echo("\nstopping with the best plans so far (Ctrl-C again ends at once)", err=True)
