"""What `skippipe profile` says of lines whose rate and latency are known.

    python benchmarks/profile/run.py [--only NAME] [--quick]

Two hosts are network namespaces with a shaped line between them (`common/lines.py`), and each runs the real command.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click

from common.command import chosen, folder_of_results, record
from common.lines import JoinedHosts, Wire, why_not
from common.one_machine import rank_environment
from common.table import MARKS, Columns, Result, machine

HERE = Path(__file__).parent
RATES_MBIT_PER_S = (2.0, 20.0, 200.0)
LATENCIES_MS = (5.0, 20.0, 40.0)
LATENCY_BAR, BANDWIDTH_BAR = 0.05, 0.1
HEADERS_BYTES = 52
"""Of IP and TCP with timestamps: what of each packet is not payload."""
PORT = 29500
LIMIT_S = 600.0
ROWS = {
    f"{rate:g} Mbit/s, {2 * latency:g} ms there and back": Wire(rate, latency)
    for rate in RATES_MBIT_PER_S
    for latency in LATENCIES_MS
}


def measure(name: str, *, quick: bool) -> Result:
    """Profile two hosts that are joined by the row's line."""
    wire = ROWS[name]
    mtu_bytes = 9000 if wire.mbit_per_s and wire.mbit_per_s > 100 else 1500  # so that the relay keeps up
    with JoinedHosts(2, {(0, 1): wire, (1, 0): wire}, mtu_bytes=mtu_bytes) as hosts:
        begun_s = time.monotonic()
        links = profile(hosts, 2, ["--link-s", "0.2"] if quick else [])["links"]
        took_s = time.monotonic() - begun_s
    payload_mbit_per_s = (wire.mbit_per_s or 0.0) * (1 - HEADERS_BYTES / mtu_bytes)
    latency_error = worst([link["latency_ms"] / wire.latency_ms - 1 for link in links])
    bandwidth_error = worst([1e3 * link["gbit_per_s"] / payload_mbit_per_s - 1 for link in links])
    return {
        "name": name,
        "quick": quick,
        "date": datetime.now(UTC).date().isoformat(),
        **machine(HERE),
        "congestion control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "latency, ms": [link["latency_ms"] for link in links],
        "bandwidth, Mbit/s": [round(1e3 * link["gbit_per_s"], 3) for link in links],
        "payload, Mbit/s": round(payload_mbit_per_s, 3),
        "latency error": round(latency_error, 4),
        "bandwidth error": round(bandwidth_error, 4),
        "seconds": round(took_s, 1),
        "met": abs(latency_error) <= LATENCY_BAR and abs(bandwidth_error) <= BANDWIDTH_BAR,
    }


def profile(hosts: JoinedHosts, num_hosts: int, options: list[str]) -> Result:
    """Run the command on all hosts; return what it prints as JSON."""
    with TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "skippipe", "profile", "--device", "cpu", "--compute-s", "0.2", "--json"]
        words += [*options, "--out", str(Path(folder) / "cluster.yaml")]
        processes = []
        for rank in range(num_hosts):
            own = rank_environment(rank, num_hosts, hosts.address(0), PORT) | {"OMP_NUM_THREADS": "1"}
            command = [*hosts.prefix(rank), *words]
            output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=os.environ | own, stdout=output))
        try:
            printed, _ = processes[0].communicate(timeout=LIMIT_S)
            codes = [process.wait(LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise click.ClickException(f"the command ended with {codes}")
    return dict(json.loads(printed))


def worst(errors: list[float]) -> float:
    """Return the error that is farthest from nothing."""
    return max(errors, key=abs)


COLUMNS: Columns = {
    "line": lambda row: row["name"],
    "latency": lambda row: " / ".join(f"{value:.2f}" for value in row["latency, ms"]) + " ms",
    "error": lambda row: f"{row['latency error']:+.1%}",
    "bandwidth": lambda row: " / ".join(f"{value:.4g}" for value in row["bandwidth, Mbit/s"]) + " Mbit/s",
    "payload": lambda row: f"{row['payload, Mbit/s']:.4g} Mbit/s",
    "error of bandwidth": lambda row: f"{row['bandwidth error']:+.1%}",
    "took": lambda row: f"{row['seconds']:.1f} s",
    "within the bars": lambda row: MARKS[row["met"]],
}


@click.command()
@click.option("--only", multiple=True, help="Part of a row's name; all rows by default.")
@click.option("--quick", is_flag=True, help="Measure short, to see that all rows run.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the results.")
def main(only: tuple[str, ...], quick: bool, out: Path | None) -> None:
    """Profile shaped lines and write results.json and results.md beside this file."""
    if (problem := why_not()) is not None:
        raise click.ClickException(problem)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # with the hosts and what runs there
    folder = folder_of_results(out, quick, HERE)
    page = ("The profile of lines that are known", COLUMNS)
    record(ROWS, chosen(ROWS, only), folder, lambda name: measure(name, quick=quick), page)


if __name__ == "__main__":
    main()
