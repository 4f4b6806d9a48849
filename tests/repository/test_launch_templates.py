"""Every launch template, rendered: the shell scripts really run, with the launcher replaced by one that prints."""

import os
import string
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOB = {"SLURM_JOB_NODELIST": "gpu-a,gpu-b", "SLURM_JOB_ID": "77", "MAX_RESTARTS": "1"}


@pytest.fixture
def printing_launchers(tmp_path: Path) -> dict[str, str]:
    """An environment in which ranks print their arguments and end with CODE, under a SLURM job on HOSTS_LEFT."""
    programs = {
        "python": 'echo "$* [RANK=${RANK:-}/${WORLD_SIZE:-} ${MASTER_ADDR:-}:${MASTER_PORT:-} ${SKIPPIPE_NODE:-}]"\n'
        'exit "${CODE:-0}"',
        "squeue": 'echo "${HOSTS_LEFT-gpu-a,gpu-b}"',
        "scontrol": 'if [ "$1" = show ]; then tr , "\\n" <<< "$3"; else echo "scontrol $*"; fi',
        "srun": 'while [[ "$1" == --* ]]; do case "$1" in --overlap) shift ;; *) shift 2 ;; esac; done; exec "$@"',
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


@pytest.mark.parametrize("command", ["profile", "generate", "evaluate", "collect"])
def test_torchrun_template_starts_any_command(printing_launchers: dict[str, str], command: str) -> None:
    hosts = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    result = run("torchrun.sh", printing_launchers | hosts, command, "runs/one")
    assert f"-m skippipe {command} runs/one" in result.stdout, result.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_the_templates_run_any_command(printing_launchers: dict[str, str], script: str) -> None:
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    result = run(script, printing_launchers | place | JOB, "profile", "--out", "a file.yaml")
    assert result.returncode == 0, result.stderr
    assert "-m skippipe profile --out a file.yaml" in result.stdout


@pytest.mark.parametrize(
    ("code", "left", "starts", "again"),
    [
        (0, "gpu-a,gpu-b", 1, False),
        (1, "gpu-a,gpu-b", 2, False),
        (2, "gpu-a,gpu-b", 1, False),
        (75, "gpu-a,gpu-b", 1, True),
        (0, "gpu-a", 1, False),
        (1, "gpu-a", 1, True),
        (137, "gpu-a", 2, True),
    ],
)
def test_the_slurm_template_starts_ranks_again_or_queues_the_job(
    printing_launchers: dict[str, str], code: int, left: str, starts: int, again: bool
) -> None:
    result = run("slurm.sbatch", printing_launchers | JOB | {"CODE": str(code), "HOSTS_LEFT": left}, "exp.yaml")
    assert result.returncode == code, result.stderr
    assert result.stdout.count("RANK=0/2") == starts
    assert ("scontrol requeue 77" in result.stdout) == again
    options = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert {"#SBATCH --open-mode=append", "#SBATCH --requeue", "#SBATCH --no-kill"} <= {*options}


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_torchrun_template_names_what_is_missing(printing_launchers: dict[str, str], missing: str) -> None:
    hosts = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "host0"}
    del hosts[missing]
    result = run("torchrun.sh", printing_launchers | hosts, "exp.yaml")
    assert result.returncode != 0
    assert missing in result.stderr


@pytest.mark.parametrize(("names", "expected"), [("", ["gpu-a", "gpu-b"]), ("iowa-0 oregon-0", ["iowa-0", "oregon-0"])])
def test_slurm_template_starts_one_rank_per_node(
    printing_launchers: dict[str, str], names: str, expected: list[str]
) -> None:
    result = run("slurm.sbatch", printing_launchers | JOB | {"SKIPPIPE_NODES": names}, "exp.yaml", "seed=2")
    assert result.returncode == 0, result.stderr
    line = "-m skippipe train --config exp.yaml seed=2"
    wanted = [f"{line} [RANK={rank}/2 gpu-a:29500 {name}]" for rank, name in enumerate(expected)]
    assert sorted(result.stdout.splitlines()) == wanted


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


def test_stateful_set_gives_each_rank_a_name_and_a_volume() -> None:
    text = (LAUNCH / "statefulset.yaml").read_text()
    for name, value in {"NAME": "run", "IMAGE": "image:1", "NODES": "3"}.items():
        text = text.replace(f"${{{name}}}", value)
    service, policy, stateful_set = yaml.safe_load_all(text)
    spec = stateful_set["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert (spec["replicas"], spec["serviceName"], spec["podManagementPolicy"]) == (
        3,
        service["metadata"]["name"],
        "Parallel",
    )
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    (training,) = spec["template"]["spec"]["initContainers"]
    (after,) = spec["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in training["env"]}
    assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("3", "run-0.run")
    assert training["env"] == after["env"]
    assert training["command"][:4] == ["python", "-m", "skippipe", "train"]
    (claim,) = spec["volumeClaimTemplates"]
    mounted = [mount["name"] for mount in training["volumeMounts"] if mount["mountPath"] == training["workingDir"]]
    assert mounted == [claim["metadata"]["name"]]


SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {},
            "-m skippipe.cli.agent --nnodes 3 --nproc-per-node 1 --node-rank 1 --master-addr 10.0.0.1 "
            "--master-port 29500 --max-restarts 3 --shutdown-timeout 100 -m skippipe train "
            "--config configs/experiments/three-regions.yaml seed=2",
        ),
        ({"JOIN": "10.0.0.1:40123"}, "-m skippipe join 10.0.0.1:40123 seed=2"),
    ],
)
def test_skypilot_template(printing_launchers: dict[str, str], given: dict[str, str], expected: str) -> None:
    place = {"SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3"}
    result = subprocess.run(
        ["bash", "-c", SKYPILOT["run"]],
        cwd=ROOT,
        env=printing_launchers | SKYPILOT["envs"] | place | {"OVERRIDES": "seed=2"} | given,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{expected} [")


@pytest.mark.extended
def test_skypilot_reads_its_template() -> None:
    task = pytest.importorskip("sky").Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert task.envs == SKYPILOT["envs"]
    (resources,) = task.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
