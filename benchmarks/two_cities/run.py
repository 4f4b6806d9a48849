"""Hosts in several cities that share nothing: the commands of docs/multi-node.md, from the first start to an export.

    python benchmarks/two_cities/run.py [--hosts N]

Each host is a network namespace with a folder of its own, which no other sees, behind a line of its own.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click

from common.command import write_whole
from common.hosts import INTERFACE, Hosts, why_not
from common.table import machine, rows_table

HERE = Path(__file__).parent
LINES: Final = ((200.0, 5.0), (50.0, 20.0), (20.0, 40.0), (100.0, 10.0), (50.0, 35.0), (20.0, 15.0))
"""Of each host: Mbit/s each way, and milliseconds that what leaves it is under way."""
PORT, STORE_PORT = 40000, 29500
LIMIT_S = 240.0
STEPS: Final = 300
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
training: {max_steps: 300, num_microbatches: 6, micro_batch_size: 2, sequence_length: 64}
checkpoint: {interval: 25}
logging: {wandb: {mode: disabled}}
recovery: {silence_s: 5.0}
"""
SHUT_IN = (
    'mkdir -p "$0/home" && mount --bind "$0/hosts/$1" "$0/home" && mount -t tmpfs none "$0/hosts" '
    '&& cd "$0/home" && shift && exec "$@"'
)
"""Run a command in a host's folder, with no way to those of the others."""


class Cities:
    """The hosts, and what runs on them."""

    def __init__(self, folder: Path, hosts: Hosts, num_hosts: int) -> None:
        self.folder, self._hosts, self.num_hosts = folder, hosts, num_hosts
        self._secret = secrets.token_hex(16)
        self._started = 0
        for host in range(num_hosts):
            self.of(host).mkdir(parents=True)

    def of(self, host: int) -> Path:
        """Return a host's folder, as it is seen from outside."""
        return self.folder / "hosts" / str(host)

    def begin(self, host: int, *words: str) -> subprocess.Popen[bytes]:
        """Start `skippipe` on a host."""
        self._started += 1
        own = {"HOME": str(self.folder / "home"), "SKIPPIPE_SECRET": self._secret, "OMP_NUM_THREADS": "1"}
        python = [sys.executable, "-m", *words]
        command = ["unshare", "-m", "sh", "-c", SHUT_IN, str(self.folder), str(host), *python]
        with (self.folder / f"{self._started}-{host}-{words[-1].replace('/', '-')[:20]}.log").open("wb") as log:
            return subprocess.Popen(
                [*self._hosts.prefix(host), *command], env=os.environ | own, stdout=log, stderr=subprocess.STDOUT
            )

    def train(self) -> list[subprocess.Popen[bytes]]:
        """Start the lines of the page on all hosts."""
        place = f"{self._hosts.address(0)}:{PORT}"
        first = self.begin(0, "skippipe", "train", "--config", "experiment.yaml", "--listen", place)
        return [first, *(self.join(host) for host in range(1, self.num_hosts))]

    def join(self, host: int) -> subprocess.Popen[bytes]:
        """Start the line of a host that comes."""
        return self.begin(host, "skippipe", "join", f"{self._hosts.address(0)}:{PORT}")

    def collect(self) -> list[subprocess.Popen[bytes]]:
        """Start the line that brings the run to host 0 on all of them."""
        size = ["--nnodes", str(self.num_hosts), "--nproc-per-node", "1"]
        store = ["--master-addr", self._hosts.address(0), "--master-port", str(STORE_PORT)]
        command = [*store, "-m", "skippipe", "collect", RUN]
        return [
            self.begin(host, "skippipe.cli.agent", *size, "--node-rank", str(host), *command)
            for host in range(self.num_hosts)
        ]

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a record of the run on host 0."""
        path = self.of(0) / RUN / name
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def step(self) -> int:
        """Return the last step that host 0 has recorded."""
        entries = self.entries("metrics.jsonl")
        return int(entries[-1]["step"]) if entries else 0


def journey(cities: Cities) -> dict[str, Any]:
    """Do all of it; return how long each part took. Raises `AssertionError` where one is not as the page says."""
    took: dict[str, Any] = {}
    begun_s = time.monotonic()

    def done(part: str) -> None:
        nonlocal begun_s
        took[f"{part}, s"] = round(time.monotonic() - begun_s, 1)
        click.echo(f"{part}: {took[f'{part}, s']} s")
        begun_s = time.monotonic()

    processes = cities.train()
    _wait(processes[0], lambda: cities.step() >= 1)
    done("until the first step")
    _wait(processes[0], lambda: cities.step() >= LOST_AFTER)
    begun_s = time.monotonic()
    lost_after, last = cities.step(), cities.num_hosts - 1
    processes[last].kill()
    _wait(processes[0], lambda: cities.step() > lost_after + 1)
    done("a host is lost, until two steps more")
    processes[last] = cities.join(last)
    _wait(processes[0], lambda: any(event["joined"] for event in cities.entries("events.jsonl")))
    done("it comes back")
    stopped_after = cities.step() + LATER
    _wait(processes[0], lambda: cities.step() >= stopped_after)
    begun_s = time.monotonic()
    processes[0].send_signal(signal.SIGTERM)
    assert _codes(processes) == [STOPPED] * cities.num_hosts, _codes(processes)
    done("all are stopped and have saved")
    assert _codes(cities.train()) == [0] * cities.num_hosts
    done("all are started again, to the last step")
    assert [entry["step"] for entry in cities.entries("metrics.jsonl")] == list(range(1, STEPS + 1))
    assert _codes(cities.collect()) == [0] * cities.num_hosts
    done("collect")
    evaluated = cities.begin(0, "skippipe", "evaluate", RUN, "--batches", "2", "--policy", "full")
    assert _codes([evaluated]) == [0]
    done("evaluate")
    assert _codes([cities.begin(0, "skippipe", "export", RUN, "exported")]) == [0]
    assert (cities.of(0) / "exported" / "config.json").exists()
    done("export")
    return took


def _wait(first: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Wait until it has happened, as long as the first host's process lives."""
    deadline_s = time.monotonic() + LIMIT_S
    while not happened():
        assert first.poll() is None, f"the first host has ended with {first.returncode}"
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.1)


def _codes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(LIMIT_S) for process in processes]


@click.command()
@click.option("--hosts", "num_hosts", default=3, show_default=True, type=click.IntRange(2, len(LINES)))
@click.option("--texts", default=str(HERE.parents[1] / "docs" / "*.md"), help="Text, of which each host has a copy.")
def main(num_hosts: int, texts: str) -> None:
    """Make the hosts and go through it all; write results.json and results.md beside this file."""
    if (problem := why_not()) is not None:
        raise click.ClickException(problem)
    pattern = Path(texts)

    with tempfile.TemporaryDirectory() as place, Hosts(num_hosts) as hosts:
        for host, (mbit_per_s, _) in enumerate(LINES[:num_hosts]):
            hosts.shape(host, mbit_per_s)
        delayed = all(hosts.delay(host, delay_ms) for host, (_, delay_ms) in enumerate(LINES[:num_hosts]))
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
    path = HERE / "results.json"
    known = {row["hosts"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    known[num_hosts] = {
        "hosts": num_hosts,
        "delays": "yes" if delayed else "no (kernel without netem)",
        **took,
        "failed": [],
    }
    rows = [known[number] for number in sorted(known)]
    result = {"rows": rows, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    write_whole(path, json.dumps(result, indent=1) + "\n")
    write_whole(HERE / "results.md", page(result))


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    lines = ", ".join(f"{mbit_per_s:g} Mbit/s and {delay_ms:g} ms" for mbit_per_s, delay_ms in LINES)
    about = (
        "Made by `run.py`; see [the guide](../README.md). Each host has a folder that no other sees, the network "
        f"{INTERFACE} alone, and a line of its own; one after the other {lines}, each way, so that two hosts are 25 to "
        "75 ms apart where the kernel can delay packets. Each has its copy of the text, and the first one all else. "
        "The commands are those of [the page](../../docs/multi-node.md#two-cities)."
    )
    where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    return "\n".join(["# Two cities, or more", "", about, "", *rows_table(result["rows"]), f"- {where}"]) + "\n"


if __name__ == "__main__":
    main()
