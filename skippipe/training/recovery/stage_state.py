"""All that a process holds of its stage after a step, as one text of bytes: a newcomer goes on from it bit by bit.

The format is that of a safetensors file: parameters as `model/<name>`, what the optimizer keeps as `optimizer/<name>`,
and two numbers.
"""

from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skippipe.errors import CheckpointError

STATE = "stage-state"
"""Under which name a process's exchange has its state at the beginning of an epoch."""
MODEL = "model/"
OPTIMIZER = "optimizer/"
STEP = "step"
ELAPSED = "elapsed_s"


class StageState(NamedTuple):
    """Parameters and optimizer state of one stage under their Hugging Face names, after `step` steps."""

    step: int
    elapsed_s: float
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        """Return a copy as bytes."""
        tensors = {f"{MODEL}{name}": tensor for name, tensor in self.parameters.items()}
        tensors |= {f"{OPTIMIZER}{name}": tensor for name, tensor in self.optimizer.items()}
        tensors |= {STEP: torch.tensor(self.step), ELAPSED: torch.tensor(self.elapsed_s, dtype=torch.float64)}
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> "StageState":
        """Return what `to_bytes` has written; raise `CheckpointError` where it is none."""
        try:
            tensors = load(content)
            step, elapsed_s = int(tensors.pop(STEP)), float(tensors.pop(ELAPSED))
        except (SafetensorError, KeyError, ValueError) as reason:
            raise CheckpointError(f"the state of a stage that was sent here cannot be read: {reason}") from None
        return cls(step, elapsed_s, _part(tensors, MODEL), _part(tensors, OPTIMIZER))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
