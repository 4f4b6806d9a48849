"""What is checked before the first step, and what the devices' peak is taken to be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from random_plans import random_plan
from training_runs import ALONE, MODEL_OPTIONS, make_experiment, small_plan, train_alone, write_inputs

from skippipe.cli.main import main
from skippipe.config.experiment import Experiment
from skippipe.config.recipe_options import RecipeOptions
from skippipe.errors import ConfigError, DataError
from skippipe.model.architecture import experiment_model
from skippipe.model.cost import model_cost
from skippipe.monitor.metrics_file import read_metrics
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.training.measurement.utilisation import IterationFlop, utilisation
from skippipe.training.startup import (
    _check_agreement,
    _check_tokens,
    _peak,
    agreed_settings,
    changed_settings,
    check_start,
    check_torch,
    torch_requirement,
    trained_settings,
)


def report(experiment: Experiment, **changes: Any) -> dict[str, Any]:
    settings = agreed_settings(experiment)
    return {
        "skippipe": "0.3.0",
        "torch": "2.13.0",
        "device": "cpu",
        "identity": "a/cpu",
        "peak": None,
        "settings": settings,
    } | changes


def with_peaks(experiment: Experiment, *peaks: float | None) -> None:
    """Let the cluster file state peaks."""
    path = Path(experiment.cluster)
    content = yaml.safe_load(path.read_text())
    node = {"region": "here", "compute_tflop_per_s": 0.05, "memory_gib": 4}
    stated = [{} if peak is None else {"peak_tflop_per_s": peak} for peak in peaks]
    content["nodes"] = [node | {"name": f"node-{index}"} | facts for index, facts in enumerate(stated)]
    path.write_text(yaml.safe_dump(content))


def test_torch_outside_the_range() -> None:
    check_torch(torch.__version__, torch_requirement())
    with pytest.raises(ConfigError, match=r"torch 2\.14\.0\+cu130 is installed, .* pip install 'torch<2\.14,>=2\.11'"):
        check_torch("2.14.0+cu130", Requirement("torch>=2.11,<2.14"))


def test_ranks_must_agree(tmp_path: Path) -> None:
    one = make_experiment(tmp_path)
    other = make_experiment(tmp_path, training={"micro_batch_size": 3})
    threads = make_experiment(tmp_path, training={"threads": 2})
    _check_agreement([report(one), report(threads)])
    with pytest.raises(ConfigError, match=r"training\.micro_batch_size is 3 on rank 1 and 2 on rank 0; start every"):
        _check_agreement([report(one), report(other)])
    with pytest.raises(ConfigError, match=r"rank 2 has torch 2\.12\.0, rank 0 has 2\.13\.0; install the same"):
        _check_agreement([report(one), report(one), report(one, torch="2.12.0")])
    with pytest.raises(ConfigError, match=r"rank 1 has skippipe 0\.2\.0, rank 0 has 0\.3\.0; install the same"):
        _check_agreement([report(one), report(one, skippipe="0.2.0")])


def test_what_validation_and_checkpoints_make_all_ranks_do_is_agreed_on(tmp_path: Path) -> None:
    often = {"interval": 5}
    for section, other in {
        "checkpoint": make_experiment(tmp_path, checkpoint=often),
        "evaluation": make_experiment(tmp_path, evaluation=often),
    }.items():
        with pytest.raises(ConfigError, match=rf"{section}\.interval is 5 on rank 1 and"):
            _check_agreement([report(make_experiment(tmp_path)), report(other)])


def test_settings_that_are_not_those_of_a_checkpoint_are_said(tmp_path: Path) -> None:
    before = json.loads(json.dumps(trained_settings(make_experiment(tmp_path))))
    assert changed_settings(before, trained_settings(make_experiment(tmp_path))) == ""
    elsewhere: dict[str, Any] = {
        "run_dir": str(tmp_path),
        "checkpoint": {"resume": "never"},
        "training": {"threads": 2},
    }
    assert changed_settings(before, trained_settings(make_experiment(tmp_path, **elsewhere))) == ""
    sections: dict[str, Any] = {
        "optimizer": {"lr": 1e-3},
        "pipeline": {"max_swaps": 1, "route_lengths": {3: 1, 2: 2}},
        "evaluation": {"batches": 3},
        "model": {"options": MODEL_OPTIONS | {"hidden_act": "gelu\x1b" + "u" * 100}},
    }
    now = trained_settings(make_experiment(tmp_path, **sections))
    assert changed_settings(before, now) == (
        'model.options.hidden_act "gelu\\u001b' + "u" * 69 + "... (before: null), "
        "pipeline.route_lengths.3 1 (before: null), pipeline.route_lengths.2 2 (before: null), "
        "pipeline.max_swaps 1 (before: 0), optimizer.lr 0.001 (before: 0.003), evaluation.batches 3 (before: 1)"
    )
    assert changed_settings(now, before).startswith("pipeline.max_swaps 0 (before: 1), optimizer.lr 0.003")
    newer = now | {"skippipe": "99", "optimizer.lr": 0.003}
    assert changed_settings({"optimizer.lr": 0.003, "skippipe": "0.1"}, newer) == "skippipe 99 (before: 0.1)"
    assert changed_settings({}, now) == ""


def test_ranks_must_have_the_same_text_unless_each_has_its_own() -> None:
    own = {"fingerprint": "a", "tokens": 4000, "tokenizer": "bytes", "is_same": True}
    other = own | {"fingerprint": "b", "tokens": 4100}
    _check_tokens([own, own])
    with pytest.raises(
        DataError, match=r"rank 2 has 4,100 tokens \(b\), rank 0 has 4,000 \(a\); give every host the same"
    ):
        _check_tokens([own, own, other])
    apart = {"is_same": False}
    _check_tokens([own | apart, None, other | apart])
    with pytest.raises(DataError, match="rank 1 has another tokenizer than rank 0"):
        _check_tokens([own | apart, other | apart | {"tokenizer": "words"}])
    with pytest.raises(DataError, match=r"data\.same_on_all_hosts: ranks 1 and 2 differ"):
        _check_tokens([None, own | apart, own])


def test_peak_of_all_devices(tmp_path: Path) -> None:
    experiment, plan = make_experiment(tmp_path), small_plan()
    gpus = [report(experiment, identity=f"a/{index // 2}", peak=100.0) for index in range(4)]
    assert _peak(experiment, plan, gpus) == 200.0  # two GPUs, shared by two ranks each
    assert _peak(experiment, plan, [*gpus[:3], report(experiment)]) is None
    with_peaks(experiment, 1.0, 2.0, 3.0, 4.0)
    assert _peak(experiment, plan, [report(experiment)] * 4) == 10.0
    assert _peak(experiment, plan, gpus) == 10.0  # what the cluster file says wins
    assert _peak(experiment, plan, [report(experiment)]) is None  # one process is no node of the cluster
    with_peaks(experiment, 1.0, 2.0, None, 4.0)
    assert _peak(experiment, plan, [report(experiment)] * 4) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = make_experiment(tmp_path, training={"device": "cuda"})
    with pytest.raises(SystemExit) as stop:
        main(["train", *write_inputs(experiment, small_plan(), tmp_path)])
    assert stop.value.code == 2
    assert "device cuda: this process sees no CUDA device" in capsys.readouterr().err
    assert not experiment.run_path.exists()


def test_a_cpu_without_bfloat16_is_only_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True})
    hardware = check_start(make_experiment(tmp_path, training={"dtype": "bfloat16"}), small_plan(), ALONE)
    assert "training.dtype: this CPU has no instructions for bfloat16" in caplog.text
    assert hardware == ("cpu", None, ("cpu",))


def test_flop_are_those_of_the_visited_layers(tmp_path: Path) -> None:
    config = experiment_model(make_experiment(tmp_path))
    cost = model_cost(config, 2, 16, torch.float32)
    for length in (2, 3):
        plan = random_plan(5, num_nodes=4, num_stages=3, route_length=length, num_microbatches=4, layers_per_stage=2)
        layers = 4 * length * 2
        flop = 3 * layers * cost.layer_forward_flop + 4 * cost.loss_flop
        assert IterationFlop(cost).of(plan) == pytest.approx(flop)
    assert utilisation(3e12, 1.5, None) == {"perf/tflop_per_s": 2.0}
    assert utilisation(3e12, 1.5, 8.0) == {"perf/tflop_per_s": 2.0, "perf/mfu": 0.25}


def test_flop_leave_out_what_dropout_leaves_out_on_average(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    cost = model_cost(experiment_model(experiment), 2, 16, torch.float32)
    plan = random_plan(5, num_nodes=4, num_stages=3, route_length=3, num_microbatches=4, layers_per_stage=2)
    assert plan.num_layers == cost.num_layers == 6
    recipe = RecipeOptions.model_validate(
        {
            "layer_dropout": {"probability": 0.5, "over_depth": "linear", "over_steps": "falling"},
            "ffn_dropout": {"probability": 0.25, "over_depth": "uniform"},
        }
    )
    without_ffn = 1 - 0.25 * cost.ffn_share
    for step, mean in ((0, 0.75), (10, 0.875), (20, 1.0)):
        flop = 3 * 4 * 6 * mean * without_ffn * cost.layer_forward_flop + 4 * cost.loss_flop
        assert IterationFlop(cost, recipe, 21).of(plan, step) == pytest.approx(flop)
    planned = experiment_workload(experiment.model_copy(update={"recipe": recipe}))
    assert planned.layer_forward_flop == pytest.approx(0.875 * without_ffn * cost.layer_forward_flop)


def test_a_run_says_what_it_computes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = make_experiment(tmp_path, training={"max_steps": 2})
    train_alone(experiment)
    assert "computing on cpu in float32, attention sdpa" in capsys.readouterr().out
    for entry in read_metrics(experiment.run_path / "metrics.jsonl"):
        flop = entry["perf/tflop_per_s"] * entry["perf/iteration_s"] * 1e12
        cost = model_cost(experiment_model(experiment), 2, 16, torch.float32)
        assert flop == pytest.approx(IterationFlop(cost).of(small_plan()))
        assert "perf/mfu" not in entry
