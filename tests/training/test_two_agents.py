"""Two `torchrun` agents, as on two hosts: the launch template with fixed node ranks, and c10d with named nodes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from processes import finish, free_port
from random_plans import random_plan
from training_runs import losses, make_experiment, train_alone, write_inputs

from skippipe.errors import ConfigError
from skippipe.runtime.ranks.context import DistributedContext
from skippipe_scheduler.plan.plan import Plan

TEMPLATE = Path(__file__).parents[2] / "launch" / "torchrun.sh"
AGENTS = 2
STEPS = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


def two_node_plan() -> Plan:
    return random_plan(5, num_nodes=AGENTS, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=3)


def start_agent(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        env=os.environ | {"PATH": programs} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_agents(agents: Sequence[subprocess.Popen[str]]) -> str:
    """Wait for both; return what they printed."""
    results = [finish(agent) for agent in agents]
    assert [code for code, _ in results] == [0] * AGENTS, results
    return "".join(output for _, output in results)


def kill_a_rank(agent: subprocess.Popen[str], metrics: Path, after_step: int) -> None:
    """Kill one of the agent's ranks once some steps are done."""
    while not metrics.exists() or metrics.read_text().count("\n") < after_step:
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.005)
    psutil.Process(agent.pid).children()[0].send_signal(signal.SIGKILL)


def test_launch_template_on_two_hosts(tmp_path: Path) -> None:
    """The rank of the second host is killed on the way; the agents start all again, and the run goes on."""
    plan = two_node_plan()
    longer = {"max_steps": 4 * STEPS}
    train_alone(make_experiment(tmp_path, "alone", training=longer), plan)
    _, config, *with_plan = write_inputs(make_experiment(tmp_path, "hosts", training=longer), plan, tmp_path)
    hosts = {"NNODES": str(AGENTS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    agents = [
        start_agent(["bash", str(TEMPLATE), config, *with_plan], NODE_RANK=str(rank), **hosts) for rank in range(AGENTS)
    ]
    kill_a_rank(agents[1], tmp_path / "hosts" / "metrics.jsonl", after_step=STEPS)
    assert "continuing after step" in finish_agents(agents)
    assert len(losses(tmp_path / "hosts")) == 4 * STEPS
    assert losses(tmp_path / "hosts") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def c10d_agent(arguments: Sequence[str], endpoint: str, extra: Mapping[str, str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={AGENTS}", "--nproc-per-node=1"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint={endpoint}"]
    return start_agent([*launcher, *rendezvous, "-m", "skippipe", "train", *arguments], **extra)


def test_c10d_agents_take_the_node_they_are_named_after(tmp_path: Path) -> None:
    """The agent that starts first is the second node."""
    plan = two_node_plan()
    train_alone(make_experiment(tmp_path, "alone"), plan)
    arguments = write_inputs(make_experiment(tmp_path, "named"), plan, tmp_path)
    endpoint = f"127.0.0.1:{free_port()}"
    finish_agents([c10d_agent(arguments, endpoint, {"SKIPPIPE_NODE": plan.nodes[name]}) for name in (1, 0)])
    assert losses(tmp_path / "named") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def test_a_name_that_is_not_in_the_plan_is_refused() -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "SKIPPIPE_NODE": "tokyo"}
    with pytest.raises(ConfigError, match="the cluster has no node 'tokyo'; it has node-0, node-1"):
        DistributedContext.from_environment(1.0, place, two_node_plan().nodes)
