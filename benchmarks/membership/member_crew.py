"""The members of a run as processes, and what they have said."""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MEMBER = Path(__file__).with_name("member.py")
LIMIT_S = 30.0


class MemberCrew:
    """Members n0, n1 and so on, in an epoch while entered. `prefix` puts a command on a host of its own."""

    def __init__(
        self,
        number: int,
        silence_s: float,
        address: Callable[[int], str] = lambda index: "127.0.0.1",
        prefix: Callable[[int], Sequence[str]] = lambda index: [],
    ) -> None:
        self.living: set[str] = set()
        self.said: dict[str, list[dict[str, Any]]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.splits = 0
        self._own: dict[str, Any] = {}
        self._marks: dict[int, Any] = {}
        self._silence_s = silence_s
        self._secret = secrets.token_hex()
        self._places = {f"n{index}": (address(index), prefix(index)) for index in range(number)}
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        for name in self._places:
            self._start(name)
        self._await_own(self._places)
        for name in self._places:
            self.tell(name, json.dumps({"members": list(self._own.values())}))
        self.living = set(self._places)
        self.await_agreement()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def tell(self, name: str, line: str) -> None:
        """Write a line to a member."""
        pipe = self.processes[name].stdin
        assert pipe is not None
        pipe.write(line.encode() + b"\n")
        pipe.flush()

    def signal(self, name: str, number: signal.Signals) -> float:
        """Send a signal to a member; return when."""
        now_s = time.monotonic()
        os.kill(self.processes[name].pid, number)
        if number == signal.SIGKILL:
            self.living.discard(name)
        return now_s

    def join(self, names: Sequence[str]) -> float:
        """Start members anew, that ask two others to be taken in; return when they began to ask."""
        for name in names:
            self._forget(name)
            self._start(name)
        self._await_own(names)
        asked_s = time.monotonic()
        contacts = [self._own[name] for name in sorted(self.living)[:2]]
        for name in names:
            self.tell(name, json.dumps({"contacts": contacts}))
        self.living |= set(names)
        return asked_s

    def last(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the last thing with this key that a member said."""
        return next((line for line in reversed(self.said[name]) if key in line), None)

    def await_agreement(self, limit_s: float = LIMIT_S) -> float:
        """Wait until those who live are in one epoch, and nobody else; return when the last of them was."""

        def agreed() -> bool:
            epochs = [self.last(name, "epoch") for name in self.living]
            return all(epoch is not None and set(epoch["names"]) == self.living for epoch in epochs)

        self.listen_until(agreed, limit_s)
        return max(float(epoch["at_s"]) for name in self.living if (epoch := self.last(name, "epoch")) is not None)

    def await_error(self, name: str, limit_s: float) -> str:
        """Return the kind of the error with which a member ends; raise TimeoutError where it does not in time."""
        self.listen_until(lambda: self.last(name, "error") is not None, limit_s)
        return str((self.last(name, "error") or {})["error"])

    def listen_until(self, happened: Callable[[], bool], limit_s: float) -> None:
        """Take what is said until something has happened; raise TimeoutError where it does not in time."""
        deadline_s = time.monotonic() + limit_s
        while not happened():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not within {limit_s:g} s; {self.living} live, and said last {self._last_words()}")
            self.listen(0.01)

    def listen(self, duration_s: float) -> None:
        """Take what is said within a time."""
        deadline_s = time.monotonic() + duration_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                line = key.data[1].readline()
                if not line:
                    self._selector.unregister(key.fileobj)
                    continue
                self._take(key.data[0], json.loads(line))

    def _take(self, name: str, line: dict[str, Any]) -> None:
        self.said[name].append(line)
        if "epoch" in line:
            mark = (line["names"], line["mark"])
            self.splits += self._marks.setdefault(line["epoch"], mark) != mark
        if "own" in line:
            self._own[name] = line["own"]
        if "error" in line:
            self.living.discard(name)

    def _last_words(self) -> dict[str, Any]:
        return {name: said[-1:] for name, said in self.said.items()}

    def _start(self, name: str) -> None:
        host, prefix = self._places[name]
        self.said[name] = []
        self._own.pop(name, None)
        self.processes[name] = process = subprocess.Popen(
            [*prefix, sys.executable, str(MEMBER), name, host, self._secret, str(self._silence_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), True)
        self._selector.register(process.stdout, selectors.EVENT_READ, (name, process.stdout))

    def _await_own(self, names: Sequence[str] | dict[str, Any]) -> None:
        self.listen_until(lambda: all(name in self._own for name in names), LIMIT_S)

    def _forget(self, name: str) -> None:
        process = self.processes[name]
        process.kill()
        process.wait()
        if process.stdout is not None and process.stdout in [key.fileobj for key in self._selector.get_map().values()]:
            self._selector.unregister(process.stdout)
