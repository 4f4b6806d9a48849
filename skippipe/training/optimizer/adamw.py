"""AdamW with warm-up and a cosine."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from skippipe.config.experiment import OptimizerOptions, SchedulerOptions
from skippipe.training.optimizer.clipping import WholeGradients
from skippipe.training.optimizer.master_adamw import LR_SCALE, MasterAdamW
from skippipe.training.optimizer.settings import factor_of, is_fused, parameter_groups, schedule_after, stored_state


class AdamW(WholeGradients):
    """AdamW on the parameters held here; decay on matrices only, fp32 master copies for other dtypes."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: OptimizerOptions,
        scheduler: SchedulerOptions,
        max_steps: int,
    ) -> None:
        self._parameters = dict(parameters)
        self._options = options
        self._lr_scales: dict[str, float] = {}
        self._optimizer = self._build()
        self._factor = factor_of(scheduler, max_steps)
        self._schedule = LambdaLR(self._optimizer, self._factor)

    def _build(self) -> MasterAdamW:
        options, device = self._options, next(iter(self._parameters.values())).device
        settings = {"lr": options.lr, "betas": options.betas, "eps": options.eps, "fused": is_fused(options, device)}
        scales = {self._parameters[name]: scale for name, scale in self._lr_scales.items()}
        return MasterAdamW(parameter_groups(self._parameters.values(), options, scales), **settings)

    @property
    def lr(self) -> float:
        """Learning rate of the next step, without the scales of single parameters."""
        return self._options.lr * self._factor(self._schedule.last_epoch)

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters."""
        return tuple(self._parameters)

    @property
    def sharded(self) -> bool:
        """False: every replica updates all."""
        return False

    @property
    def resharing(self) -> None:
        """None: every replica has all."""
        return None

    def step(self) -> None:
        """Update the parameters from their gradients; see `OptimizerBackend`."""
        self._optimizer.step()
        self._schedule.step()

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return moments, step count and master copy of the parameters `names`."""
        wanted = tuple(names)
        scales = {name: scale for name, scale in self._lr_scales.items() if name in wanted}
        return {
            f"{name}.{key}": tensor.detach().cpu()
            for name in wanted
            for key, tensor in self._optimizer.state_of(self._parameters[name]).items()
        } | {f"{name}.{LR_SCALE}": torch.tensor(scale) for name, scale in scales.items()}

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps; see `OptimizerBackend`. A missing master copy is made from the parameter."""
        scales = {name: float(state[f"{name}.{LR_SCALE}"]) for name in self.names if f"{name}.{LR_SCALE}" in state}
        if scales != self._lr_scales:
            self._lr_scales = scales
            self._optimizer = self._build()
        for name in self.names:
            parameter = self._parameters[name]
            self._optimizer.load_state_of(parameter, stored_state(state, name, parameter.shape, step))
        self._schedule = schedule_after(self._optimizer, self._factor, step)
