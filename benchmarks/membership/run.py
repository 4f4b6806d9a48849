"""Kill, stop, starve and cut off members of a run; see when the others notice, and whether they agree.

python benchmarks/membership/run.py [--only NAME] [--quick]
"""

import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from member_crew import MemberCrew

from common.command import chosen, folder_of_results
from common.hosts import Hosts, why_not
from common.promises import Row, record_promises, unless
from common.table import Result

HERE = Path(__file__).parent
MEMBERS = 7
SILENCE_S = 2.0
NOTICED_S = 1.0
"""How much longer than the limit a silence may last before it is noticed."""
BUSY = "import time\nwhile True: sum(range(1000))"


def deaths(tries: int, busy: int) -> Result:
    """Kill one to three at random instants, also in a vote, until `tries` have died; each comes back."""
    chance = random.Random(tries + busy)
    agreed, joined, died = [], [], 0
    with ExitStack() as stack:
        for _ in range(busy):
            stack.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
        crew = stack.enter_context(MemberCrew(MEMBERS, SILENCE_S))
        while died < tries:
            victims = chance.sample(sorted(crew.living), chance.choice((1, 1, 1, 2, 3)))
            for victim in victims:
                crew.listen(chance.uniform(0, 0.05))
                killed_s = crew.signal(victim, signal.SIGKILL)
            agreed.append(crew.await_agreement() - killed_s)
            died += len(victims)
            asked_s = crew.join(victims)
            joined.append(crew.await_agreement() - asked_s)
        splits = crew.splits
    return {
        "deaths": died,
        "agreed after": spread(agreed),
        "in again after": spread(joined),
        "different epochs held": splits,
        "met": splits == 0 and max(agreed) < 2 and statistics.median(agreed) < 0.5,
    }


def pauses(tries: int) -> Result:
    """Stop members, and let them hold Python's lock, for less than the limit; nobody may take it for a loss."""
    chance = random.Random(tries)
    alarms = 0
    with MemberCrew(MEMBERS, SILENCE_S) as crew:
        for _ in range(tries):
            stopped, holding = chance.sample(sorted(crew.living), 2)
            crew.tell(holding, str(1.5 * SILENCE_S))
            crew.signal(stopped, signal.SIGSTOP)
            crew.listen(chance.uniform(0.1, 0.95) * SILENCE_S)
            crew.signal(stopped, signal.SIGCONT)
            crew.listen(0.2)
            alarms += any(crew.last(name, "ending") for name in crew.living)
            for said in crew.said.values():
                said[:] = [line for line in said if "ending" not in line]
    return {"tries": tries, "false alarms": alarms, "met": alarms == 0}


def stops(tries: int) -> Result:
    """Stop one for longer than the limit, then let it go on: the others notice, and it ends."""
    noticed, ended = [], []
    with MemberCrew(MEMBERS, SILENCE_S) as crew:
        for index in range(tries):
            victim = f"n{index % MEMBERS}"
            stopped_s = crew.signal(victim, signal.SIGSTOP)
            crew.living.discard(victim)
            noticed.append(crew.await_agreement() - stopped_s)
            crew.signal(victim, signal.SIGCONT)
            ended.append(crew.await_error(victim, 10) == "LeftOutError")
            crew.join([victim])
            crew.await_agreement()
    within = max(noticed) < SILENCE_S + NOTICED_S and min(noticed) >= SILENCE_S
    return {
        "tries": tries,
        "agreed after": spread(noticed),
        "ended": f"{sum(ended)} of {tries}",
        "met": within and all(ended),
    }


def islands(tries: int, smaller: Sequence[int]) -> Result:
    """Cut some off from the rest: the larger island goes on, the smaller one ends."""
    noticed, ended = [], 0
    for _ in range(tries):
        with Hosts(MEMBERS) as hosts, MemberCrew(MEMBERS, SILENCE_S, hosts.address, hosts.prefix) as crew:
            cut_s = time.monotonic()
            hosts.part(smaller)
            names = {f"n{index}" for index in smaller}
            crew.living -= names
            noticed.append(crew.await_agreement() - cut_s)
            ended += all(crew.await_error(name, 10) == "MinorityError" for name in names)
    within = max(noticed) < SILENCE_S + NOTICED_S
    return {
        "tries": tries,
        "agreed after": spread(noticed),
        "ended": f"{ended} of {tries}",
        "met": within and ended == tries,
    }


def quiet(seconds: float) -> Result:
    """Let nothing happen: the share of a core that each member takes."""
    with MemberCrew(MEMBERS, SILENCE_S) as crew:

        def used() -> list[float]:
            for name in crew.living:
                crew.said[name].clear()
                crew.tell(name, "")
            crew.listen_until(lambda: all(crew.last(name, "cpu_s") for name in crew.living), 10)
            return [(crew.last(name, "cpu_s") or {})["cpu_s"] for name in sorted(crew.living)]

        before = used()
        crew.listen(seconds)
        shares = [(after - earlier) / seconds for earlier, after in zip(before, used(), strict=True)]
    return {"share of a core": f"{100 * max(shares):.2f}%", "met": max(shares) < 0.01}


def spread(times_s: Sequence[float]) -> str:
    """Return the median and the longest time."""
    return f"{statistics.median(times_s):.3f} s (longest {max(times_s):.3f} s)"


def rows(quick: bool) -> dict[str, Row]:
    """Return the rows by name."""
    scale = 10 if quick else 1
    return {
        "kill -9 of one to three": lambda: deaths(200 // scale, 0),
        "the same beside 4 busy processes": lambda: deaths(50 // scale, 4),
        f"stopped or starved for less than {SILENCE_S:g} s": lambda: pauses(100 // scale),
        f"stopped for longer than {SILENCE_S:g} s": lambda: stops(20 // scale),
        "a cable cut": unless(why_not(), lambda: islands(10 // scale, [3])),
        "islands of 5 and 2": unless(why_not(), lambda: islands(10 // scale, [0, 1])),
        "nothing": lambda: quiet(20 / scale),
    }


@click.command()
@click.option("--only", multiple=True, help="Rows whose names contain this; the others keep their results.")
@click.option("--quick", is_flag=True, help="Few tries, into a temporary folder.")
def main(only: tuple[str, ...], quick: bool) -> None:
    """Run the rows and write results.json and results.md beside this file."""
    found = rows(quick)
    title = f"Losses among {MEMBERS} members, a silence of {SILENCE_S:g} s being one"
    folder = folder_of_results(None, quick, HERE)
    record_promises(found, chosen(found, only), folder, (title, "what happens"), quick=quick)


if __name__ == "__main__":
    main()
