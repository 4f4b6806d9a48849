"""Every optimizer back-end gives the weights of plain AdamW with an all-reduce, and takes up what another one saved."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from random_plans import random_plan
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.cpp_extension import _get_build_directory
from training_runs import losses, make_experiment, train_alone

from skippipe.checkpoint.reader import checkpoint_path, read_metadata
from skippipe.config.experiment_file import save_experiment
from skippipe.training.optimizer.deepspeed_setup import OPERATOR

WORLD_SIZE = 5
CHAINS = {
    "float32": ("deepspeed_zero1", "zero_redundancy", "deepspeed_zero2"),
    "bfloat16": ("deepspeed_zero2", "deepspeed_zero1"),
}
"""Back-ends that train one after another, each from what the one before saved."""
OPERATOR_FILE = Path(_get_build_directory(OPERATOR, False)) / f"{OPERATOR}.so"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


def make_cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for dtype in ("float32", "bfloat16"):
        cases[dtype] = {"plan": "two", "dtype": dtype}
        chain = [{"backend": backend} for backend in CHAINS[dtype]]
        cases[f"{dtype}-chain"] = {"plan": "two", "dtype": dtype, "chain": chain}
    cases["float32-fused"] = {"plan": "two", "optimizer": {"fused": True}}
    cases["three"] = {"plan": "three"}
    cases["three-zero2"] = {"plan": "three", "optimizer": {"backend": "deepspeed_zero2"}}
    if OPERATOR_FILE.exists():
        offloaded = [{"backend": f"deepspeed_{stage}", "offload": True} for stage in ("zero2", "zero1")]
        cases["float32-offload"] = {"plan": "two", "chain": offloaded}
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of all cases, and a run of the training loop under DeepSpeed."""
    path = tmp_path_factory.mktemp("backends")
    plans = {
        "two": random_plan(7, num_nodes=WORLD_SIZE, num_stages=3, route_length=2, num_microbatches=5),
        "three": random_plan(6, num_nodes=WORLD_SIZE, num_stages=2, route_length=2, num_microbatches=5),
    }
    visits = {
        name: [
            [sum(node in microbatch.route for microbatch in plan.microbatches) for node in stage.nodes]
            for stage in plan.stages
        ]
        for name, plan in plans.items()
    }
    # Uneven numbers, none at all, a stage with one replica, and one with three.
    assert visits == {"two": [[4, 1], [3], [2, 0]], "three": [[0, 3, 2], [3, 2]]}
    for name, plan in plans.items():
        plan.save(path / f"{name}.plan.json")
    (path / "cases.json").write_text(json.dumps(make_cases()))
    save_experiment(loop_experiment(path, "loop", {"backend": "deepspeed_zero2"}), path / "experiment.yaml")
    tests = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "optimizer_ranks.py"), str(path), str(WORLD_SIZE)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=160,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return path


def loop_experiment(folder: Path, name: str, optimizer: dict[str, Any], **checkpoint: object) -> Any:
    model = {"options": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}}
    training = {"max_steps": 4, "num_microbatches": 5}
    return make_experiment(
        folder, name, model=model, training=training, optimizer=optimizer, checkpoint={"interval": 2} | checkpoint
    )


def parameters(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(WORLD_SIZE)]


def saved_state(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}.state.{rank}.safetensors") for rank in range(WORLD_SIZE)]


def largest_difference(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> float:
    assert [state.keys() for state in some] == [other.keys() for other in others]
    return max(
        float((state[name].float() - other[name].float()).abs().max())
        for state, other in zip(some, others, strict=True)
        for name in state
    )


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("float32-chain", "float32"),
        ("bfloat16-chain", "bfloat16"),
        ("three-zero2", "three"),
    ],
)
def test_weights_are_those_of_plain_adamw(folder: Path, name: str, reference: str) -> None:
    assert largest_difference(parameters(folder, name), parameters(folder, reference)) == 0
    for rank in range(WORLD_SIZE):
        norms, expected = (json.loads((folder / f"{case}.{rank}.json").read_text()) for case in (name, reference))
        assert min(expected) > 0.5  # clipping acted
        assert norms == pytest.approx(expected, rel=1e-12)


def test_fused_weights_differ_by_rounding_only(folder: Path) -> None:
    assert 0 < largest_difference(parameters(folder, "float32-fused"), parameters(folder, "float32")) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_shared_out_and_complete(folder: Path, dtype: str) -> None:
    whole: dict[str, Tensor] = {}
    for part in saved_state(folder, f"{dtype}.0"):
        whole |= part
    parts = saved_state(folder, f"{dtype}-chain.{len(CHAINS[dtype]) - 1}")
    merged: dict[str, Tensor] = {}
    for part in parts:
        assert not merged.keys() & part.keys()
        merged |= part
    assert merged.keys() == whole.keys()
    assert any(name.endswith(".master") for name in whole) == (dtype == "bfloat16")
    for name, tensor in whole.items():
        assert merged[name].equal(tensor), name
    assert sum(bool(part) for part in parts) >= 4  # both replicas of both stages have some


@pytest.mark.skipif(not OPERATOR_FILE.exists(), reason="DeepSpeed's cpu_adam was never compiled here; it takes minutes")
def test_offloaded_weights_are_near(folder: Path) -> None:
    assert largest_difference(parameters(folder, "float32-offload"), parameters(folder, "float32")) < 1e-5


def test_one_process_continues_a_run_of_deepspeed(folder: Path) -> None:
    checkpoint = checkpoint_path(folder / "loop", 2)
    assert sum(name.startswith("optimizer-") for name in read_metadata(checkpoint).files) == WORLD_SIZE
    alone = loop_experiment(folder, "alone", {}, resume=str(checkpoint))
    plan = random_plan(7, num_nodes=WORLD_SIZE, num_stages=3, route_length=2, num_microbatches=5)
    summary = train_alone(alone, plan)
    assert (summary.first_step, summary.step) == (2, 4)
    assert summary.loss == pytest.approx(losses(folder / "loop")[-1], abs=1e-5)
