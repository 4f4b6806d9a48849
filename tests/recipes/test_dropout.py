"""What is left out inside a stage: the draws, the samples that stay, their gradients, and an early exit's."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from random_plans import random_plan
from torch import Tensor, nn
from training_runs import ALONE

from skippipe.config.experiment import Experiment
from skippipe.config.recipe_options import DropoutOptions, LayerDropoutOptions, RecipeOptions
from skippipe.errors import ConfigError
from skippipe.model.activations.activation_checkpointing import MODES, Mode, enable
from skippipe.model.architecture import build_config
from skippipe.model.compilation import compile_stage, warm_up
from skippipe.model.dropout.layer_dropout import LeftOut, StageDropout
from skippipe.model.dropout.probability import expected_share, kept_samples, mean_share, probability
from skippipe.model.stage import Stage, build_stage
from skippipe.runtime.local_runner import LocalRunner
from skippipe.runtime.plans.visit_scales import visit_scales
from skippipe.runtime.runner_factory import make_runner
from skippipe.runtime.stage_compute import StageCompute

CPU = torch.device("cpu")
NUM_LAYERS, NUM_SAMPLES, SEED, MAX_STEPS = 6, 5, 7, 10
BOTH = RecipeOptions(
    layer_dropout=LayerDropoutOptions(probability=0.5, over_depth="uniform", rescale=True),
    ffn_dropout=DropoutOptions(probability=0.5, over_depth="uniform"),
)
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48},
    "gpt2": {},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},
    "mixtral": {"intermediate_size": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def make_stage(architecture: str = "llama", mode: Mode = "none") -> Stage:
    """Return layers 2 to 5 of 6 in training."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": NUM_LAYERS}
    config = build_config(architecture, sizes | SIZES[architecture])
    stage = build_stage(config, 2, NUM_LAYERS, with_embedding_and_head=False, seed=1, device=CPU, dtype=torch.float32)
    enable(stage, mode)
    return stage.train()


def make_dropout(stage: Stage, recipe: RecipeOptions = BOTH) -> StageDropout:
    return StageDropout(
        stage, recipe, num_layers=NUM_LAYERS, micro_batch_size=NUM_SAMPLES, max_steps=MAX_STEPS, seed=SEED
    )


def inputs(seed: int) -> Tensor:
    return torch.randn(NUM_SAMPLES, 8, 32, generator=torch.Generator().manual_seed(seed))


def drawn(recipe: RecipeOptions, part: str, step: int, microbatch: int, layer: int) -> tuple[int, ...]:
    """Return the samples that run a part of a layer, by the documented formula."""
    options: DropoutOptions = getattr(recipe, f"{part}_dropout")
    chance = probability(options, layer=layer, num_layers=NUM_LAYERS, step=step, max_steps=MAX_STEPS)
    return kept_samples(options, chance, NUM_SAMPLES, (SEED, part, step, microbatch, layer))


def sample_by_sample(stage: Stage, hidden: Tensor, step: int, microbatch: int) -> Tensor:
    """Run each sample alone, without the layers and FFNs that it leaves out: slow and obvious.

    Half of the samples run a layer, so what it adds counts twice.
    """
    every: list[Any] = list(stage.layers)
    outputs = []
    for sample in range(NUM_SAMPLES):
        kept = [layer for layer in range(2, NUM_LAYERS) if sample in drawn(BOTH, "layer", step, microbatch, layer)]
        silenced = [layer for layer in kept if sample not in drawn(BOTH, "ffn", step, microbatch, layer)]
        hooks = [every[layer - 2].mlp.register_forward_hook(lambda *_: torch.zeros(1, 8, 32)) for layer in silenced]
        output = hidden[sample : sample + 1]
        for layer in kept:
            stage.body.layers = stage.body.h = nn.ModuleList([every[layer - 2]])
            stage.body.config.num_hidden_layers = 1
            types = stage.body.config.__dict__.get("layer_types")
            if types:
                stage.body.config.layer_types = [types[layer - 2]]
            output = output + 2 * (stage(output) - output)
            if types:
                stage.body.config.layer_types = types
        outputs.append(output)
        for hook in hooks:
            hook.remove()
    stage.body.layers = stage.body.h = nn.ModuleList(every)
    return torch.cat(outputs)


def gradients(stage: Stage) -> dict[str, Tensor]:
    return {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in stage.global_parameters().items()
    }


def assert_alike(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert measured.keys() == expected.keys()
    for name, gradient in measured.items():
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=partial("{}: {}".format, name)
        )


def test_another_dropout_takes_the_place_of_the_first() -> None:
    once, twice = make_stage(), make_stage()
    make_dropout(twice).begin(3, 1)
    for stage in (once, twice):
        make_dropout(stage).begin(5, 2)
    hidden = inputs(0)
    assert torch.equal(once(hidden), twice(hidden))
    assert [*once.state_dict()] == [*twice.state_dict()]


def test_probability_has_the_shape_of_layerskip() -> None:
    options = DropoutOptions(probability=0.4, over_steps="growing")

    def at(layer: int, step: int) -> float:
        return probability(options, layer=layer, num_layers=5, step=step, max_steps=11)

    assert at(0, 10) == at(4, 0) == 0
    assert at(4, 10) == pytest.approx(0.4)
    assert at(2, 10) == pytest.approx(0.4 * (2**0.5 - 1))
    assert at(4, 5) == pytest.approx(0.4 * (2**0.5 - 1))
    uniform = DropoutOptions(probability=0.4, over_depth="uniform")
    assert {probability(uniform, layer=layer, num_layers=5, step=3, max_steps=11) for layer in range(5)} == {0.4}


def test_probability_is_linear_or_alternating_over_depth_and_falls_to_zero() -> None:
    linear = DropoutOptions(probability=0.6, over_depth="linear", over_steps="falling")
    alternating = DropoutOptions(probability=0.6, over_depth="alternating")

    def at(options: DropoutOptions, layer: int, step: int) -> float:
        return probability(options, layer=layer, num_layers=4, step=step, max_steps=11)

    assert [at(linear, layer, 0) for layer in range(4)] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert [at(linear, 3, step) for step in (0, 5, 10)] == pytest.approx([0.6, 0.3, 0])
    assert [at(alternating, layer, 7) for layer in range(4)] == [0, 0.6, 0, 0.6]
    of_one = {"layer": 0, "num_layers": 1, "step": 0, "max_steps": 1}
    assert probability(linear, **of_one) == 0
    assert probability(alternating, **of_one) == 0
    assert probability(DropoutOptions(probability=0.6), **of_one) == 0.6


def test_shares_of_flop_are_means_over_depth_and_steps() -> None:
    linear = {"probability": 0.6, "over_depth": "linear", "over_steps": "falling"}
    recipe = RecipeOptions.model_validate({"layer_dropout": linear, "ffn_dropout": {"probability": 0.2}})
    layers_alone = RecipeOptions.model_validate({"layer_dropout": linear})
    place = {"layer": 3, "num_layers": 4, "step": 5, "max_steps": 11}
    assert expected_share(recipe, **place, ffn_share=0.5) == pytest.approx(0.7 * 0.9)
    for max_steps in (2, 7, 10_000):
        assert mean_share(layers_alone, num_layers=4, max_steps=max_steps, ffn_share=0.5) == pytest.approx(0.85)
    assert mean_share(RecipeOptions(), num_layers=4, max_steps=7, ffn_share=0.5) == 1


def test_draws_have_their_rate_and_repeat() -> None:
    by_sample, together = DropoutOptions(probability=0.3), DropoutOptions(probability=0.3, unit="microbatch")
    draws = [kept_samples(by_sample, 0.3, 4, (1, "layer", step, 0, 2)) for step in range(2000)]
    assert draws == [kept_samples(by_sample, 0.3, 4, (1, "layer", step, 0, 2)) for step in range(2000)]
    assert sum(map(len, draws)) / 8000 == pytest.approx(0.7, abs=0.02)
    assert {len(draw) for draw in draws} == {0, 1, 2, 3, 4}
    whole = [kept_samples(together, 0.3, 4, (1, "layer", step, 0, 2)) for step in range(2000)]
    assert {len(draw) for draw in whole} == {0, 4}
    assert sum(map(len, whole)) / 8000 == pytest.approx(0.7, abs=0.04)
    others = [kept_samples(by_sample, 0.3, 4, (1, "layer", step, 1, 2)) for step in range(2000)]
    assert sum(draw == other for draw, other in zip(draws, others, strict=True)) < 1200


@pytest.mark.parametrize("architecture", SIZES)
def test_samples_run_what_they_keep_and_nothing_else(architecture: str) -> None:
    plain, dropping = make_stage(architecture), make_stage(architecture)
    make_dropout(dropping).begin(step=2, microbatch=1)
    results = []
    for stage, run in ((plain, sample_by_sample), (dropping, lambda stage, hidden, *_: stage(hidden))):
        hidden = inputs(0).requires_grad_()
        output = run(stage, hidden, 2, 1)
        output.backward(inputs(1))
        results.append((output, hidden.grad, gradients(stage)))
    (expected, by_hidden, by_weights), (measured, found, weights) = results
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, by_hidden, rtol=1e-5, atol=1e-5)
    assert_alike(weights, by_weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [frozenset(), frozenset({0, 2})], ids=["whole", "split"])
def test_microbatches_in_flight_keep_their_draws(mode: Mode, split: frozenset[int]) -> None:
    """Under checkpointing a layer is computed again when other microbatches have passed, and must draw the same."""
    plain, dropping = make_stage(), make_stage("llama", mode)
    compute = StageCompute(dropping, CPU, split, make_dropout(dropping))
    compute.reset(3, step=2)
    sent, expected = [], []
    for microbatch in range(3):
        compute.forward(microbatch, inputs(microbatch))
    for microbatch in (1, 0, 2):
        sent.append(compute.backward(microbatch, inputs(9 + microbatch)))
        hidden = inputs(microbatch).requires_grad_()
        sample_by_sample(plain, hidden, 2, microbatch).backward(inputs(9 + microbatch))
        expected.append(hidden.grad)
    for microbatch in sorted(split):
        compute.weight(microbatch)
    for gradient, other in zip(sent, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)
    assert_alike(gradients(dropping), gradients(plain))


def test_stage_that_is_left_out_hands_on_what_it_got() -> None:
    stage = make_stage()
    everything = RecipeOptions(
        layer_dropout=LayerDropoutOptions(probability=0.999, over_depth="uniform", unit="microbatch")
    )
    compute = StageCompute(stage, CPU, dropout=make_dropout(stage, everything))
    assert torch.equal(compute.forward(0, inputs(0)), inputs(0))
    gradient = compute.backward(0, inputs(1))
    assert gradient is not None
    assert torch.equal(gradient, inputs(1))
    assert not any(gradient.any() for gradient in gradients(stage).values())


def test_evaluation_leaves_nothing_out() -> None:
    plain, dropping = make_stage().eval(), make_stage()
    make_dropout(dropping).begin(0, 0)
    assert torch.equal(dropping.eval()(inputs(0)), plain(inputs(0)))
    assert not torch.equal(dropping.train()(inputs(0)), plain(inputs(0)))


def test_compiled_layers_are_left_out_whole_without_compiling_again() -> None:
    """The compiler's front end alone: what inductor makes of it takes too long here."""
    torch._dynamo.reset()
    recipe = RecipeOptions(layer_dropout=LayerDropoutOptions(probability=0.5, over_depth="uniform", unit="microbatch"))
    plain, compiled = make_stage(), make_stage()
    compile_stage(compiled, backend="aot_eager")
    warm_up(compiled, (NUM_SAMPLES, 8, 32), CPU)
    captured = dict(torch._dynamo.utils.counters["stats"])
    computes = [StageCompute(stage, CPU, dropout=make_dropout(stage, recipe)) for stage in (plain, compiled)]
    for microbatch in range(4):
        outputs = [compute.forward(microbatch, inputs(microbatch)) for compute in computes]
        torch.testing.assert_close(outputs[1], outputs[0])
        for compute in computes:
            compute.backward(microbatch, inputs(9))
    assert_alike(gradients(compiled), gradients(plain))
    assert dict(torch._dynamo.utils.counters["stats"]) == captured


def test_layers_without_an_ffn_are_refused() -> None:
    stage = make_stage()
    del stage.layers[1].mlp
    with pytest.raises(ConfigError, match=r"recipe\.ffn_dropout: the layers of 'llama' have no .* use recipe\.layer"):
        make_dropout(stage)


def test_wrapped_layer_shows_the_attributes_of_the_layer() -> None:
    stage = make_stage()
    make_dropout(stage)
    layer = stage.layers[0]
    assert isinstance(layer, LeftOut)
    assert layer.self_attn is layer.inner.self_attn
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_this_name


def make_local(plan_seed: int, **recipe: Any) -> LocalRunner:
    sections = {"cluster": "none.yaml", "data": {"source": "python_stdlib"}, "seed": SEED, "recipe": recipe}
    training = {"micro_batch_size": 2, "sequence_length": 8, "device": "cpu", "threads": 1}
    plan = random_plan(plan_seed, num_nodes=3, num_stages=3, route_length=2, layers_per_stage=2, num_microbatches=3)
    config = build_config(
        "llama",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 6} | SIZES["llama"] | {"num_attention_heads": 2},
    )
    runner = make_runner(Experiment.model_validate(sections | {"training": training}), plan, config, ALONE)
    assert isinstance(runner, LocalRunner)
    return runner


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        tokens = torch.randint(0, 64, (2, 9), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def test_early_exit_adds_the_loss_behind_the_origins_layers() -> None:
    samples = list(batches())
    runner, plain = make_local(1, early_exit_loss=0.4), make_local(1)
    result = runner.train_iteration(lambda microbatch: samples[microbatch], lambda: None)
    total = exits = torch.zeros(())
    for microbatch, (input_ids, labels) in zip(plain.plans.main.microbatches, samples, strict=True):
        origin = plain.stages[0]
        hidden = early = origin(origin.embed(input_ids))
        for node in microbatch.route[1:]:
            hidden = plain.stages[plain.plans.main.stage_of[node]](hidden)
        total = total + origin.loss(hidden, labels) / 3
        exits = exits + origin.loss(early, labels) / 3
    (total + 0.4 * exits).backward()
    assert result.loss == pytest.approx(float(total.detach()), rel=1e-6)
    assert runner.tally().exit_loss == pytest.approx(float(exits.detach()), rel=1e-6)
    for index, stage in runner.stages.items():
        assert_alike(gradients(stage), gradients(plain.stages[index]))


@pytest.mark.parametrize("length", [2, 3])
def test_a_stage_makes_up_for_microbatches_that_leave_it_out(length: int) -> None:
    shape: dict[str, Any] = {"num_nodes": 4, "num_stages": 3, "num_microbatches": 7}
    plan = random_plan(2, route_length=length, **shape)
    for stage, visits in enumerate(plan.visits):
        scales = visit_scales(plan, stage)
        assert len(scales) == visits
        assert sum(scales.values()) == pytest.approx(7)
    assert set(visit_scales(plan, 0).values()) == {1.0}


def test_rescaled_stages_add_more_in_training_and_not_in_evaluation() -> None:
    samples = list(batches())
    runner, plain = make_local(1, rescale_stages=True), make_local(1)
    plan = plain.plans.main
    result = runner.train_iteration(lambda microbatch: samples[microbatch], lambda: None)
    total = torch.zeros(())
    for microbatch, (input_ids, labels) in zip(plan.microbatches, samples, strict=True):
        origin = plain.stages[0]
        hidden = origin(origin.embed(input_ids))
        for node in microbatch.route[1:]:
            visited = plan.stage_of[node]
            hidden = hidden + (3 / plan.visits[visited]) * (plain.stages[visited](hidden) - hidden)
        total = total + origin.loss(hidden, labels) / 3
    total.backward()
    assert result.loss == pytest.approx(float(total.detach()), rel=1e-6)
    for index, stage in runner.stages.items():
        assert_alike(gradients(stage), gradients(plain.stages[index]))
    evaluated = [each.evaluate(lambda microbatch: samples[microbatch], 3) for each in (runner, plain)]
    assert evaluated[0] == evaluated[1]
