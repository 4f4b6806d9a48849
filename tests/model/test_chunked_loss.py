"""The loss in chunks against the plain one: equal loss and gradients, and memory that does not grow with the tokens."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from tiny_models import CPU, tiny
from torch import Tensor
from torch.nn import functional

from skippipe.model import chunked_loss
from skippipe.model.activations.live_memory import LiveMemory
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.chunked_loss import CHUNK_TOKENS, IGNORED, mean_cross_entropy
from skippipe.model.stage import Stage, build_stage

SHAPE = 3, 40
SEVERAL = 33
"""Tokens of a chunk that does not divide the samples, nor the rows of one."""
Results = dict[str, Tensor]


def head_of(architecture: str, dtype: torch.dtype = torch.float32, **options: object) -> Stage:
    if architecture == "gemma2":
        options["final_logit_softcapping"] = 3.0  # low enough to bend the logits of random weights
    config = tiny(architecture, **options)
    return build_stage(config, 0, 1, with_embedding_and_head=True, seed=0, device=CPU, dtype=dtype)


def samples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 64, SHAPE, generator=generator)
    labels[0, :7] = IGNORED
    labels[2] = IGNORED
    return torch.randn(*SHAPE, 32, generator=generator).to(dtype), labels


def measured(stage: Stage, chunk_tokens: int, dtype: torch.dtype = torch.float32) -> Results:
    """Return loss and gradients, computed in chunks of so many tokens."""
    hidden, labels = samples(dtype)
    hidden.requires_grad_()
    stage.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "CHUNK_TOKENS", chunk_tokens)
        loss = stage.loss(hidden, labels)
        (loss / 3).backward()
        with torch.no_grad():
            assert stage.loss(hidden, labels) == pytest.approx(loss.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in stage.head.named_parameters()}
    assert len(gradients) >= 2, "norm and head"
    found = {"loss": loss.detach(), "hidden": hidden.grad, **gradients}
    return {name: value.clone() for name, value in found.items() if value is not None}


def differences(ours: Results, theirs: Results) -> Iterator[float]:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        expected = theirs[name].double()
        yield float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(architecture: str, tied: bool) -> None:
    stage = head_of(architecture, tie_word_embeddings=tied)
    plain, chunked = measured(stage, CHUNK_TOKENS), measured(stage, SEVERAL)
    assert max(differences(chunked, plain)) < 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_bfloat16_is_as_near_to_fp32_in_chunks_as_in_one(architecture: str) -> None:
    exact = measured(head_of(architecture), CHUNK_TOKENS)
    stage = head_of(architecture, torch.bfloat16)
    plain, chunked = (
        max(differences(measured(stage, tokens, torch.bfloat16), exact)) for tokens in (CHUNK_TOKENS, SEVERAL)
    )
    assert chunked < 1.5 * plain


def test_autocast_is_that_of_the_caller() -> None:
    stage = head_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        plain, chunked = measured(stage, CHUNK_TOKENS), measured(stage, SEVERAL)
    assert max(differences(chunked, plain)) < 0.02
    assert max(differences(plain, measured(stage, CHUNK_TOKENS))) > 1e-4, "autocast has rounded"


@pytest.mark.parametrize("given", [nullcontext(), torch.no_grad()], ids=["training", "evaluation"])
def test_a_loss_over_no_token_is_not_a_number(given: torch.no_grad, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the plain loss, so that nobody takes it for a good one."""
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", SEVERAL)
    hidden, labels = samples()
    with given:
        assert head_of("llama").loss(hidden, torch.full_like(labels, IGNORED)).isnan()


def test_weights_that_are_not_trained_get_no_gradient_and_the_hidden_state_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", SEVERAL)
    stage, (hidden, labels) = head_of("llama"), samples()
    stage.requires_grad_(False)
    stage.loss(hidden.requires_grad_(), labels).backward()
    assert hidden.grad is not None
    assert all(parameter.grad is None for parameter in stage.parameters())


def test_a_second_backward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", SEVERAL)
    hidden, labels = samples()
    loss = head_of("llama").loss(hidden.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_memory_does_not_grow_with_the_tokens() -> None:
    """Of twice the tokens only hidden states, their gradients and labels grow, not logits."""
    size, vocabulary = 8, 4096
    weight = torch.nn.Parameter(torch.randn(vocabulary, size))
    peaks = []
    for chunks in (4, 8):
        tokens = chunks * CHUNK_TOKENS
        with LiveMemory() as live:
            hidden, labels = torch.zeros(1, tokens, size, requires_grad=True), torch.zeros(1, tokens, dtype=torch.int64)
            loss = mean_cross_entropy(lambda given: functional.linear(given, weight), [weight], hidden, labels)
            loss.backward()
            weight.grad = None
            peaks.append(live.peak_bytes)
    grown_bytes = 4 * CHUNK_TOKENS * (2 * size * 4 + 8 + 1)
    assert peaks[1] - peaks[0] <= grown_bytes
    assert peaks[1] < 3 * CHUNK_TOKENS * vocabulary * 4
