"""The table of what architectures call their parts, against transformers itself and against the documentation."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from torch import nn

from skippipe.errors import ConfigError
from skippipe.model.architecture_traits import ARCHITECTURES, SHARED_STATE, traits_of
from skippipe.model.skeleton import build_skeleton, find_parts

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_model_has_no_part_that_the_table_does_not_name(architecture: str) -> None:
    """What a stage leaves out, replaces and keeps is all that there is, so no part runs twice or not at all."""
    skeleton = build_skeleton(tiny(architecture), torch.float32)
    traits, base = skeleton.traits, skeleton.base
    parts = {traits.layers, traits.final_norm, traits.position_embedding, traits.embedding_dropout} - {None}
    embedding = base.get_input_embeddings()
    found = {name for name, child in base.named_children() if child is not embedding and traits.rotation not in name}
    assert found == parts
    factors = {name for name, value in vars(base).items() if isinstance(value, float)}
    assert factors == {traits.embedding_factor} - {None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_name_is_one_of_transformers(architecture: str) -> None:
    config = tiny(architecture)
    traits, layer = traits_of(architecture), build_skeleton(config, torch.float32).layers[0]
    assert traits.find_feed_forward(layer) == traits.feed_forward
    assert isinstance(getattr(layer, traits.residual_reader), nn.Module)
    assert traits.parallel_residual is None or isinstance(getattr(layer, traits.parallel_residual), bool)
    assert hasattr(config, traits.feed_forward_width)
    names = [name for name, _ in getattr(layer, traits.feed_forward).named_parameters()]
    has_experts = any(traits.experts in name.split(".") for name in names)
    assert has_experts == (traits.num_experts is not None)
    assert traits.num_experts is None or getattr(config, traits.num_experts) > 1
    declared = {*type(config)().to_dict(), *type(config).attribute_map}
    assert {name for name in declared if re.search("dropout|pdrop", name)} >= set(traits.dropout_options)
    assert not declared & set(traits.undeclared_options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_dropout_option_is_forgotten(architecture: str) -> None:
    """An option that nobody turns off would show as a number above 0 in a configuration with all defaults."""
    values = tiny(architecture).to_dict()
    forgotten = {key for key, value in values.items() if re.search("dropout|pdrop", key) and value and key[0] != "_"}
    assert forgotten <= {"classifier_dropout", "summary_first_dropout"}, "those of heads that no decoder here has"


def test_a_release_of_transformers_with_other_names_is_refused() -> None:
    model = build_skeleton(tiny("llama"), torch.float32).model
    model.model.blocks = model.model.layers
    del model.model.layers
    with pytest.raises(ConfigError, match=r"'llama' of transformers \d.* in 'layers'.* another release"):
        find_parts(model)


def test_the_documentation_lists_what_is_supported_and_what_is_refused() -> None:
    text = " ".join(DOCS.read_text().split())
    assert f"can be cut into stages: {', '.join(ARCHITECTURES)}." in text
    assert not set(SHARED_STATE) & set(ARCHITECTURES)
