"""The driver's side: the ranks of all contenders, on this machine or on the nodes of an emulated network."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).resolve().parent
FIRST_PORT = 29600
START_S = 120.0
REPLY_S = 170.0
LOG_TAIL = 3000


class Crew:
    """The ranks of one contender. What is asked of it is asked of all ranks at once."""

    def __init__(self, name: str, connections: Sequence[Connection], logs: Sequence[Path]) -> None:
        self.name = name
        self.losses: list[float] = []
        self._connections = list(connections)
        self._logs = list(logs)

    def steps(self, count: int) -> float:
        """Run steps on all ranks; return the seconds of one, from the first rank's begin to the last one's end."""
        replies = self._ask({"steps": count})
        for losses in zip(*(reply["losses"] for reply in replies), strict=True):
            self.losses += [loss for loss in losses if loss is not None][:1]
        begin_s: float = min(reply["begin_s"] for reply in replies)
        end_s: float = max(reply["end_s"] for reply in replies)
        return (end_s - begin_s) / count

    def call(self, name: str, **arguments: Any) -> list[Any]:
        """Call one of the contender's further requests; return what each rank answers."""
        return self._ask({"call": name, "arguments": arguments})

    def close(self) -> None:
        """Hang up; the ranks end."""
        for connection in self._connections:
            connection.close()

    def collect(self, timeout_s: float) -> list[Any]:
        """Return the next answer of every rank; raise `RuntimeError` with its log where one fails."""
        missing = dict(zip(self._connections, range(len(self._connections)), strict=True))
        replies: dict[int, Any] = {}
        while missing:
            ready = [connection for connection in wait(list(missing), timeout_s) if isinstance(connection, Connection)]
            if not ready:
                raise RuntimeError(
                    f"{self.name}: no answer of ranks {[*missing.values()]} in {timeout_s:g} s{self._tail()}"
                )
            for connection in ready:
                rank = missing.pop(connection)
                reply = _receive(connection)
                if "error" in reply:
                    raise RuntimeError(f"{self.name}: rank {rank} failed: {reply['error']}{self._tail()}")
                replies[rank] = reply["answer"]
        return [replies[rank] for rank in range(len(self._connections))]

    def _ask(self, request: Mapping[str, Any]) -> list[Any]:
        for connection in self._connections:
            connection.send_bytes(json.dumps(request).encode())
        return self.collect(REPLY_S)

    def _tail(self) -> str:
        return "".join(f"\n--- {log.name}\n{log.read_text()[-LOG_TAIL:]}" for log in self._logs if log.exists())


class Hosts:
    """One worker process for each rank; `prefix` gives the command before it, to start it on its node."""

    def __init__(self, world_size: int, folder: Path, prefix: Callable[[int], Sequence[str]] = lambda rank: ()) -> None:
        self.world_size = world_size
        self._folder = folder
        self._prefix = prefix
        self._crews: list[Crew] = []
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        for rank in range(self.world_size):
            command = [*self._prefix(rank), sys.executable, str(HERE / "worker.py")]
            self._processes.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        for rank, process in enumerate(self._processes):
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the process of rank {rank} did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for crew in self._crews:
            crew.close()
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()

    def start(
        self, name: str, contender: str, experiment: Path, options: Mapping[str, Any], title: str | None = None
    ) -> Crew:
        """Start the ranks of one contender and wait until they have met; `name` names files, `title` is for readers."""
        print(f"  starting {title or name}", file=sys.stderr)
        number = len(self._crews)
        sockets = [self._folder / f"socket-{number}-{rank}" for rank in range(self.world_size)]
        logs = [self._folder / f"{name}-{number}-{rank}.log" for rank in range(self.world_size)]
        with ExitStack() as stack:
            listeners = [stack.enter_context(Listener(str(socket), family="AF_UNIX")) for socket in sockets]
            for rank, process in enumerate(self._processes):
                order = {
                    "contender": contender,
                    "options": dict(options),
                    "experiment": str(experiment),
                    "environment": self._environment(rank, FIRST_PORT + number),
                    "socket": str(sockets[rank]),
                    "log": str(logs[rank]),
                }
                if process.stdin is None:
                    raise RuntimeError("a worker has no standard input")
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()
            crew = Crew(title or name, [listener.accept() for listener in listeners], logs)
        self._crews.append(crew)
        crew.collect(START_S)
        return crew

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_PORT": str(port),
        }


def _receive(connection: Connection) -> dict[str, Any]:
    try:
        reply: dict[str, Any] = json.loads(connection.recv_bytes())
    except EOFError:
        return {"error": "it ended"}
    return reply
