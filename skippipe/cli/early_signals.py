"""What a signal does while Python still imports, and when all is done: the process ends at once, with the right code.

Imported before anything else, so this imports next to nothing.
"""

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType

TRAINING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = 75
"""`skippipe.errors.StoppedError.exit_code`, which cannot be imported so early."""
INTERRUPTED = 130


def hear(arguments: Sequence[str]) -> None:
    """Handle signals from now on for the command of `arguments`; one that is ignored, as `nohup` does, stays so.

    A training ends with the exit code of one that is to be started again; there is nothing to save. Of other commands
    it is Ctrl-C alone, which would show a traceback.
    """
    if arguments[:1] == ["train"]:
        for number in TRAINING_SIGNALS:
            _set(number, _stop)
    else:
        _set(signal.SIGINT, _interrupt)


def leave_interrupts() -> None:
    """Let a command take Ctrl-C as it likes from now on; one that trains sets a handler of its own."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, _interrupt_work)


def end_with(code: int) -> None:
    """Let no signal change with which code this process ends: all is done."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _set(signal.SIGINT, lambda number, frame: os._exit(code))  # what hangs at the end can be interrupted


def _stop(number: int, frame: FrameType | None) -> None:
    _say(f"error: stopped by {signal.Signals(number).name} at the start; the same line starts it again")
    os._exit(STOPPED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _say("interrupted")
    os._exit(INTERRUPTED)


def _interrupt_work(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, but end at once while a module is imported: libraries make another error of it there,
    or none.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _interrupt(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


def _set(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, handler)


def _say(text: str) -> None:
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank is not None else ""
    os.write(2, f"{prefix}skippipe: {text}\n".encode())
