"""The process of one rank: imports everything once, then forks a process for each contender of the race.

    python worker.py

Every line on standard input is an order in JSON: `contender` (a name in `MAKERS`) with its `options`, the `experiment`
file, and the `environment` of the rank. The forked process connects to the driver's `socket` and answers requests
there, with one JSON object each (`answer` or `error`). It ends when the driver closes the connection.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, Protocol

MAKERS = {
    "ours": "ours",
    "bare": "bare",
    "probe": "probe",
    "tasks": "tasks",
    "torch": "torch_pipelining",
    "deepspeed": "deepspeed_engine",
}
"""Modules of the contenders; each has `make(experiment, options)`."""

END_S = 5.0
"""How long contenders may take to end once the driver has gone."""


class Contender(Protocol):
    """One rank of one training run, that is told to go on step by step."""

    def step(self) -> float | None:
        """Run one step; return its loss where this rank knows it."""

    def requests(self) -> dict[str, Callable[..., Any]]:
        """Return what else may be asked of it, by name."""


def main() -> None:
    """Take orders until standard input ends."""
    import torch
    import torch.distributed.pipelining

    import skippipe.training.loop  # noqa: F401

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    processes = []
    print("ready", flush=True)
    for line in sys.stdin:
        process = context.Process(target=serve, args=(json.loads(line),), daemon=True)
        process.start()
        processes.append(process)
    deadline_s = time.monotonic() + END_S
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
        process.kill()


def serve(order: dict[str, Any]) -> None:
    """Be one rank of a contender until the driver hangs up."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.update(order["environment"])
    with Path(order["log"]).open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        connection = Client(order["socket"], family="AF_UNIX")
        try:
            contender = _make(order)
            _reply(connection, {"answer": "here"})
            while True:
                _reply(connection, {"answer": _respond(contender, json.loads(connection.recv_bytes()))})
        except EOFError:
            return
        except BaseException as error:
            traceback.print_exc()
            _reply(connection, {"error": f"{type(error).__name__}: {error}"})
            raise


def _make(order: dict[str, Any]) -> Contender:
    from skippipe.config.experiment_file import load_experiment

    module = import_module(MAKERS[order["contender"]])
    contender: Contender = module.make(load_experiment(Path(order["experiment"])), order["options"])
    return contender


def _respond(contender: Contender, request: dict[str, Any]) -> Any:
    if "steps" not in request:
        return contender.requests()[request["call"]](**request["arguments"])
    begin_s = time.monotonic()
    losses = [contender.step() for _ in range(request["steps"])]
    return {"begin_s": begin_s, "end_s": time.monotonic(), "losses": losses}


def _reply(connection: Connection, content: Any) -> None:
    connection.send_bytes(json.dumps(content).encode())


if __name__ == "__main__":
    main()
