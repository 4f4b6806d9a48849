"""The SLURM template under a real slurmctld with two nodes on this host: a node is lost, and the time limit comes.

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
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import free_port
from random_plans import random_plan
from training_runs import losses, make_experiment, write_inputs

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-second")
"""Names of SLURM's nodes, sorted as it sorts them: the template's rendezvous looks up that of the first one."""
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
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
pytestmark = [
    pytest.mark.extended,
    pytest.mark.slow,
    pytest.mark.timeout(170),
    pytest.mark.skipif(shutil.which("slurmctld") is None or os.geteuid() != 0, reason="needs SLURM and root"),
]


class Cluster:
    """SLURM on this host; one job at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, ""
        nodes = "\n".join(NODE.format(name=name, host=HOST, port=free_port()) for name in NODES)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=HOST, port=free_port(), folder=folder, nodes=nodes)
        )
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "OMP_NUM_THREADS": "1"}

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

    def start(self, stack: ExitStack) -> None:
        """Start the daemons; `stack` ends them."""
        for command in (["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)):
            with (self.folder / f"{' '.join(command)}.log").open("w") as log:
                daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            stack.callback(daemon.wait, 20)
            stack.callback(daemon.terminate)
        self.wait(lambda: self.ask("sinfo", "-h", "-o", "%t %D") == "idle 2")

    def wait(self, reached: Callable[[], bool]) -> None:
        """Wait until something is reached."""
        deadline_s = time.monotonic() + 90
        while not reached():
            assert time.monotonic() < deadline_s, self.log() or (self.folder / "slurmctld -D.log").read_text()
            time.sleep(0.2)

    def submit(self, arguments: Sequence[str], **environment: str) -> None:
        """Submit the template; the signal is due in the last minute of the job's time."""
        options = ["--parsable", "--nodes", "2", "--time", "10", "--signal", "TERM@60"]
        self.job = self.ask("sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *arguments, **environment)
        assert self.job.isdigit()

    def facts(self) -> dict[str, str]:
        """Return what SLURM says of the job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", self.job)))

    def update(self, **changes: str) -> None:
        """Change the job."""
        self.ask("scontrol", "update", f"JobId={self.job}", *(f"{key}={value}" for key, value in changes.items()))

    def start_again(self) -> None:
        """Wait until the job is back in the queue; spare it SLURM's two minutes there."""
        self.wait(lambda: self.facts()["JobState"] == "PENDING")
        self.update(StartTime="now")

    def log(self) -> str:
        """Return what the job has printed."""
        path = self.folder / f"skippipe-{self.job}.out"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        slurm = Cluster(tmp_path)
        slurm.start(stack)
        yield slurm
        slurm.ask("scancel", slurm.job)


def test_a_job_goes_on_after_a_lost_node_and_after_its_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    plan = random_plan(5, num_nodes=2, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=3)
    experiment = make_experiment(
        tmp_path, training={"max_steps": 100_000}, checkpoint={"interval": 10}, evaluation={"interval": 0}
    )
    _, config, *with_plan = write_inputs(experiment, plan, tmp_path)
    metrics = experiment.run_path / "metrics.jsonl"
    cluster.submit([config, *with_plan], SKIPPIPE_NODES=" ".join(plan.nodes), MASTER_PORT=str(free_port()))
    cluster.wait(lambda: metrics.exists() and metrics.read_text().count("\n") > 20)

    cluster.ask("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=lost")
    cluster.start_again()
    cluster.wait(lambda: "continuing after step" in cluster.log())

    minutes = int(cluster.facts()["RunTime"].split(":")[1]) + 1
    cluster.update(TimeLimit=str(minutes))
    cluster.start_again()
    stopped = re.findall(r"stopped after step (\d+) .* \(exit code 75\)", cluster.log())
    assert len(stopped) == 1, cluster.log()
    cluster.wait(lambda: cluster.log().count("continuing after step") == 2)
    assert cluster.log().rpartition("continuing after step ")[2].split()[0] == stopped[0]

    cluster.ask("scancel", cluster.job)
    cluster.wait(lambda: cluster.facts()["JobState"] == "CANCELLED")
    assert cluster.facts()["Restarts"] == "2", "who cancels a job does not want it back"
    assert len(losses(experiment.run_path)) >= int(stopped[0])
    assert "Traceback" not in cluster.log()
