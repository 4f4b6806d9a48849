"""Parts of a model against a slow model that runs one position at a time."""

import pytest
import torch
from slow_model import SlowModel
from tiny_decoders import ARCHITECTURES, model_of

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import segments
from skippipe.inference.policies.base import PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.skeleton import find_parts

PROMPT_LENGTH, LENGTH = 3, 10
POLICIES = ["full", "random", "stages:0,3,2,5", "unified", "skipdecode", "exit"]


def tokens(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_sequences_equal_one_position_at_a_time(architecture: str, name: str) -> None:
    model = model_of(architecture)
    decoder = Decoder(find_parts(model))
    policy = build_policy(name, PolicyContext(decoder, 0.6, num_generated=LENGTH - PROMPT_LENGTH)).sample(1)
    input_ids = tokens()
    layers_of = [policy.layers_at(position, PROMPT_LENGTH) for position in range(LENGTH)]
    with torch.inference_mode():
        logits = decoder.logits(input_ids, segments(layers_of))
    for row in range(2):
        expected = SlowModel(model).logits(input_ids[row].tolist(), layers_of.__getitem__)
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "random", "best", "best:gradient", "unified", "skipdecode", "exit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kept_is_the_whole_model_to_the_bit(architecture: str, name: str) -> None:
    model = model_of(architecture)
    decoder = Decoder(find_parts(model))
    policy = build_policy(name, PolicyContext(decoder, 1.0, num_generated=LENGTH)).sample(4)
    layers_of = [policy.layers_at(position, 0) for position in range(LENGTH)]
    with torch.inference_mode():
        assert torch.equal(decoder.logits(tokens(), segments(layers_of)), model(input_ids=tokens()).logits)
