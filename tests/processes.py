"""Starting programs quickly, waiting for them, and ending what they leave."""

import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import psutil

PRELOADED = [
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "wandb.sdk.launch",
    "skippipe.cluster.profile",
    "skippipe.monitor.report.reports",
    "skippipe.planning.experiment_plan",
    "skippipe.runtime.distributed_runner",
    "skippipe.runtime.local_runner",
    "skippipe.training.loop",
    "skippipe.inference.distributed.serving",
    "skippipe.inference.distributed.session",
    "skippipe.inference.evaluation.perplexity",
    "skippipe.inference.generation.speculative",
    "skippipe_scheduler.search.portfolio",
    "skippipe_scheduler.solver.layer_split",
    "skippipe_scheduler.solver.replan",
]


@dataclass
class ForkedProcess:
    """One running process and the file that its output goes to."""

    process: ForkServerProcess
    output: Path

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self, timeout_s: float = 120.0) -> tuple[int | None, str]:
        """Return exit code (None where it had to be ended) and output; end a process that does not stop in time."""
        self.process.join(timeout_s)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        return code, self.output.read_text()


def preloaded() -> ForkServerContext:
    """Return how to fork processes from a server that has imported everything, because that is what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_skippipe(arguments: list[str], output: Path, environment: dict[str, str], folder: Path | None = None) -> None:
    """Run the command line in a new process, with all that it prints in a file."""
    from skippipe.cli.main import main

    os.environ.update(environment)
    redirect(output)
    if folder is not None:
        os.chdir(folder)
    main(arguments)


def run_program(path: Path, arguments: list[str], output: Path, folder: Path) -> None:
    """Run a Python file as a program in a new process, with all that it prints in a file."""
    redirect(output)
    os.chdir(folder)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def redirect(output: Path) -> None:
    """Let this process and its children print into a file."""
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a killed process has printed is in the file


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str]:
    """Return exit code and output; end the process and its children where they do not stop in time."""
    try:
        output, error = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        output, error = process.communicate()
    return process.returncode, output + error
