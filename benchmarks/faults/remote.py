"""Kill a run in the middle of uploads to a real S3 or sftp server, take its disk away, and see what it goes on from.

    pip install 'skippipe[remote]' 'moto[server]' asyncssh
    python benchmarks/faults/remote.py s3|sftp [--kills N] [--seed S]

One process that saves every step, and a server on this machine. benchmarks/README.md says what has to hold.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from lossy_run import lines_of

from common.one_machine import free_port
from common.small_experiment import small_experiment
from common.table import machine, rows_table
from skippipe.checkpoint.disks.remote_folder import PARTIAL, RemoteFolder
from skippipe.config.experiment_file import save_experiment
from skippipe.monitor.metrics import Metric

HERE = Path(__file__).parent
BETWEEN = 6
"""Steps after a start until the process may be killed; every one of them is saved."""
GAP_S = 0.5
"""The kill comes up to so many seconds later."""
LIMIT_S = 600.0
"""Seconds for a start: on a busy machine the imports alone may take minutes."""
S3_KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
SFTP_SERVER = """
import asyncio, sys, asyncssh

class AnyUser(asyncssh.SSHServer):
    def password_auth_supported(self):
        return True

    def validate_password(self, username, password):
        return password == "secret"

async def serve():
    keys = [asyncssh.generate_private_key("ssh-ed25519")]
    port = int(sys.argv[1])
    await asyncssh.listen("127.0.0.1", port, server_host_keys=keys, server_factory=AnyUser, sftp_factory=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


@contextmanager
def served(kind: str, folder: Path) -> Iterator[str]:
    """Run a server until it is left; give the URL of an empty folder there."""
    port = free_port()
    s3 = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    command = s3 if kind == "s3" else [sys.executable, "-c", SFTP_SERVER, str(port)]
    os.environ |= S3_KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    urls = {"s3": "s3://bucket/run", "sftp": f"sftp://me:secret@127.0.0.1:{port}{folder}/there"}
    with (folder / "server.txt").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: answers(urls[kind]))
            yield urls[kind]
        finally:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    """Whether somebody answers there."""
    try:
        RemoteFolder(url).steps()
    except Exception:  # each protocol has its own
        return False
    return True


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until something is so; `TimeoutError` where it never is."""
    deadline_s = time.monotonic() + LIMIT_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError
        time.sleep(0.05)


class Run:
    """A run of one process in a folder."""

    def __init__(self, folder: Path, name: str, max_steps: int, **saving: Any) -> None:
        experiment = small_experiment(
            folder,
            name,
            training={"max_steps": max_steps},
            evaluation={"interval": 0},
            lr_scheduler={"warmup_steps": 5, "min_lr_ratio": 1.0},
            checkpoint=saving,
        )
        self.run_dir, self._config = experiment.run_path, folder / f"{name}.yaml"
        self._log, self._plan = folder / f"{name}.txt", folder / "given.plan.json"
        save_experiment(experiment, self._config)

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, always with the same line."""
        arguments = ["train", "--config", str(self._config), "--plan", str(self._plan)]
        with self._log.open("ab") as log:
            words = [sys.executable, "-m", "skippipe", *arguments]
            return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)  # with a share of the cores

    def start_and_kill(self, after_s: float) -> bool:
        """Start it, and kill it so long after its first steps; say whether these were made."""
        process = self.start()
        with suppress(TimeoutError):
            wait_for(lambda: len(self.losses) >= BETWEEN or process.poll() is not None)
        is_under_way = process.poll() is None and len(self.losses) >= BETWEEN
        time.sleep(after_s)
        process.kill()
        process.wait()
        return is_under_way

    def last_words(self) -> str:
        """Return the end of what it has printed."""
        return self._log.read_text(errors="replace")[-3000:]

    @property
    def losses(self) -> dict[int, float]:
        """The loss of every step that was written down."""
        return {int(entry[Metric.STEP]): entry[Metric.TRAIN_LOSS] for entry in lines_of(self.run_dir / "metrics.jsonl")}


def killed_again_and_again(run: Run, url: str, kills: int, generator: random.Random) -> dict[str, Any]:
    """Kill the run so often, each time with its disk; return what it went on from."""
    losses, failed, halves, going_back = dict[int, float](), list[str](), 0, list[int]()
    newest_there = 0
    for number in range(kills + 1):
        if not run.start_and_kill(generator.uniform(0.0, GAP_S)):
            failed.append(f"start {number}: no {BETWEEN} steps")
            click.echo(f"{failed[-1]}\n{run.last_words()}", err=True)
        found = run.losses
        if not found or min(found) != newest_there + 1:
            failed.append(f"start {number}: began with step {min(found, default=0)}, step {newest_there} was there")
            break
        failed += [
            f"step {step}: {loss}, before {losses[step]}"
            for step, loss in found.items()
            if losses.get(step, loss) != loss
        ]
        losses |= found
        folder = RemoteFolder(url)
        newest_there = max(folder.steps(), default=0)
        going_back.append(max(found) - newest_there)
        halves += any_half(folder)
        shutil.rmtree(run.run_dir)
    return {
        "kills": kills,
        "found something half there": halves,
        "steps": max(losses, default=0),
        "steps gone back, most": max(going_back, default=None),
        "losses": losses,
        "failed": failed,
    }


def any_half(folder: RemoteFolder) -> bool:
    """Whether a file or a checkpoint is there that is not whole."""
    places = folder.everything()
    begun = {place.rpartition("/")[0] for place in places}
    return any(place.endswith(PARTIAL) for place in places) or len(begun) > len(folder.steps())


@click.command()
@click.argument("kind", type=click.Choice(["s3", "sftp"]))
@click.option("--kills", default=20, show_default=True, help="How often the process is killed.")
@click.option("--seed", default=0, show_default=True, help="Gives when.")
def main(kind: str, kills: int, seed: int) -> None:
    """Make the run; write remote-KIND.json and the table in remote.md beside this file."""
    from skippipe.planning.experiment_plan import plan_experiment

    with tempfile.TemporaryDirectory() as place, served(kind, Path(place)) as url:
        folder = Path(place)
        plan_experiment(small_experiment(folder, "planned")).save(folder / "given.plan.json")
        run = Run(folder, "killed", 100_000, interval=1, keep_last=3, remote_save_folder=url)
        result = killed_again_and_again(run, url, kills, random.Random(seed))
        losses = result.pop("losses")
        whole = Run(folder, "whole", max(losses), interval=0)
        whole.start().wait()
        result["losses bit by bit those of an undisturbed run"] = bool(losses) and whole.losses == losses
    where = machine(HERE) | {"date": datetime.now(UTC).date().isoformat()}
    (HERE / f"remote-{kind}.json").write_text(json.dumps({"row": {"server": kind} | result, **where}, indent=1) + "\n")
    (HERE / "remote.md").write_text(page([json.loads(path.read_text()) for path in sorted(HERE.glob("remote-*.json"))]))


def page(results: list[Mapping[str, Any]]) -> str:
    """Return the results as a page."""
    about = (
        "Made by `remote.py`; see [the guide](../README.md). One process saves every step, and brings it to a server "
        "on the same machine (moto's for S3, asyncssh's for sftp). It is killed at a random instant, its run directory "
        "is removed, and it is started again with the same line. Steps take less time here than uploads."
    )
    places = [f"- {one['cpu']}, {one['cores']} cores, commit {one['commit']}, {one['date']}" for one in results]
    table = rows_table([dict(one["row"]) for one in results])
    return (
        "\n".join(["# Kills while checkpoints are brought elsewhere", "", about, "", *table, *dict.fromkeys(places)])
        + "\n"
    )


if __name__ == "__main__":
    main()
