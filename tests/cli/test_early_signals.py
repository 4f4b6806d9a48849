"""A signal counts from the first import to the last line, with the exit code of what can be continued."""

import subprocess
import sys

import pytest

TRAIN = ["train", "--config", "none"]
SIGNAL_AT_IMPORT = """
import runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.{name})
sys.meta_path.insert(0, Finder())
sys.argv = ["program", *{arguments!r}]
runpy.run_module({program!r}, run_name="__main__", alter_sys=True)
"""


def run(program: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("program", "arguments", "module", "name", "expected"),
    [
        ("skippipe", TRAIN, "skippipe.cli.main", "SIGTERM", (75, "stopped by SIGTERM at the")),
        (
            "skippipe",
            ["train", "--config", "none"],
            "click",
            "SIGHUP",
            (75, "stopped by SIGHUP at the start; the same"),
        ),
        ("skippipe", TRAIN, "skippipe.training.signals", "SIGINT", (75, "stopped by SIGINT")),
        (
            "skippipe",
            ["train", "--config", "none"],
            "omegaconf",
            "SIGTERM",
            (75, "stopped by SIGTERM before the first"),
        ),
        ("skippipe", ["plan", "--problem", "none"], "click", "SIGINT", (130, "skippipe: interrupted")),
        ("skippipe", ["plan", "--problem", "none"], "click", "SIGTERM", (-15, "")),
        ("skippipe.cli.agent", ["-m", "skippipe"], "torch", "SIGTERM", (75, "stopped by SIGTERM at the start")),
    ],
)
def test_a_signal_while_python_imports(
    program: str, arguments: list[str], module: str, name: str, expected: tuple[int, str]
) -> None:
    code, said = run(SIGNAL_AT_IMPORT.format(program=program, arguments=arguments, module=module, name=name))
    assert code == expected[0]
    assert expected[1] in said
    assert len(said.splitlines()) <= 1


INTERRUPTED_IMPORT = """
import sys, signal
from importlib.machinery import ModuleSpec
from skippipe.cli import early_signals

class Library:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "library" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            pass

sys.meta_path.insert(0, Library())
early_signals.hear(["plan"])
early_signals.leave_interrupts()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("work can be interrupted")
import library
print("swallowed")
"""
"""A library that makes something else of Ctrl-C while it is imported."""


def test_ctrl_c_within_an_import_ends_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (130, "work can be interrupted\n"), done.stderr
    assert done.stderr == "skippipe: interrupted\n"


def test_a_signal_that_is_ignored_stays_so() -> None:
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    helped = SIGNAL_AT_IMPORT.format(program="skippipe", arguments=["train", "--help"], module="click", name="SIGHUP")
    assert run(ignored + helped) == (0, "")


def test_no_signal_changes_the_code_of_what_is_done() -> None:
    signals = "".join(f"signal.raise_signal(signal.{name})\n" for name in ("SIGTERM", "SIGHUP", "SIGINT"))
    begin = "import signal\nfrom skippipe.cli import early_signals\nearly_signals.end_with(7)\n"
    assert run(f"{begin}{signals}raise SystemExit(1)") == (7, "")


def test_the_code_of_a_stop_is_written_twice_and_alike() -> None:
    from skippipe.cli import early_signals
    from skippipe.errors import StoppedError

    assert StoppedError.exit_code == early_signals.STOPPED
