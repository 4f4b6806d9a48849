"""A run of light processes that are members and do nothing else, and what they tell."""

import ctypes
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait as wait_for_any
from multiprocessing.context import ForkProcess
from typing import Any

from skippipe.errors import SkipPipeError
from skippipe.membership.epoch import Member
from skippipe.membership.epoch_vote import EpochVote, Outgoing
from skippipe.membership.membership import Membership
from skippipe.membership.messages import Decided, Proposal, VoteMessage

SECRET = "the secret of these tests"
SILENCE_S = 0.5
LIMIT_S = 10.0
Told = tuple[str, str, Any, float]
"""Who tells it, what, its content, and when: `begun`, `ended`, `epoch`, `error`, `proposing`, and `went on` where the
epoch lasts after a pause that may have been too long."""
Command = Callable[[Membership], None]


class MemberProcesses:
    """Members n0, n1 and so on, in an epoch from the start."""

    def __init__(self, number: int, slow_decision_s: float = 0.0):
        self.told: list[Told] = []
        self.names = [f"n{index}" for index in range(number)]
        self.processes: dict[str, ForkProcess] = {}
        self._pipes: dict[str, Connection] = {}
        for name in self.names:
            self._start(name, slow_decision_s)
        self.own = {name: pipe.recv() for name, pipe in self._pipes.items()}
        for pipe in self._pipes.values():
            pipe.send(list(self.own.values()))
        self.wait("begun", self.names)

    def _start(self, name: str, slow_decision_s: float) -> None:
        context = multiprocessing.get_context("fork")
        self._pipes[name], there = context.Pipe()
        self.processes[name] = context.Process(target=be_member, args=(name, there, slow_decision_s), daemon=True)
        self.processes[name].start()
        there.close()

    def join(self, name: str, contact: str) -> float:
        """Start a process that asks a member to be taken in; return the time of its asking."""
        self._start(name, 0.0)
        self.own[name] = self._pipes[name].recv()
        self._pipes[name].send(self.own[contact])
        return time.monotonic()

    def signal(self, name: str, number: signal.Signals) -> float:
        """Send a signal to a member; return the time."""
        now_s = time.monotonic()
        os.kill(self.processes[name].pid or 0, number)
        return now_s

    def command(self, name: str, what: str) -> None:
        """Let a member do something."""
        self._pipes[name].send(what)

    def wait(self, what: str, names: list[str], limit_s: float = LIMIT_S) -> dict[str, tuple[Any, float]]:
        """Return the next content, and time, of what each of these tells."""
        found: dict[str, tuple[Any, float]] = {}
        deadline_s = time.monotonic() + limit_s
        while len(found) < len(names):
            for told in list(self.told):
                if told[0] in names and told[1] == what and told[0] not in found:
                    found[told[0]] = (told[2], told[3])
                    self.told.remove(told)
            missing = [name for name in names if name not in found]
            assert time.monotonic() < deadline_s, f"{missing} did not tell {what!r}: {self.told}"
            self.listen(0.01)
        return found

    def listen(self, duration_s: float) -> None:
        """Take what members tell within a time."""
        deadline_s = time.monotonic() + duration_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            ready = wait_for_any(list(self._pipes.values()), left_s)
            for name, pipe in [(name, pipe) for name, pipe in self._pipes.items() if pipe in ready]:
                try:
                    self.told.append(pipe.recv())
                except EOFError:
                    del self._pipes[name]


@contextmanager
def member_processes(number: int, slow_decision_s: float = 0.0) -> Iterator[MemberProcesses]:
    """Start members; end whatever is left of them."""
    members = MemberProcesses(number, slow_decision_s)
    try:
        yield members
    finally:
        for process in members.processes.values():
            process.kill()
            process.join()


def be_member(name: str, pipe: Connection, slow_decision_s: float) -> None:
    """Be in the run until an error."""

    def tell(what: str, content: Any) -> None:
        pipe.send((name, what, content, time.monotonic()))

    def decide(members: Any, reports: Any) -> Any:
        tell("proposing", [member.name for member in members])
        time.sleep(slow_decision_s)
        return {"by": name, "reports": dict(reports)}

    membership = Membership.open(name, "127.0.0.1", SECRET, SILENCE_S)
    try:
        pipe.send(membership.own.model_dump())
        places = pipe.recv()
        if isinstance(places, list):
            membership.begin([Member.model_validate(content) for content in places], LIMIT_S)
            tell("begun", None)
        else:
            tell("epoch", membership.join([(places["host"], places["port"])], LIMIT_S))
        while True:
            last_s = begun_s = time.monotonic()
            while membership.ending is None:
                if begun_s - last_s > 2 * SILENCE_S:
                    tell("went on", None)
                last_s = begun_s
                if pipe.poll(0.005):
                    obey(membership, pipe.recv())
                for applicant in membership.applicants:
                    membership.end_epoch(f"{applicant.name} joins")
                begun_s = time.monotonic()  # before it asks whether the epoch lasts
            tell("ended", membership.ending)
            if not membership.may_write:
                tell("may not write", None)
            epoch = membership.next_epoch({"finished": name}, decide, LIMIT_S)
            tell("epoch", epoch)
    except SkipPipeError as error:
        tell("error", (type(error).__name__, str(error)))
        membership.close()


def obey(membership: Membership, what: str) -> None:
    """Carry out a command."""
    match what.split():
        case ["end"]:
            membership.end_epoch("transfers failed")
        case ["leave"]:
            membership.leave()
            os._exit(0)
        case ["suspect", name]:
            membership.suspect(name, "a transfer failed")
        case ["hold", seconds]:
            hold_lock(float(seconds))
        case ["lose", count]:
            lose_decisions(int(count))


def lose_decisions(count: int) -> None:
    """Lose so many messages that tell what the next epoch is, as on a link that breaks."""
    receive, lost = EpochVote.receive, itertools.count()

    def receive_or_lose(self: EpochVote, sender: str, message: VoteMessage) -> Outgoing:
        if isinstance(message, Proposal | Decided) and next(lost) < count:
            return []
        return receive(self, sender, message)

    EpochVote.receive = receive_or_lose  # type: ignore[method-assign]  # the fault is put in here alone


def hold_lock(duration_s: float) -> None:
    """Hold Python's lock, as a call of a library may: no other thread runs."""
    ctypes.PyDLL(None).usleep(ctypes.c_uint(round(duration_s * 1e6)))
