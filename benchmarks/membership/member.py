"""One process that is a member of a run and does nothing else; it speaks JSON lines with `run.py`.

python benchmarks/membership/member.py NAME HOST SECRET SILENCE_S
"""

import ctypes
import json
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from skippipe.errors import SkipPipeError
from skippipe.membership.epoch import Epoch, Member
from skippipe.membership.membership import Membership

LIMIT_S = 30.0
LONGEST_DECISION_S = 0.05


def say(**content: Any) -> None:
    """Print one line."""
    print(json.dumps(content | {"at_s": time.monotonic()}), flush=True)


def say_epoch(epoch: Epoch) -> None:
    """Print who is in, and what must be alike for all."""
    say(epoch=epoch.number, names=list(epoch.names), mark=epoch.decision.get("mark"))


def decide(members: Sequence[Member], reports: Mapping[str, Any]) -> dict[str, Any]:
    """Take a while, and decide something that nobody else would."""
    time.sleep(random.uniform(0, LONGEST_DECISION_S))
    return {"mark": random.random()}


def listen() -> None:
    """Hold Python's lock for as long as each line says; say how much processor time was used, where it says nothing."""
    for line in sys.stdin:
        if line.strip():
            ctypes.PyDLL(None).usleep(ctypes.c_uint(round(float(line) * 1e6)))
        else:
            used = resource.getrusage(resource.RUSAGE_SELF)
            say(cpu_s=used.ru_utime + used.ru_stime, descriptors=len(os.listdir("/proc/self/fd")))


def main() -> None:
    """Be a member until an error or the end of the input."""
    name, host, secret, silence = sys.argv[1:]
    membership = Membership.open(name, host, secret, float(silence))
    say(own=membership.own.model_dump())
    places = json.loads(sys.stdin.readline())
    try:
        if "members" in places:
            members = [Member.model_validate(place) for place in places["members"]]
            say_epoch(membership.begin(members, LIMIT_S))
        else:
            say_epoch(membership.join([(place["host"], place["port"]) for place in places["contacts"]], LIMIT_S))
        threading.Thread(target=listen, daemon=True).start()
        ended = threading.Event()
        membership.on_end = lambda words: ended.set()
        while True:
            while membership.ending is None:
                ended.wait(0.1)
                for applicant in membership.applicants[:1]:
                    membership.end_epoch(f"{applicant.name} joins")
            say(ending=membership.ending)
            ended.clear()
            say_epoch(membership.next_epoch(None, decide, LIMIT_S))
    except SkipPipeError as error:
        say(error=type(error).__name__, words=str(error))
        membership.close()


if __name__ == "__main__":
    main()
