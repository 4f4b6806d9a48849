"""All that a process holds of its stage after a step, as one text of bytes: a newcomer goes on from it bit by bit.

The format is that of a safetensors file: parameters as `model/<name>`, what the optimizer keeps as `optimizer/<name>`,
gradients, where they are there, as `gradient/<name>`, and some numbers.
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
GRADIENT = "gradient/"
STEP = "step"
ELAPSED = "elapsed_s"
SQUARED_NORM = "squared_norm"


class StageState(NamedTuple):
    """Parameters and optimizer state of one stage under their Hugging Face names, after `step` steps."""

    step: int
    elapsed_s: float
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    gradients: dict[str, Tensor] = {}  # noqa: RUF012  # a NamedTuple's default, which nobody changes
    """Reduced gradients of the step behind it, where they are kept with it: whoever has both can take that step."""
    squared_norm: float = 0.0
    """Of the layers' gradients in the last step."""

    def to_bytes(self) -> bytes:
        """Return a copy as bytes."""
        tensors = {f"{MODEL}{name}": tensor for name, tensor in self.parameters.items()}
        tensors |= {f"{OPTIMIZER}{name}": tensor for name, tensor in self.optimizer.items()}
        tensors |= {f"{GRADIENT}{name}": tensor for name, tensor in self.gradients.items()}
        numbers = {ELAPSED: self.elapsed_s, SQUARED_NORM: self.squared_norm}
        tensors |= {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
        tensors[STEP] = torch.tensor(self.step)
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> "StageState":
        """Return what `to_bytes` has written; raise `CheckpointError` where it is none."""
        try:
            tensors = load(content)
            step, elapsed_s, norm = int(tensors[STEP]), float(tensors[ELAPSED]), float(tensors[SQUARED_NORM])
        except (SafetensorError, KeyError, ValueError) as reason:
            raise CheckpointError(f"the state of a stage that was sent here cannot be read: {reason}") from None
        model, optimizer, gradients = (_part(tensors, prefix) for prefix in (MODEL, OPTIMIZER, GRADIENT))
        return cls(step, elapsed_s, model, optimizer, gradients, norm)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
