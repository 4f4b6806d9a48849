"""The SLURM template under a real slurmctld with three nodes on this host: nodes are lost, and the time limit comes.

Left out unless asked for, since it needs SLURM and root (Debian: apt-get install slurm-wlm):

    pytest -n 0 -m extended tests/repository/test_slurm.py
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import free_port
from random_plans import random_plan
from training_runs import CLUSTER, losses, make_experiment, train_alone, write_inputs

from skippipe.monitor.run_events import read_changes

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-second", f"{HOST}-third")
"""Names of SLURM's nodes, sorted as it sorts them: the ranks look up that of the first one, where their store is."""
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
RATE: dict[str, Any] = {"optimizer": {"lr": 3e-4}, "lr_scheduler": {"min_lr_ratio": 1.0}}
"""Small, so that rounding does not grow in hundreds of steps; and the same whatever the last step is, which changes."""
LIMIT_S = 150
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
pytestmark = [
    pytest.mark.extended,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("slurmctld") is None or os.geteuid() != 0, reason="needs SLURM and root"),
]


class Cluster:
    """SLURM on this host; one job at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.job, self._stack = folder, "", stack
        nodes = "\n".join(NODE.format(name=name, host=HOST, port=free_port()) for name in NODES)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=HOST, port=free_port(), folder=folder, nodes=nodes)
        )
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def ask(self, *command: str, **environment: str) -> str:
        """Return what a program of SLURM prints; "" where it has nothing to say about the job any more."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.strip()

    def start(self) -> None:
        """Start the daemons; the stack ends them."""
        self._start_daemon("slurmctld", "-D")
        self.bring_back(*NODES)

    def bring_back(self, *names: str) -> None:
        """Start the daemons of nodes, and wait until all can take a job or have one."""
        for name in names:
            self._start_daemon("slurmd", "-D", "-N", name)
        self.wait(lambda: not self.ask("sinfo", "-h", "-N", "-t", "down,unk,no_respond"))

    def processes_of(self, node: str) -> Iterator[psutil.Process]:
        """Give what runs on a node: what SLURM has started there, what has started that, and the node's daemon."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                if environment.get("SLURMD_NODENAME") == node:
                    yield process
                    yield from (parent for parent in process.parents() if "slurmstepd" in parent.cmdline()[0])
                elif process.cmdline()[-2:] == ["-N", node]:
                    yield process

    def lose(self, *names: str) -> None:
        """Kill all that runs on nodes: their daemons, and their part of the job."""
        for process in [process for name in names for process in self.processes_of(name)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def wait(self, reached: Callable[[], bool]) -> None:
        """Wait until something is reached."""
        deadline_s = time.monotonic() + LIMIT_S
        while not reached():
            assert time.monotonic() < deadline_s, self.log() or (self.folder / "slurmctld -D.log").read_text()
            time.sleep(0.2)

    def submit(self, arguments: Sequence[str], **environment: str) -> None:
        """Submit the template; the signal is due in the last minute of the job's time."""
        options = ["--parsable", "--nodes", str(len(NODES)), "--time", "10", "--signal", "TERM@60"]
        self.job = self.ask("sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *arguments, **environment)
        assert self.job.isdigit()

    def facts(self) -> dict[str, str]:
        """Return what SLURM says of the job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", self.job)))

    def wait_for_fact(self, key: str, value: str) -> None:
        """Wait until SLURM says something of the job."""
        self.wait(lambda: self.facts().get(key) == value)

    def update(self, **changes: str) -> None:
        """Change the job."""
        self.ask("scontrol", "update", f"JobId={self.job}", *(f"{key}={value}" for key, value in changes.items()))

    def start_again(self) -> None:
        """Wait until the job is back in the queue; spare it SLURM's two minutes there, and give it time again."""
        self.wait_for_fact("JobState", "PENDING")
        self.update(StartTime="now", TimeLimit="10")

    def log(self) -> str:
        """Return what the job has printed."""
        path = self.folder / f"skippipe-{self.job}.out"
        return path.read_text() if path.exists() else ""

    def _start_daemon(self, *command: str) -> None:
        with (self.folder / f"{' '.join(command)}.log").open("a") as log:
            daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self._stack.callback(daemon.wait, 20)
        self._stack.callback(daemon.terminate)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        slurm = Cluster(tmp_path, stack)
        slurm.start()
        yield slurm
        slurm.ask("scancel", slurm.job)
        slurm.wait(lambda: not slurm.ask("squeue", "-h"))


class Job:
    """A training that is submitted: each microbatch visits all stages, so that its losses depend on no plan."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self.plan = random_plan(
            5, num_nodes=3, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=3, time_scale_s=0.01
        )
        self._experiment = make_experiment(
            folder,
            training={"max_steps": 100_000},
            checkpoint={"interval": 10},
            evaluation={"interval": 0},
            emulation={"compute": True},
            recovery={"enabled": "auto", "copy_interval": 1},
            **RATE,
        )
        (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {len(NODES)}"))
        self.run_dir = self._experiment.run_path
        _, config, *with_plan = write_inputs(self._experiment, self.plan, folder)
        cluster.submit([config, *with_plan], SKIPPIPE_NODES=" ".join(self.plan.nodes), MASTER_PORT=str(free_port()))

    def steps(self) -> int:
        """Return how many steps are recorded."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_steps(self) -> None:
        """Wait for some more steps."""
        wanted = self.steps() + 20
        self._cluster.wait(lambda: self.steps() >= wanted)

    def wait_for_change(self, *, lost: Sequence[str] = (), joined: Sequence[str] = ()) -> None:
        """Wait until the members' last change is this one."""
        self._cluster.wait(
            lambda: (
                [(sorted(change.lost), sorted(change.joined)) for change in read_changes(self.run_dir)][-1:]
                == [(sorted(lost), sorted(joined))]
            )
        )

    def finish(self) -> None:
        """Let the job end some steps after it starts again, and compare all losses with those of one process."""
        last_step = self.steps() + 20
        training = self._experiment.training.model_copy(update={"max_steps": last_step})
        write_inputs(self._experiment.model_copy(update={"training": training}), self.plan, self._folder)
        self._cluster.start_again()
        self._cluster.wait_for_fact("JobState", "COMPLETED")
        alone = make_experiment(self._folder, "alone", training={"max_steps": last_step}, **RATE)
        train_alone(alone, self.plan)
        assert losses(self.run_dir) == pytest.approx(losses(alone.run_path), rel=1e-5)


def test_a_job_continues_after_its_time_limit_and_goes_on_without_a_lost_node_until_it_is_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    job.wait_for_steps()
    minutes = int(cluster.facts()["RunTime"].split(":")[1]) + 1
    cluster.update(TimeLimit=str(minutes))
    cluster.start_again()
    stopped = re.findall(r"stopped after step (\d+) .* \(exit code 75\)", cluster.log())
    assert len(stopped) == 1, cluster.log()
    cluster.wait(lambda: f"continuing after step {stopped[0]}" in cluster.log())
    job.wait_for_steps()

    cluster.lose(NODES[1])
    job.wait_for_change(lost=[job.plan.nodes[1]])
    cluster.wait_for_fact("NumNodes", "2")
    job.wait_for_steps()
    cluster.bring_back(NODES[1])
    cluster.ask("sbatch", "--nodes", "1", "--wrap", f"srun python -m skippipe join {job.run_dir}")
    job.wait_for_change(joined=[job.plan.nodes[1]])
    job.wait_for_steps()
    assert cluster.facts()["Restarts"] == "1"

    cluster.ask("scancel", "--signal", "TERM", cluster.job)
    job.finish()
    assert cluster.facts()["Restarts"] == "2"
    assert "Traceback" not in cluster.log()


def test_a_job_begins_again_where_too_few_are_left_and_outlives_the_host_of_its_script(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    job.wait_for_steps()
    cluster.lose(*NODES[1:])
    cluster.wait_for_fact("JobState", "PENDING")
    cluster.bring_back(*NODES[1:])
    cluster.start_again()
    cluster.wait(lambda: "continuing after step" in cluster.log())
    job.wait_for_steps()

    cluster.lose(NODES[0])
    job.wait_for_change(lost=[job.plan.nodes[0]])
    cluster.wait_for_fact("NumNodes", "2")
    job.wait_for_steps()
    rank = next(process for process in cluster.processes_of(NODES[1]) if process.cmdline()[1:3] == ["-m", "skippipe"])
    rank.terminate()
    cluster.wait_for_fact("JobState", "PENDING")
    cluster.bring_back(NODES[0])
    job.finish()
    assert cluster.facts()["Restarts"] == "2"


def test_a_job_that_is_cancelled_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    Job(cluster, tmp_path).wait_for_steps()
    cluster.ask("scancel", cluster.job)
    cluster.wait_for_fact("JobState", "CANCELLED")
    assert cluster.facts()["Restarts"] == "0"
    assert "Traceback" not in cluster.log()
