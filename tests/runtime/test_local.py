"""The runner of one process: the reference for all others, itself compared with the plain model."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from random_plans import random_plan
from ranks import gradients_of, make_batch, make_config, make_experiment
from torch import Tensor

from skippipe.model.full_model import build_full
from skippipe.runtime.local_runner import LocalRunner
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner import Span, computing_s
from skippipe.runtime.runner_factory import make_runner
from skippipe_scheduler.plan.plan import Plan

ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)


def make_local(plan: Plan, *, tied: bool = False, **training: object) -> LocalRunner:
    config = make_config(plan.num_layers, tied=tied)
    runner = make_runner(make_experiment(training=training), plan, config, ALONE)
    assert isinstance(runner, LocalRunner)
    return runner


def gradients_and_loss(runner: LocalRunner) -> tuple[dict[str, Tensor], float]:
    captured: dict[str, Tensor] = {}
    result = runner.train_iteration(make_batch, lambda: captured.update(gradients_of(runner)))
    return captured, result.loss


def plain_gradients(plan: Plan, *, tied: bool, layers: list[list[int]]) -> tuple[dict[str, Tensor], float]:
    """Return what the plain model with its layers picked and permuted by each microbatch's route gives."""
    model = build_full(make_config(plan.num_layers, tied=tied), 7, torch.device("cpu"), torch.float32)
    every = list(model.model.layers)
    total = 0.0
    for microbatch, picked in enumerate(layers):
        model.model.layers = torch.nn.ModuleList(every[index] for index in picked)
        model.config.num_hidden_layers = model.model.config.num_hidden_layers = len(picked)
        input_ids, labels = make_batch(microbatch)
        logits = model(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) / len(layers)
        loss.backward()
        total += float(loss.detach())
    model.model.layers = torch.nn.ModuleList(every)
    zero = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    return zero | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, total


@given(st.integers(0, 1000), st.integers(2, 4), st.booleans())
@settings(max_examples=8)
def test_gradients_equal_the_plain_model_on_the_same_routes(seed: int, route_length: int, tied: bool) -> None:
    plan = random_plan(seed, route_length=route_length, num_microbatches=3, layers_per_stage=2)
    layers = [
        [layer for node in microbatch.route for layer in range(*plan.stages[plan.stage_of[node]].layers)]
        for microbatch in plan.microbatches
    ]
    expected, expected_loss = plain_gradients(plan, tied=tied, layers=layers)
    measured, loss = gradients_and_loss(make_local(plan, tied=tied))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert measured.keys() == expected.keys()
    for name, gradient in measured.items():
        scale = max(float(expected[name].abs().max()), 1e-3)
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=2e-6 * scale)


def test_visits_rescale_each_stage() -> None:
    plan = random_plan(2, route_length=3, num_microbatches=6)
    plain, _ = gradients_and_loss(make_local(plan))
    runner = make_local(plan, gradient_normalization="visits")
    rescaled, _ = gradients_and_loss(runner)
    factors = set()
    for index, stage in runner.stages.items():
        factor = 6 / plan.visits[index]
        factors.add(factor)
        for name in stage.global_parameters():
            torch.testing.assert_close(rescaled[name], plain[name] * factor)
    assert len(factors) > 1


def test_stage_without_visit_has_zero_gradients() -> None:
    plan = random_plan(0, num_stages=4, route_length=2, num_microbatches=1)
    runner = make_local(plan, gradient_normalization="visits")
    gradients, _ = gradients_and_loss(runner)
    unvisited = plan.visits.index(0)
    for name in runner.stages[unvisited].global_parameters():
        assert not gradients[name].any()


def test_iteration_starts_from_zero_gradients() -> None:
    runner = make_local(random_plan(5))
    first, _ = gradients_and_loss(runner)
    second, _ = gradients_and_loss(runner)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])


def test_evaluation_is_the_full_model_and_leaves_no_gradient() -> None:
    plan = random_plan(6, route_length=2, layers_per_stage=2)
    runner = make_local(plan)
    layers = [list(range(plan.num_layers))] * 5
    _, expected = plain_gradients(plan, tied=False, layers=layers)
    assert runner.evaluate(make_batch, 5) == pytest.approx(expected, rel=1e-6)
    assert all(parameter.grad is None for parameter in runner.parameters().values())


def test_spans_are_the_plan_and_lie_within_the_iteration() -> None:
    plan = random_plan(7)
    result = make_local(plan).train_iteration(make_batch, lambda: None)
    assert len(result.spans) == sum(2 * len(microbatch.route) + 1 for microbatch in plan.microbatches)
    assert {(span.node, span.operation, span.microbatch) for span in result.spans} == {
        (node, task.operation, task.microbatch) for node, tasks in plan.order.items() for task in tasks
    }
    assert all(0 <= span.start_s <= span.end_s <= result.duration_s for span in result.spans)
    assert result.busy_s == pytest.approx(sum(span.end_s - span.start_s for span in result.spans))


def test_a_relay_and_a_reduction_are_no_computing() -> None:
    operations = ("F", "RF", "L", "B", "W", "RB", "REDUCE")
    spans = [Span("node-0", operation, 0, 0.0, 2.0**index) for index, operation in enumerate(operations)]
    assert computing_s(spans) == 1 + 4 + 8 + 16


def test_bfloat16_runs() -> None:
    gradients, loss = gradients_and_loss(make_local(random_plan(8), dtype="bfloat16"))
    assert all(gradient.dtype is torch.bfloat16 for gradient in gradients.values())
    assert 3 < loss < 6
