"""AdamW with warm-up and a cosine, behind an interface that sharded back-ends can share.

State is a flat mapping from `<parameter name>.<key>` to a tensor, so that it can be stored by name and loaded under
another split of the model.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from skippipe.config import OptimizerOptions, SchedulerOptions
from skippipe.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
STEP = "step"


class OptimizerBackend(Protocol):
    """What the training loop needs of an optimizer."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""

    def step(self) -> None:
        """Update the parameters from their gradients and move on along the learning rate's schedule."""

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the state of the parameters `names`, on the CPU."""

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
    """Torch's AdamW on the parameters held here; decay on matrices only, fp32 master copies for other dtypes."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: OptimizerOptions,
        scheduler: SchedulerOptions,
        max_steps: int,
    ) -> None:
        self._parameters = dict(parameters)
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self._parameters.items()
        }
        matrices = [parameter for parameter in self._masters.values() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self._masters.values() if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)
        self._factor = lambda step: learning_rate_factor(step, max_steps, scheduler)
        self._schedule = LambdaLR(self._optimizer, self._factor)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def step(self) -> None:
        """Update the parameters from their gradients; see `OptimizerBackend`."""
        copied = [(self._parameters[name], master) for name, master in self._masters.items() if self._is_copy(name)]
        for parameter, master in copied:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._optimizer.step()
        self._schedule.step()
        with torch.no_grad():
            for parameter, master in copied:
                parameter.copy_(master)
                master.grad = None

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return moments, step count and master copy of the parameters `names`; nothing before the first step."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            held = self._optimizer.state.get(self._masters[name], {})
            tensors |= {f"{name}.{key}": held[key].detach().cpu() for key in (*MOMENTS, STEP) if key in held}
            if self._is_copy(name):
                tensors[f"{name}.{MASTER}"] = self._masters[name].detach().cpu()
        return tensors

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps; see `OptimizerBackend`. A missing master copy is made from the parameter."""
        for name, master in self._masters.items():
            if self._is_copy(name):
                master.copy_(state.get(f"{name}.{MASTER}", self._parameters[name]))
            if step == 0:
                continue
            moments = {key: _find(state, f"{name}.{key}", master.shape) for key in MOMENTS}
            self._optimizer.state[master] = {
                # Copies, because AdamW updates in place; the step count stays on the CPU, where AdamW makes it.
                STEP: _find(state, f"{name}.{STEP}", torch.Size()).clone(),
                **{key: tensor.to(master.device, torch.float32, copy=True) for key, tensor in moments.items()},
            }
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self._schedule = LambdaLR(self._optimizer, self._factor, last_epoch=step - 1)

    def _is_copy(self, name: str) -> bool:
        return self._masters[name] is not self._parameters[name]


def _find(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state:
        raise CheckpointError(f"optimizer: {name}: missing")
    if state[name].shape != shape:
        raise CheckpointError(f"optimizer: {name}: shape {tuple(state[name].shape)}, expected {tuple(shape)}")
    return state[name]
