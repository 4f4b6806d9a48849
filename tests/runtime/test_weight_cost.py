"""Weight gradients before anything runs: their share of the work, what they hold, what excludes them."""

import pytest
import torch
from pydantic import ValidationError
from ranks import make_experiment

from skippipe.model.activations.activation_checkpointing import enable
from skippipe.model.architecture import build_config
from skippipe.model.cost import model_cost
from skippipe.model.linear.weight_gradients import Product, WeightGradients
from skippipe.model.stage import build_stage
from skippipe.planning.workload.experiment_workload import experiment_workload

FLOAT = torch.float32
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


def config_of(architecture: str):  # type: ignore[no-untyped-def]
    return build_config(architecture, SIZES if architecture == "gpt2" else SIZES | {"intermediate_size": 192})


def kept_bytes(products: list[Product]) -> int:
    """Return the bytes that `products` keep alive, each storage once."""
    tensors = [tensor for product in products for tensor in (product.inputs, product.gradient)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_estimate_of_what_is_held_between_the_two_parts(architecture: str, mode: str) -> None:
    config = config_of(architecture)
    stage = build_stage(config, 0, 2, with_embedding_and_head=False, seed=0, device=torch.device("cpu"), dtype=FLOAT)
    enable(stage, mode)  # type: ignore[arg-type]
    gradients = WeightGradients(stage.body)
    output = stage.train()(torch.randn(2, 32, 64, requires_grad=True))
    with gradients.deferred() as products:
        output.backward(torch.ones_like(output))
    measured = kept_bytes(products) / 2
    assert 0.9 * measured < model_cost(config, 2, 32, FLOAT).weight_resident_bytes < 1.2 * measured


def test_weight_gradients_are_half_of_a_backward_but_for_the_scores() -> None:
    short, long = (model_cost(config_of("llama"), 1, length, FLOAT) for length in (2, 2048))
    assert short.weight_to_forward / short.backward_to_forward == pytest.approx(0.5, abs=0.01)
    matrices = 4 * 64 * 64 + 3 * 64 * 192
    assert long.weight_to_forward == pytest.approx(2 * 2048 * matrices / long.layer_forward_flop)
    assert long.weight_to_forward < 0.8


def test_experiment_asks_for_the_split() -> None:
    training = {"activation_checkpointing": "full"}
    model = {"options": {key: value for key, value in SIZES.items() if key != "vocab_size"}}
    whole = experiment_workload(make_experiment(training=training, model=model))
    split = experiment_workload(make_experiment(training=training, model=model, pipeline={"split_backward": True}))
    assert whole.weight_share == 0
    # The forward that is computed again belongs to the input gradient: a backward of three forwards.
    assert split.weight_share == pytest.approx(1 / 3, abs=0.03)
    assert split.layer_resident_bytes > whole.layer_resident_bytes


def test_compile_excludes_the_split() -> None:
    with pytest.raises(ValidationError, match=r"training\.compile and pipeline\.split_backward exclude each other"):
        make_experiment(training={"compile": True}, pipeline={"split_backward": True})
