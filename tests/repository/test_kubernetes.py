"""The Kubernetes templates: against the schemas of Kubernetes, and as processes that are started as a kubelet does.

Left out unless asked for:

    pip install kubernetes-validate
    pytest -n 0 -m extended tests/repository/test_kubernetes.py
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import free_port
from training_runs import CLUSTER, make_experiment

from skippipe.config.experiment_file import save_experiment
from skippipe.monitor.run_events import read_changes

LAUNCH = Path(__file__).parents[2] / "launch"
PODS = 3
LIMIT_S = 150
pytestmark = [pytest.mark.extended, pytest.mark.slow, pytest.mark.timeout(600)]


def rendered(name: str, **values: str) -> list[dict[str, Any]]:
    """Return the objects of a template, filled in as envsubst does."""
    return list(yaml.safe_load_all(re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], (LAUNCH / name).read_text())))


def objects() -> Iterator[dict[str, Any]]:
    """Give all objects of Kubernetes itself, and what a PyTorchJob starts as pods."""
    yield from rendered("statefulset.yaml", NAME="run", IMAGE="image:1", NODES=str(PODS))
    (job,) = rendered("pytorchjob.yaml", NAME="run", IMAGE="image:1", WORKERS="2", CLAIM="runs", CONFIG="exp.yaml")
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replicas["template"]["spec"] | {"restartPolicy": replicas["restartPolicy"]}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}


@pytest.mark.parametrize("version", ["1.28", "1.34"])
def test_the_templates_follow_the_schemas(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    kinds = []
    for each in objects():
        validate(each, version, strict=True)
        kinds.append(each["kind"])
    assert kinds == ["Service", "NetworkPolicy", "StatefulSet", "Pod", "Pod"]


class Pods:
    """The pods of the StatefulSet as processes on this machine, each in a volume of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._port = free_port()
        (stateful_set,) = (
            each
            for each in rendered("statefulset.yaml", NAME="run", IMAGE="image:1", NODES=str(PODS))
            if each["kind"] == "StatefulSet"
        )
        (self._container,) = stateful_set["spec"]["template"]["spec"]["initContainers"]
        self.experiment = make_experiment(
            folder,
            run_dir="runs/run",
            pipeline={"num_stages": 2, "skip_ratio": 0.0},
            training={"max_steps": 100_000},
            checkpoint={"interval": 20},
            evaluation={"interval": 0},
            recovery={"enabled": "auto", "copy_interval": 1, "silence_s": 5},
        )
        (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {PODS}"))
        save_experiment(self.experiment, folder / "experiment.yaml")
        self._running = [self._started(index) for index in range(PODS)]

    def run_dir(self, index: int) -> Path:
        """Return the run directory in a pod's volume."""
        return self._volume(index) / "runs" / "run"

    def die(self, index: int, *, with_volume: bool = False) -> None:
        """Kill the process of a pod, and start it again; with an empty volume if its own is lost, too."""
        self._running[index].kill()
        self._running[index].wait()
        if with_volume:
            shutil.rmtree(self._volume(index))
        self._running[index] = self._started(index)

    def stop(self) -> list[int]:
        """Send the signal of a deletion to one pod; return how the processes of all end."""
        self._running[1].send_signal(signal.SIGTERM)
        return self.ends()

    def ends(self) -> list[int]:
        """Wait for the end of all processes."""
        return [process.wait(LIMIT_S) for process in self._running]

    def start_again(self) -> None:
        """Start the processes of all pods."""
        self._running = [self._started(index) for index in range(PODS)]

    def wait(self, reached: Callable[[], bool]) -> None:
        """Wait until something is reached."""
        deadline_s = time.monotonic() + LIMIT_S
        while not reached():
            assert time.monotonic() < deadline_s, [path.read_text()[-2000:] for path in self._folder.glob("*.log")]
            time.sleep(0.1)

    def steps(self) -> int:
        """Return how many steps are recorded in all volumes together."""
        paths = [self.run_dir(index) / "metrics.jsonl" for index in range(PODS)]
        return sum(path.read_text().count("\n") for path in paths if path.exists())

    def wait_for_steps(self) -> None:
        """Wait for some more steps."""
        wanted = self.steps() + 20
        self.wait(lambda: self.steps() >= wanted)

    def wait_until_in(self, node: str, times: int = 1) -> None:
        """Wait until a node has come into the run again."""
        volumes = [self.run_dir(index) for index in range(PODS)]
        self.wait(lambda: sum(node in change.joined for each in volumes for change in read_changes(each)) >= times)

    def _volume(self, index: int) -> Path:
        return self._folder / f"volume-{index}"

    def _started(self, index: int) -> subprocess.Popen[bytes]:
        volume = self._volume(index)
        volume.mkdir(exist_ok=True)
        own = {each["name"]: self._value(each, index) for each in self._container["env"]}
        with (self._folder / f"pod-{index}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *self._here(self._container["command"][1:])],
                cwd=volume,
                env=os.environ | own | {"SKIPPIPE_SECRET": "0123456789abcdef"},
                stdout=log,
                stderr=log,
            )
        self._stack.callback(process.kill)
        return process

    def _value(self, variable: Mapping[str, Any], index: int) -> str:
        if variable["name"] == "RANK":
            field = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert field == "metadata.labels['apps.kubernetes.io/pod-index']"
            return str(index)
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port)}
        value = str(variable["value"])
        return here.get(variable["name"], re.sub("^/workspace", str(self._volume(index)), value))

    def _here(self, words: Sequence[str]) -> list[str]:
        return [word.replace("/config/", f"{self._folder}/") for word in words]


def test_pods_come_back_into_the_run_with_or_without_their_volume(tmp_path: Path) -> None:
    with ExitStack() as stack:
        pods = Pods(tmp_path, stack)
        pods.wait_for_steps()
        pods.die(0)
        pods.wait_until_in("node-0")
        pods.die(2, with_volume=True)
        pods.wait_until_in("node-2")
        pods.wait_for_steps()
        assert pods.stop() == [75] * PODS
        training = pods.experiment.training.model_copy(update={"max_steps": pods.steps() + 20})
        save_experiment(pods.experiment.model_copy(update={"training": training}), tmp_path / "experiment.yaml")
        pods.start_again()
        assert pods.ends() == [0] * PODS
        logs = [(tmp_path / f"pod-{index}.log").read_text() for index in range(PODS)]
        assert any("continuing after step" in log for log in logs)
        assert not any("Traceback" in log for log in logs)
