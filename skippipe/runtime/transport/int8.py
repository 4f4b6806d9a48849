"""Numbers as int8 with one scale for each block: symmetric, the largest of a block becomes 127.

A message of n numbers is n bytes, then 4 bytes (fp32) for each block. A block with a number that is not finite becomes
not finite as a whole, so that the loss check sees it.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4
LARGEST = 127.0


def int8_bytes(numbers: int, block: int) -> int:
    """Return the size of a message; `numbers` is a multiple of `block`."""
    return numbers + numbers // block * SCALE_BYTES


def encode(rows: Tensor, block: int) -> Tensor:
    """Return one message for each row: (R, n) of any float dtype -> uint8 (R, n + 4 n / block)."""
    blocks = rows.detach().float().reshape(len(rows), -1, block)  # (R, n / block, block)
    scales = blocks.abs().amax(-1, keepdim=True) / LARGEST  # (R, n / block, 1)
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    numbers = (blocks * inverse).round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0.0).to(torch.int8)
    parts = (numbers.flatten(-2), scales.flatten(-2).contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], -1)


def decode(messages: Tensor, block: int) -> Tensor:
    """Return the numbers of messages: uint8 (R, n + 4 n / block) -> fp32 (R, n)."""
    count = messages.shape[-1] // (block + SCALE_BYTES)
    numbers, scales = messages.tensor_split([count * block], -1)
    # Copied, because a message may lie where fp32 numbers cannot.
    scales = scales.clone(memory_format=torch.contiguous_format).view(torch.float32).unsqueeze(-1)  # (R, n / block, 1)
    blocks = numbers.view(torch.int8).reshape(len(messages), count, block)
    return (blocks * scales).flatten(-2)
