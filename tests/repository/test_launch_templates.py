"""Every launch template, rendered: the shell scripts really run, with the launcher replaced by one that prints."""

import os
import string
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


@pytest.fixture
def printing_launchers(tmp_path: Path) -> dict[str, str]:
    """An environment in which the agent prints its arguments and srun runs the task once per node, as SLURM does."""
    programs = {
        "python": 'echo "$* [SKIPPIPE_NODE=${SKIPPIPE_NODE:-}]"; exit "${AGENT_CODE:-0}"',
        "scontrol": 'if [ "$1" = show ]; then printf "gpu-a\\ngpu-b\\n"; else echo "scontrol $*"; fi',
        "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i SLURMD_NODENAME=gpu-$i "$@" || code=$?; done; exit ${code:-0}',
    }
    for name, body in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def run(script: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_torchrun_template(printing_launchers: dict[str, str]) -> None:
    hosts = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    result = run("torchrun.sh", printing_launchers | hosts, "exp.yaml", "training.max_steps=5")
    assert result.returncode == 0, result.stderr
    assert "--nnodes 3 --nproc-per-node 1 --node-rank 1 --master-addr host0 --master-port 29500" in result.stdout
    assert "-m skippipe train --config exp.yaml training.max_steps=5" in result.stdout
    assert "-m skippipe.cli.agent" in result.stdout
    assert "--max-restarts 3 --shutdown-timeout 100" in result.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_the_templates_run_any_command(printing_launchers: dict[str, str], script: str) -> None:
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    job = {"SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77"}
    result = run(script, printing_launchers | place | job, "profile", "--out", "a file.yaml")
    assert result.returncode == 0, result.stderr
    assert "-m skippipe profile --out a file.yaml" in result.stdout


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True)])
def test_the_slurm_template_queues_a_stopped_job_again(
    printing_launchers: dict[str, str], code: int, again: bool
) -> None:
    job = {"SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "AGENT_CODE": str(code)}
    result = run("slurm.sbatch", printing_launchers | job, "exp.yaml")
    assert result.returncode == code, result.stderr
    assert ("scontrol requeue 77" in result.stdout) == again
    options = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --open-mode=append" in options
    assert "#SBATCH --requeue" in options


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_torchrun_template_names_what_is_missing(printing_launchers: dict[str, str], missing: str) -> None:
    hosts = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    del hosts[missing]
    result = run("torchrun.sh", printing_launchers | hosts, "exp.yaml")
    assert result.returncode != 0
    assert missing in result.stderr


@pytest.mark.parametrize(("names", "expected"), [("", ["gpu-0", "gpu-1"]), ("iowa-0 oregon-0", ["iowa-0", "oregon-0"])])
def test_slurm_template_starts_one_agent_per_node(
    printing_launchers: dict[str, str], names: str, expected: list[str]
) -> None:
    job = {"SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SKIPPIPE_NODES": names}
    result = run("slurm.sbatch", printing_launchers | job, "exp.yaml", "seed=2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, expected, strict=True):
        assert "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id 77 --rdzv-endpoint gpu-a:29500" in line
        assert f"-m skippipe train --config exp.yaml seed=2 [SKIPPIPE_NODE={name}]" in line


def test_slurm_template_asks_for_one_task_per_node() -> None:
    assert "#SBATCH --ntasks-per-node=1" in (LAUNCH / "slurm.sbatch").read_text()


def test_kubernetes_template() -> None:
    template = string.Template((LAUNCH / "pytorchjob.yaml").read_text())
    values = {"NAME": "run", "IMAGE": "image:1", "WORKERS": "6", "CLAIM": "runs", "CONFIG": "exp.yaml"}
    job = yaml.safe_load(template.substitute(values))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert (job["kind"], replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == ("PyTorchJob", 1, 6)
    for role in ("Master", "Worker"):
        container = replicas[role]["template"]["spec"]["containers"][0]
        assert container["command"] == ["python", "-m", "skippipe", "train", "--config", "exp.yaml"]
        assert container["image"] == "image:1"
