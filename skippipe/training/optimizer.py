"""AdamW with warm-up and a cosine, whole on every replica of a stage or sharded over them.

State is a flat mapping from `<parameter name>.<key>` to a tensor, so that it can be stored by name and loaded under
another split of the model, another number of replicas or another back-end.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LambdaLR

from skippipe.config import OptimizerOptions, SchedulerOptions
from skippipe.errors import CheckpointError
from skippipe.training.master_adamw import MASTER, MOMENTS, STEP, MasterAdamW

Guard = Callable[[Callable[[], object]], None]
"""Calls something that waits for the other replicas, and turns its failure into one that names them."""


class OptimizerBackend(Protocol):
    """What the training loop needs of an optimizer."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters whose state is held here."""

    @property
    def sharded(self) -> bool:
        """Whether the other replicas hold other parts of the state."""

    def step(self) -> None:
        """Update the parameters from their gradients and move on along the learning rate's schedule."""

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the state of the parameters `names` as far as it is held here, on the CPU."""

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps with the state of all parameters; raise `CheckpointError` where some is missing.

        Before the first step (0) there is none. The parameters themselves must have been loaded before.
        """


def learning_rate_factor(step: int, max_steps: int, options: SchedulerOptions) -> float:
    """Return the learning rate of step `step` (from 0) relative to its peak.

    It rises linearly to 1 at the last step of the warm-up and falls along a cosine to `min_lr_ratio` at the last step.
    """
    done = step + 1
    if done <= options.warmup_steps:
        return done / options.warmup_steps
    progress = min(1.0, (done - options.warmup_steps) / max(1, max_steps - options.warmup_steps))
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """AdamW on the parameters held here; decay on matrices only, fp32 master copies for other dtypes.

    With `replicas` moments and master copies are sharded over that group by torch's `ZeroRedundancyOptimizer` (ZeRO-1,
    Rajbhandari et al. 2020): each replica updates its part and sends the new parameters to the others.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: OptimizerOptions,
        scheduler: SchedulerOptions,
        max_steps: int,
        replicas: ProcessGroup | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._guard = guard
        matrices = [parameter for parameter in self._parameters.values() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self._parameters.values() if parameter.ndim < 2]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, options.weight_decay), (vectors, 0.0))
            if group
        ]
        settings = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
        self._optimizer, self._held = _optimizers(groups, settings, replicas)
        self._factor = lambda step: learning_rate_factor(step, max_steps, scheduler)
        self._schedule = LambdaLR(self._optimizer, self._factor)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are updated here."""
        return tuple(name for name, parameter in self._parameters.items() if parameter in self._held.masters)

    @property
    def sharded(self) -> bool:
        """Whether the other replicas update other parameters."""
        return self._optimizer is not self._held

    def step(self) -> None:
        """Update the parameters from their gradients; see `OptimizerBackend`."""
        if self._guard is None:
            self._optimizer.step()
        else:
            self._guard(self._optimizer.step)
        self._schedule.step()

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return moments, step count and master copy of the parameters `names` that are updated here."""
        return {
            f"{name}.{key}": tensor.detach().cpu()
            for name in names
            for key, tensor in self._held.state_of(self._parameters[name]).items()
        }

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps; see `OptimizerBackend`. A missing master copy is made from the parameter."""
        for name in self.names:
            parameter = self._parameters[name]
            shapes = dict.fromkeys(MOMENTS, parameter.shape) | {STEP: torch.Size()}
            found = {key: _find(state, f"{name}.{key}", shape) for key, shape in shapes.items()} if step else {}
            if f"{name}.{MASTER}" in state:
                found[MASTER] = _find(state, f"{name}.{MASTER}", parameter.shape)
            self._held.load_state_of(parameter, found)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self._schedule = LambdaLR(self._optimizer, self._factor, last_epoch=step - 1)


def _optimizers(
    groups: list[dict[str, Any]], settings: dict[str, Any], replicas: ProcessGroup | None
) -> tuple[torch.optim.Optimizer, MasterAdamW]:
    """Return the optimizer of all parameters, and the one of those that are updated here (the same without shards)."""
    if replicas is None:
        alone = MasterAdamW(groups, **settings)
        return alone, alone
    from torch.distributed.optim import ZeroRedundancyOptimizer

    sharded = ZeroRedundancyOptimizer(groups, MasterAdamW, process_group=replicas, **settings)
    return sharded, sharded.optim


def _find(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state:
        raise CheckpointError(f"optimizer: {name}: missing")
    if state[name].shape != shape:
        raise CheckpointError(f"optimizer: {name}: shape {tuple(state[name].shape)}, expected {tuple(shape)}")
    return state[name]
