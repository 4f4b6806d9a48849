"""How an activation lies in a message: whole numbers first where there are any, then its bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skippipe.runtime.transport.wire import Wire

NUMBER_BYTES = 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class MessageFormat:
    """Messages of activations in one form, with `num_numbers` int64 before each; they lie on `device`."""

    wire: Wire
    num_numbers: int = 0
    device: torch.device = CPU

    @property
    def size_bytes(self) -> int:
        """Bytes of one message."""
        return self._prefix_bytes + self.wire.size_bytes

    @property
    def _prefix_bytes(self) -> int:
        return NUMBER_BYTES * self.num_numbers

    def empty(self) -> Tensor:
        """Return a buffer for one message, uint8 (size_bytes,)."""
        return torch.empty(self.size_bytes, dtype=torch.uint8, device=self.device)

    def pack(self, activation: Tensor, *numbers: int) -> Tensor:
        """Return the message, uint8 (size_bytes,). Without numbers it shares the memory of (B, T, D) where it can."""
        payload = self.wire.encode(activation, self.device)
        if not self.num_numbers:
            return payload
        message = self.empty()
        message[: self._prefix_bytes].view(torch.int64).copy_(torch.tensor(numbers))
        message[self._prefix_bytes :] = payload
        return message

    def unpack(self, message: Tensor) -> tuple[Tensor, list[int]]:
        """Return the activation (B, T, D), in the message's memory where it can be, and the numbers."""
        numbers = message[: self._prefix_bytes].view(torch.int64).tolist() if self.num_numbers else []
        return self.wire.decode(message[self._prefix_bytes :]), numbers
