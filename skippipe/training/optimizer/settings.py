"""What all back-ends share: the learning rate's schedule, which parameters decay, and reading state by name."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from skippipe.config.experiment import OptimizerOptions, SchedulerOptions
from skippipe.errors import CheckpointError
from skippipe.training.optimizer.master_adamw import MASTER, MOMENTS, STEP


def learning_rate_factor(step: int, max_steps: int, options: SchedulerOptions) -> float:
    """Return the learning rate of step `step` (from 0) relative to its peak.

    It rises linearly to 1 at the last step of the warm-up and falls along a cosine to `min_lr_ratio` at the last step.
    """
    done = step + 1
    if done <= options.warmup_steps:
        return done / options.warmup_steps
    progress = min(1.0, (done - options.warmup_steps) / max(1, max_steps - options.warmup_steps))
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def factor_of(scheduler: SchedulerOptions, max_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of the step."""
    return lambda step: learning_rate_factor(step, max_steps, scheduler)


def schedule_after(optimizer: torch.optim.Optimizer, factor: Callable[[int], float], step: int) -> LambdaLR:
    """Return the schedule of an optimizer that has done `step` steps."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def is_fused(options: OptimizerOptions, device: torch.device) -> bool:
    """Return whether one kernel does the whole update of parameters on `device`."""
    return device.type == "cuda" if options.fused == "auto" else options.fused


def parameter_groups(
    parameters: Iterable[nn.Parameter], options: OptimizerOptions, lr_scales: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay, vectors do not. `lr_scales` multiply the rate of single parameters."""
    scales, groups = lr_scales or {}, defaultdict[tuple[bool, float], list[nn.Parameter]](list)
    for parameter in parameters:
        groups[parameter.ndim < 2, scales.get(parameter, 1.0)].append(parameter)
    return [
        {"params": group, "weight_decay": 0.0 if is_vector else options.weight_decay, "lr": options.lr * scale}
        for (is_vector, scale), group in sorted(groups.items(), key=lambda entry: entry[0])
    ]


def new_state(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state, as a checkpoint stores it, of parameters that have taken no step."""
    moments = {
        f"{name}.{moment}": torch.zeros_like(parameter, dtype=torch.float32, device="cpu")
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }
    return moments | {f"{name}.{STEP}": torch.tensor(0.0) for name in parameters}


def stored_state(state: Mapping[str, Tensor], name: str, shape: torch.Size, step: int) -> dict[str, Tensor]:
    """Return the stored state of one parameter by key; raise `CheckpointError` where it is missing or misshapen.

    There is none before the first step, but for a master copy.
    """
    shapes = dict.fromkeys(MOMENTS, shape) | {STEP: torch.Size()}
    found = {key: _find(state, f"{name}.{key}", expected) for key, expected in shapes.items()} if step else {}
    if f"{name}.{MASTER}" in state:
        found[MASTER] = _find(state, f"{name}.{MASTER}", shape)
    return found


def _find(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state:
        raise CheckpointError(f"optimizer: {name}: missing")
    if state[name].shape != shape:
        raise CheckpointError(f"optimizer: {name}: shape {tuple(state[name].shape)}, expected {tuple(shape)}")
    return state[name]
