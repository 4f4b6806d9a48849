"""Learning rate, decay, master copies and state of AdamW."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe.config.experiment import OptimizerOptions, SchedulerOptions
from skippipe.errors import CheckpointError
from skippipe.training.optimizer import AdamW, learning_rate_factor
from skippipe.training.optimizer.settings import new_state
from skippipe.training.optimizer.zero import DeepSpeedZero

NO_WARMUP = SchedulerOptions(warmup_steps=0, min_lr_ratio=1.0)


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (4, 3), "vector": (5,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def gradients(step: int, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, parameter in parameters.items()
    }


def run(optimizer: AdamW, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, gradient in gradients(step, parameters).items():
            parameters[name].grad = gradient
        optimizer.step()


def test_schedule_is_a_line_then_a_cosine() -> None:
    options = SchedulerOptions(warmup_steps=4, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, 14, options) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[8] == pytest.approx(0.55)  # half of the cosine: the mean of peak and minimum
    assert factors[13] == pytest.approx(0.1)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / 10)) for done in range(1, 11)]
    assert factors[4:] == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "max_steps"), [(0, 1), (5, 5), (9, 5)])
def test_schedule_has_no_division_by_zero(warmup: int, max_steps: int) -> None:
    options = SchedulerOptions(warmup_steps=warmup, min_lr_ratio=0.0)
    factors = [learning_rate_factor(step, max_steps, options) for step in range(max_steps)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)


def test_optimizer_uses_the_schedule() -> None:
    parameters = make_parameters()
    schedule = SchedulerOptions(warmup_steps=3)
    optimizer = AdamW(parameters, OptimizerOptions(lr=0.5), schedule, max_steps=6)
    seen = []
    for step in range(6):
        seen.append(optimizer.lr)
        run(optimizer, parameters, range(step, step + 1))
    assert seen == pytest.approx([0.5 * learning_rate_factor(step, 6, schedule) for step in range(6)])


def test_first_step_is_adamw_by_hand() -> None:
    parameters = make_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    options = OptimizerOptions(lr=0.01, weight_decay=0.2)
    run(AdamW(parameters, options, NO_WARMUP, max_steps=10), parameters, range(1))
    for name, gradient in gradients(0, parameters).items():
        decay = 1 - 0.01 * 0.2 if name == "matrix" else 1.0
        # After one step both corrected moments are the gradient itself, and its square.
        expected = before[name] * decay - 0.01 * gradient / (gradient.abs() + options.eps)
        torch.testing.assert_close(parameters[name].detach(), expected)


def test_single_parameters_can_have_a_higher_rate() -> None:
    moved = []
    for scale in (1.0, 2.0):
        parameters = make_parameters()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer = AdamW(parameters, OptimizerOptions(lr=0.1), SchedulerOptions(warmup_steps=1), max_steps=6)
        first, *others = parameters
        state = optimizer.state([]) | {f"{first}.lr_scale": torch.tensor(scale)} if scale > 1 else {}
        optimizer.load(state, 0)
        run(optimizer, parameters, range(1))
        moved.append({name: parameter.detach() - before[name] for name, parameter in parameters.items()})
        kept = optimizer.state(parameters)
        assert [name for name in parameters if f"{name}.lr_scale" in kept] == ([first] if scale > 1 else [])
    assert torch.allclose(moved[1][first], 2 * moved[0][first], atol=1e-6)
    assert all(torch.equal(moved[1][name], moved[0][name]) for name in others)


def test_parameters_without_moments_go_on_at_a_later_step() -> None:
    fresh, later = make_parameters(), make_parameters()
    options = OptimizerOptions(lr=0.01)
    run(AdamW(fresh, options, NO_WARMUP, max_steps=9), fresh, range(1))
    optimizer = AdamW(later, options, NO_WARMUP, max_steps=9)
    optimizer.load(new_state(later), step=5)
    run(optimizer, later, range(1))
    assert all(torch.equal(fresh[name], later[name]) for name in fresh)


def test_learning_rate_is_the_runs_where_all_parameters_have_a_higher_one() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, OptimizerOptions(lr=0.1), SchedulerOptions(warmup_steps=4), max_steps=6)
    optimizer.load({f"{name}.lr_scale": torch.tensor(1.1) for name in parameters}, 0)
    assert optimizer.lr == pytest.approx(0.025)
    run(optimizer, parameters, range(1))
    assert optimizer.lr == pytest.approx(0.05)
    state = {name: tensor.clone() for name, tensor in optimizer.state(parameters).items()}
    optimizer.load(state, 3)
    assert optimizer.lr == pytest.approx(0.1)


def test_deepspeed_refuses_a_parameter_with_a_rate_of_its_own() -> None:
    options = OptimizerOptions(backend="deepspeed_zero1")
    alone: Any = None
    optimizer = DeepSpeedZero(make_parameters(), options, NO_WARMUP, 3, replicas=alone, guard=alone)
    with pytest.raises(
        CheckpointError, match=r"vector\.lr_scale: this stage was rebuilt .* 1\.1, which deepspeed_zero1"
    ):
        optimizer.load({"vector.lr_scale": torch.tensor(1.1)}, step=0)


def test_master_copies_collect_what_bfloat16_cannot_hold() -> None:
    small, steps = 1e-4, 60
    parameters = {"matrix": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}
    options = OptimizerOptions(lr=small, weight_decay=0.0)
    optimizer = AdamW(parameters, options, NO_WARMUP, max_steps=steps)
    for _ in range(steps):
        parameters["matrix"].grad = torch.ones(2, 2, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(torch.ones(1, dtype=torch.bfloat16) - small, torch.ones(1, dtype=torch.bfloat16))
    torch.testing.assert_close(optimizer.state(["matrix"])["matrix.master"], torch.full((2, 2), 1 - small * steps))
    assert float(parameters["matrix"].detach()[0, 0]) == pytest.approx(1 - small * steps, abs=0.004)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_optimizer_continues_bitwise(dtype: torch.dtype) -> None:
    options, schedule = OptimizerOptions(lr=0.05), SchedulerOptions(warmup_steps=2)
    parameters = make_parameters(dtype)
    optimizer = AdamW(parameters, options, schedule, max_steps=9)
    run(optimizer, parameters, range(4))
    state = {name: tensor.clone() for name, tensor in optimizer.state(parameters).items()}
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    other = AdamW(resumed, options, schedule, max_steps=9)
    other.load(state, step=4)
    assert other.lr == optimizer.lr
    run(optimizer, parameters, range(4, 9))
    run(other, resumed, range(4, 9))
    for name, parameter in parameters.items():
        assert torch.equal(parameter, resumed[name])


def test_missing_or_misshapen_state_is_named() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, OptimizerOptions(), NO_WARMUP, max_steps=3)
    run(optimizer, parameters, range(1))
    state = optimizer.state(parameters)
    with pytest.raises(CheckpointError, match=r"vector\.exp_avg_sq: shape \(2,\), expected \(5,\)"):
        optimizer.load(state | {"vector.exp_avg_sq": torch.zeros(2)}, step=1)
    del state["matrix.exp_avg"]
    with pytest.raises(CheckpointError, match=r"matrix\.exp_avg: missing"):
        optimizer.load(state, step=1)
