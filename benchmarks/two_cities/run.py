"""Hosts in several cities that share nothing: the commands of docs/multi-node.md, from the first start to an export.

    python benchmarks/two_cities/run.py [--hosts N]

Each host is a network namespace with a folder of its own, which no other sees, behind a line of its own.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click

from common.command import write_whole
from common.hosts import INTERFACE
from common.lines import JoinedHosts, Line, Wire, why_not
from common.table import machine, rows_table
from skippipe.monitor.metrics import Metric

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "multi-node.md"
SECTION = "Two cities"
LINES: Final = ((200.0, 5.0), (50.0, 20.0), (20.0, 40.0), (100.0, 5.0), (50.0, 40.0), (20.0, 15.0))
"""Of each host: Mbit/s each way, and milliseconds that what leaves it or comes to it is under way there."""
LIMIT_S = 600.0
STEPS: Final = 120
LOST_AFTER, LATER = 6, 4
"""The step after which a host is lost, and how many more are awaited before all are stopped."""
STOPPED = 75
RUN = "runs/cities"
CLUSTER = """
format: skippipe.cluster/1
name: cities
nodes:
  - {{name: city, count: {num_hosts}, region: far, forward_s: 0.02, backward_s: 0.04, loss_s: 0.01, max_in_flight: 8}}
links: {{within_region: {{latency_ms: 45, gbit_per_s: 0.02}}}}
"""
EXPERIMENT = """
name: cities
cluster: cluster.yaml
data: {source: text, paths: [texts], tokenizer: "bpe:300"}
model: {options: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 4, num_attention_heads: 4,
                  num_key_value_heads: 2, vocab_size: 300}}
pipeline: {num_stages: 2, skip_ratio: 0}
training: {max_steps: 120, num_microbatches: 6, micro_batch_size: 2, sequence_length: 64}
checkpoint: {interval: 20}
logging: {wandb: {mode: disabled}}
recovery: {silence_s: 5.0}
"""
SHUT_IN = (
    'mkdir -p "$0/home" && mount --bind "$0/hosts/$1" "$0/home" && mount -t tmpfs none "$0/hosts" '
    '&& cd "$0/home" && shift && exec "$@"'
)
"""Run a command in a host's folder, with no way to those of the others."""


class Commands(NamedTuple):
    """Those of the page, in the order in which they stand there."""

    secret: str
    train: str
    join: str
    collect: str
    give: str
    evaluate: str
    export: str

    @classmethod
    def of_page(cls) -> Self:
        """Read them; `TypeError` where the page has more or fewer."""
        _, _, rest = PAGE.read_text().partition(f"## {SECTION}\n")
        blocks = re.findall(r"^```text\n(.*?)^```", rest.partition("\n## ")[0], flags=re.DOTALL | re.MULTILINE)
        return cls(*(line for block in blocks for line in block.splitlines()))


class Cities:
    """The hosts, and what runs on them."""

    def __init__(self, folder: Path, hosts: JoinedHosts, num_hosts: int) -> None:
        self.folder, self.hosts, self.num_hosts = folder, hosts, num_hosts
        self.commands = Commands.of_page()
        scripts = Path(sys.executable).parent
        home = {"HOME": str(folder / "home"), "PATH": f"{scripts}:{os.environ['PATH']}"}
        self._environment = os.environ | home | {"OMP_NUM_THREADS": "1"}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
        self._words = folder / "none.log"
        self._running = list[subprocess.Popen[bytes]]()
        for host in range(num_hosts):
            self.of(host).mkdir(parents=True)

    def of(self, host: int) -> Path:
        """Return a host's folder, as it is seen from outside."""
        return self.folder / "hosts" / str(host)

    def make_secret(self) -> None:
        """Export the secret on the first host, as the page does, and bring it to the others."""
        name, _, value = self.commands.secret.removeprefix("export ").partition("=")
        words = ["bash", "-c", f"printf %s {value}"]
        made = subprocess.run(words, env=self._environment, capture_output=True, text=True, check=True)
        self._environment[name] = made.stdout

    def begin(self, host: int, command: str) -> subprocess.Popen[bytes]:
        """Start a command of the page on a host."""
        shut_in = ["unshare", "-m", "sh", "-c", SHUT_IN, str(self.folder), str(host), "bash", "-c", command]
        words = [*self.hosts.prefix(host), "env", "-u", "GLOO_SOCKET_IFNAME", *shut_in]  # which no command needs
        with (self.folder / f"{len(self._running):02}-{host}-{command.split()[1]}.log").open("wb") as log:
            process = subprocess.Popen(
                words, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )  # the kernel shares cores out among sessions, so that a host has as much as any other
        self._running.append(process)
        return process

    def begin_all(self, first: str, others: str) -> list[subprocess.Popen[bytes]]:
        """Start a command on the first host and another one on all others."""
        return [self.begin(host, others if host else first) for host in range(self.num_hosts)]

    def train(self) -> list[subprocess.Popen[bytes]]:
        """Start the lines of the page on all hosts."""
        processes = self.begin_all(self.commands.train, self.commands.join)
        self._words = max(self.folder.glob("*-0-train.log"))
        return processes

    def close(self) -> None:
        """End what still runs."""
        for process in self._running:
            process.kill()
            process.wait()

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a record of the run on host 0."""
        path = self.of(0) / RUN / name
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def goes_on(self) -> bool:
        """Whether a step was made since the last start."""
        return any(line.startswith("step ") for line in self._words.read_text().splitlines())

    def step(self) -> int:
        """Return the last step that host 0 has recorded."""
        entries = self.entries("metrics.jsonl")
        return int(entries[-1]["step"]) if entries else 0


class Parts:
    """How long each part of the journey took."""

    def __init__(self) -> None:
        self.took: dict[str, Any] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a part."""
        self._begun_s = time.monotonic()

    def done(self, name: str) -> None:
        """End a part and begin the next."""
        self.took[f"{name}, s"] = took_s = round(time.monotonic() - self._begun_s, 1)
        click.echo(f"{name}: {took_s} s")
        self.begin()


def journey(cities: Cities) -> dict[str, Any]:
    """Do all of it; return how long each part took. Raises `AssertionError` where one is not as the page says."""
    parts, commands = Parts(), cities.commands
    cities.make_secret()
    processes = cities.train()
    _wait(processes[0], cities.goes_on)
    parts.done("until the first step")
    _wait(processes[0], lambda: cities.step() >= LOST_AFTER)
    (lose_one if cities.num_hosts > 2 else lose_one_of_two)(cities, processes, parts)
    stopped_after = cities.step() + LATER
    _wait(processes[0], lambda: cities.step() >= stopped_after)
    parts.begin()
    processes[0].send_signal(signal.SIGTERM)
    assert _codes(processes) == [STOPPED] * cities.num_hosts, _codes(processes)
    parts.done("all are stopped and have saved")
    stopped_after = cities.step()
    processes = cities.train()
    _wait(processes[0], cities.goes_on)
    parts.done("all are started again, until a step more")
    assert _codes(processes) == [0] * cities.num_hosts, _codes(processes)
    parts.done("to the last step")
    parts.took |= kept_promise(cities.entries("metrics.jsonl"), stopped_after + 1)
    assert [entry["step"] for entry in cities.entries("metrics.jsonl")] == list(range(1, STEPS + 1))
    parts.begin()
    assert _codes(cities.begin_all(commands.collect, commands.give)) == [0] * cities.num_hosts
    parts.done("collect")
    assert _codes([cities.begin(0, commands.evaluate)]) == [0]
    parts.done("evaluate")
    assert _codes([cities.begin(0, commands.export)]) == [0]
    assert (cities.of(0) / "exported" / "config.json").exists()
    parts.done("export")
    return parts.took


def lose_one(cities: Cities, processes: list[subprocess.Popen[bytes]], parts: Parts) -> None:
    """Lose the last host, which the others go on without, and get it back."""
    lost_after, last = cities.step(), cities.num_hosts - 1
    parts.begin()
    _lose(cities, last, processes)
    _wait(processes[0], lambda: cities.step() > lost_after + 1)
    parts.done("a host is lost, until two steps more")
    cities.hosts.heal(last)
    processes[last] = cities.begin(last, cities.commands.join)
    _wait(processes[0], lambda: any(event["joined"] for event in cities.entries("events.jsonl")))
    parts.done("it comes back")


def lose_one_of_two(cities: Cities, processes: list[subprocess.Popen[bytes]], parts: Parts) -> None:
    """Lose the second host, upon which the first one ends, and start both again."""
    parts.begin()
    _lose(cities, 1, processes)
    assert processes[0].wait(LIMIT_S) not in (0, STOPPED)
    parts.done("a host is lost, until two steps more")
    cities.hosts.heal(1)
    processes[:] = cities.train()
    _wait(processes[0], cities.goes_on)
    parts.done("it comes back")


def kept_promise(entries: Sequence[dict[str, Any]], first: int) -> dict[str, Any]:
    """Return what the plan says that a step takes, and what the median of those from `first` on did take."""
    found = [entry for entry in entries if entry["step"] > first]
    planned, took = (
        statistics.median(entry[name] for entry in found) for name in (Metric.PREDICTED_S, Metric.ITERATION_S)
    )
    return {"a step as planned, s": round(planned, 2), "a step, s": round(took, 2)}


def _wait(first: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Wait until it has happened, as long as the first host's process lives."""
    deadline_s = time.monotonic() + LIMIT_S
    while not happened():
        assert first.poll() is None, f"the first host has ended with {first.returncode}"
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.1)


def _lose(cities: Cities, host: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Take a host away: nobody is told, and what it ran is gone."""
    cities.hosts.cut(host)
    processes[host].kill()


def _codes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(LIMIT_S) for process in processes]


@click.command()
@click.option("--hosts", "num_hosts", default=3, show_default=True, type=click.IntRange(2, len(LINES)))
@click.option("--texts", default=str(HERE.parents[1] / "docs" / "*.md"), help="Text, of which each host has a copy.")
def main(num_hosts: int, texts: str) -> None:
    """Make the hosts and go through it all; write results.json and results.md beside this file."""
    if (problem := why_not()) is not None:
        raise click.ClickException(problem)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # with the hosts and what runs there
    pattern = Path(texts)
    wires = {(a, b): Wire(None, LINES[a][1] + LINES[b][1]) for a, b in permutations(range(num_hosts), 2)}
    lines = [Line(mbit_per_s, mbit_per_s) for mbit_per_s, _ in LINES[:num_hosts]]
    with tempfile.TemporaryDirectory() as place, JoinedHosts(num_hosts, wires, lines) as hosts:
        cities = Cities(Path(place), hosts, num_hosts)
        try:
            for host in range(num_hosts):
                (cities.of(host) / "texts").mkdir()
                for path in pattern.parent.glob(pattern.name):
                    shutil.copy(path, cities.of(host) / "texts" / f"{path.stem}.txt")
            (cities.of(0) / "cluster.yaml").write_text(CLUSTER.format(num_hosts=num_hosts))
            (cities.of(0) / "experiment.yaml").write_text(EXPERIMENT)
            took = journey(cities)
        except (AssertionError, subprocess.TimeoutExpired):
            for log in sorted(Path(place).glob("*.log")):
                click.echo(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}")
            raise
        finally:
            cities.close()
    path = HERE / "results.json"
    known = {row["hosts"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    known[num_hosts] = {"hosts": num_hosts, **took, "failed": []}
    rows = [known[number] for number in sorted(known)]
    result = {"rows": rows, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    write_whole(path, json.dumps(result, indent=1) + "\n")
    write_whole(HERE / "results.md", page(result))


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    lines = ", ".join(f"{mbit_per_s:g} Mbit/s and {delay_ms:g} ms" for mbit_per_s, delay_ms in LINES)
    about = (
        "Made by `run.py`; see [the guide](../README.md). Each host has a folder that no other sees, the network "
        f"{INTERFACE} alone, and a line of its own; one after the other {lines}, each way, so that what one "
        "host sends another takes 10 to 80 ms. Each has its copy of the text, and the first one all else. The commands "
        "are read from [the page](../../docs/multi-node.md#two-cities). A host is lost by being cut off and killed; "
        "of two hosts the other one ends then, and both are started again. All hosts share the cores of one machine."
    )
    where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    return "\n".join(["# Two cities, or more", "", about, "", *rows_table(result["rows"]), f"- {where}"]) + "\n"


if __name__ == "__main__":
    main()
