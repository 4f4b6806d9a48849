"""What an activation is on its way between two ranks: its numbers rounded to a dtype, or to int8 for each token."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skippipe.runtime.transport.int8 import decode, encode, int8_bytes

ActivationCompression = Literal["none", "int8"]


@dataclass(frozen=True)
class Wire:
    """Messages of one activation (B, T, D) each. Both sides know the shape; it does not travel."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    compression: ActivationCompression = "none"

    @property
    def size_bytes(self) -> int:
        """Bytes of one message."""
        numbers = math.prod(self.shape)
        return numbers * self.dtype.itemsize if self.compression == "none" else int8_bytes(numbers, self.shape[-1])

    def encode(self, activation: Tensor, device: torch.device) -> Tensor:
        """Return the message: (B, T, D) on any device -> uint8 (size_bytes,) on `device`."""
        if self.compression == "int8":
            return encode(activation.reshape(1, -1), self.shape[-1])[0].to(device)
        return activation.detach().to(device, self.dtype).contiguous().flatten().view(torch.uint8)

    def decode(self, message: Tensor) -> Tensor:
        """Return the activation (B, T, D) where the message is; it shares memory with the message where it can."""
        if self.compression == "int8":
            return decode(message.unsqueeze(0), self.shape[-1]).view(self.shape)
        return message.view(self.dtype).view(self.shape)

    def rounded(self, activation: Tensor) -> Tensor:
        """Return the activation as it would arrive, where it is and in its dtype."""
        if self.compression == "int8":
            message = encode(activation.reshape(1, -1), self.shape[-1])
            return decode(message, self.shape[-1]).view(self.shape).to(activation.dtype)
        return activation.to(self.dtype).to(activation.dtype)
