"""What travels between ranks in lower precision: sums stay fp32, replicas stay equal, and the plan knows the bytes."""

import json
from pathlib import Path

import pytest
import torch
from random_plans import random_plan
from ranks import finish_ranks, gradients_of, make_batch, make_config, make_experiment, start_ranks
from safetensors.torch import load_file
from torch import Tensor

from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner_factory import make_runner
from skippipe_scheduler.plan.plan import Plan

WORLD_SIZE = 6
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
RUNS = {
    "fp32": {},
    "gradients": {"comm": {"gradient_dtype": "bfloat16"}},
    "bf16": {"training": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two stages of three replicas, so that a sum has three terms."""
    return random_plan(4, num_nodes=WORLD_SIZE, num_stages=2, route_length=2, num_microbatches=9)


@pytest.fixture(scope="module")
def gradients(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """Return the gradients of every run by rank."""
    folder = tmp_path_factory.mktemp("traffic")
    for name, options in RUNS.items():
        plan.save(folder / f"{name}.plan.json")
        (folder / f"{name}.options.json").write_text(json.dumps(options))
    results = finish_ranks(start_ranks(folder, "gradients", WORLD_SIZE), timeout_s=100)
    assert [code for code, _ in results] == [0] * WORLD_SIZE, results
    return {name: [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(WORLD_SIZE)] for name in RUNS}


def replicas_of(plan: Plan) -> list[list[int]]:
    return [[plan.rank_of[node] for node in stage.nodes] for stage in plan.stages]


@pytest.mark.slow
def test_rounded_sums_are_near_the_exact_ones_and_the_same_everywhere(
    plan: Plan, gradients: dict[str, list[dict[str, Tensor]]]
) -> None:
    assert max(len(ranks) for ranks in replicas_of(plan)) >= 3
    for ranks in replicas_of(plan):
        for name, exact in gradients["fp32"][ranks[0]].items():
            rounded = gradients["gradients"][ranks[0]][name]
            assert not torch.equal(rounded, exact) or len(ranks) == 1 or not exact.any()
            # Each of the terms and the sum is rounded to 8 bits.
            assert float((rounded - exact).abs().max()) <= 2**-7 * float(exact.abs().max())
            for rank in ranks[1:]:
                assert torch.equal(gradients["gradients"][rank][name], rounded)


@pytest.mark.slow
def test_a_run_in_bfloat16_sums_in_fp32(plan: Plan, gradients: dict[str, list[dict[str, Tensor]]]) -> None:
    """One process adds microbatch after microbatch in bfloat16; the ranks round only once for all replicas."""
    local = make_runner(make_experiment(training={"dtype": "bfloat16"}), plan, make_config(plan.num_layers), ALONE)
    expected: dict[str, Tensor] = {}
    local.train_iteration(make_batch, lambda: expected.update(gradients_of(local)))
    for ranks in replicas_of(plan):
        for rank in ranks:
            for name, gradient in gradients["bf16"][rank].items():
                assert gradient.dtype == torch.bfloat16
                difference = (gradient.float() - expected[name].float()).abs().max()
                assert float(difference) <= 2**-5 * float(expected[name].abs().max())


def test_the_plan_counts_the_bytes_that_travel(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").touch()
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"options": options}
    exact = experiment_workload(make_experiment(model=model))
    lighter = experiment_workload(
        make_experiment(model=model, comm={"activation_dtype": "bfloat16", "gradient_dtype": "bfloat16"})
    )
    assert lighter.activation_bytes == exact.activation_bytes // 2
    assert lighter.layer_gradient_bytes == exact.layer_gradient_bytes // 2
    assert lighter.embedding_and_head_gradient_bytes == exact.embedding_and_head_gradient_bytes // 2
    small = experiment_workload(
        make_experiment(model=model, comm={"activation_compression": "int8", "gradient_compression": "int8"})
    )
    assert small.activation_bytes == 2 * 8 * (32 + 4)  # a byte each, and a scale for each token
    assert small.layer_gradient_bytes == pytest.approx(
        exact.layer_gradient_bytes / 4 * (1 + 4 / 1024), rel=0.06
    )  # the last block is whole
    assert small.layer_state_bytes == exact.layer_state_bytes + exact.layer_gradient_bytes  # what sums left out
    factors = make_experiment(
        model=model, comm={"gradient_compression": "powersgd", "powersgd": {"rank": 1}, "error_feedback": False}
    )
    # Four 32x32 matrices of attention, three 32x48 of the FFN, two norms.
    assert experiment_workload(factors).layer_gradient_bytes == 4 * (4 * 64 + 3 * 80 + 2 * 32)
    assert lighter.layer_resident_bytes == exact.layer_resident_bytes
    assert lighter.layer_state_bytes == exact.layer_state_bytes
