"""Waiting for programs that tests start, and ending what they leave."""

import socket
import subprocess

import psutil


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
