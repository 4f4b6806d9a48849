"""int8 with a scale for each block, and activations in that form."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from skippipe.runtime.transport.int8 import decode, encode, int8_bytes
from skippipe.runtime.transport.message import CPU
from skippipe.runtime.transport.wire import Wire


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 7, 32]), st.sampled_from([1e-6, 1.0, 1e6]))
def test_errors_are_half_a_step_of_the_block(rows: int, blocks: int, block: int, size: float) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + blocks)
    numbers = torch.randn(rows, blocks * block, generator=generator) * size
    messages = encode(numbers, block)
    assert messages.shape == (rows, int8_bytes(blocks * block, block))
    arrived = decode(messages, block)
    largest = numbers.unflatten(1, (blocks, block)).abs().amax(2, keepdim=True)
    errors = (arrived - numbers).unflatten(1, (blocks, block)).abs()
    assert bool((errors <= largest / 127 / 2 * 1.001).all())
    assert bool((arrived.unflatten(1, (blocks, block)).abs().amax(2, keepdim=True) >= largest * 0.9999).all())


def test_zeros_stay_zeros_and_blocks_are_apart() -> None:
    numbers = torch.tensor([[0.0, 0.0, 1e9, 1.0, 1e-9, -1e-9]])
    assert decode(encode(numbers, 2), 2)[0, [0, 1]].tolist() == [0, 0]
    assert decode(encode(numbers, 2), 2)[0, 3] == 0  # lost beside 1e9
    torch.testing.assert_close(decode(encode(numbers, 2), 2)[0, 4:], numbers[0, 4:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_behind(bad: float) -> None:
    arrived = decode(encode(torch.tensor([[1.0, bad, 2.0, 3.0]]), 2), 2)
    assert not arrived[0, :2].isfinite().any()
    torch.testing.assert_close(arrived[0, 2:], torch.tensor([2.0, 3.0]), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_arrives_as_it_is_rounded_here(dtype: torch.dtype) -> None:
    wire = Wire((2, 3, 5), torch.float32, "int8")
    activation = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    message = torch.empty(7 + wire.size_bytes, dtype=torch.uint8)[7:]  # as after a stamp, where nothing is aligned
    message.copy_(wire.encode(activation, CPU))
    assert wire.size_bytes == 2 * 3 * (5 + 4)
    assert torch.equal(wire.decode(message).to(dtype), wire.rounded(activation))
    assert not torch.equal(wire.rounded(activation), activation)


def test_every_scale_stays_when_it_is_made_again() -> None:
    largest = torch.arange(127 << 23, 128 << 23, dtype=torch.int32).view(torch.float32)  # all numbers of 1 .. 2
    arrived = decode(encode(largest.unsqueeze(0), 1), 1)
    assert torch.equal(decode(encode(arrived, 1), 1), arrived)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "wire",
    [
        Wire((4, 64, 32), torch.float32, "int8"),
        Wire((4, 64, 32), torch.bfloat16),
        Wire((4, 64, 32), torch.float16),
    ],
)
@given(st.integers(0, 1000), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
@settings(max_examples=20)
def test_what_is_relayed_arrives_as_if_it_came_directly(wire: Wire, dtype: torch.dtype, seed: int, size: float) -> None:
    activation = (torch.randn(wire.shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    arrived = wire.rounded(activation)
    assert torch.equal(wire.decode(wire.encode(arrived, CPU)).to(dtype), arrived)


def test_uncompressed_activation_is_rounded_to_its_dtype() -> None:
    wire = Wire((1, 2, 4), torch.bfloat16)
    activation = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    assert wire.size_bytes == wire.encode(activation, CPU).numel() == 16
    assert torch.equal(wire.decode(wire.encode(activation, CPU)).float(), wire.rounded(activation))
