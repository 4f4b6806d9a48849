"""AdamW with warm-up and a cosine, whole on every replica of a stage or sharded over them by torch."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LambdaLR

from skippipe.config.experiment import OptimizerOptions, SchedulerOptions
from skippipe.training.optimizer.clipping import clip, squared_norm
from skippipe.training.optimizer.interface import Guard
from skippipe.training.optimizer.master_adamw import LR_SCALE, MasterAdamW
from skippipe.training.optimizer.settings import factor_of, is_fused, parameter_groups, schedule_after, stored_state


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
        self._guard, self._options, self._replicas = guard, options, replicas
        self._lr_scales: dict[str, float] = {}
        self._optimizer, self._held = self._build()
        self._factor = factor_of(scheduler, max_steps)
        self._schedule = LambdaLR(self._optimizer, self._factor)

    def _build(self) -> tuple[torch.optim.Optimizer, MasterAdamW]:
        """Return the optimizer of all parameters, and the one of those that are updated here."""
        options, device = self._options, next(iter(self._parameters.values())).device
        settings = {"lr": options.lr, "betas": options.betas, "eps": options.eps, "fused": is_fused(options, device)}
        scales = {self._parameters[name]: scale for name, scale in self._lr_scales.items()}
        return _optimizers(parameter_groups(self._parameters.values(), options, scales), settings, self._replicas)

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

    @property
    def reduce(self) -> Callable[[float], None] | None:
        """None: the runner sums the gradients."""
        return None

    def squared_norm(self, owned: Iterable[nn.Parameter]) -> float:
        """Return the squared norm of the gradients of `owned`; see `OptimizerBackend`."""
        return squared_norm(owned)

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradients where the global norm is too large; see `OptimizerBackend`."""
        clip(self._parameters.values(), norm, max_norm)

    def step(self) -> None:
        """Update the parameters from their gradients; see `OptimizerBackend`."""
        if self._guard is None:
            self._optimizer.step()
        else:
            self._guard(self._optimizer.step)
        self._schedule.step()

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return moments, step count and master copy of the parameters `names` that are updated here."""
        wanted = tuple(names)
        scales = {name: scale for name, scale in self._lr_scales.items() if name in wanted}
        return {
            f"{name}.{key}": tensor.detach().cpu()
            for name in wanted
            for key, tensor in self._held.state_of(self._parameters[name]).items()
        } | {f"{name}.{LR_SCALE}": torch.tensor(scale) for name, scale in scales.items()}

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps; see `OptimizerBackend`. A missing master copy is made from the parameter.

        Where the state is sharded, all parameters have the same learning rate.
        """
        scales = {name: float(state[f"{name}.{LR_SCALE}"]) for name in self.names if f"{name}.{LR_SCALE}" in state}
        if scales != self._lr_scales and not self.sharded:
            self._lr_scales = scales
            self._optimizer, self._held = self._build()
        for name in self.names:
            parameter = self._parameters[name]
            self._held.load_state_of(parameter, stored_state(state, name, parameter.shape, step))
        self._schedule = schedule_after(self._optimizer, self._factor, step)

    def close(self) -> None:
        """Return at once: there is nothing to release."""


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
