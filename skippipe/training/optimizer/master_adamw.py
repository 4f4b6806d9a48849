"""AdamW that keeps fp32 master copies of parameters in another dtype, as one torch optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
STEP = "step"
LR_SCALE = "lr_scale"
"""By what the learning rate of a parameter is multiplied, where that is not 1."""


class MasterAdamW(torch.optim.Optimizer):
    """Torch's AdamW on fp32 copies of the parameters, or on the parameters themselves where they are fp32.

    After a step the parameters are their copies, rounded.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)
        self.masters: dict[nn.Parameter, nn.Parameter] = {
            parameter: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for group in self.param_groups
            for parameter in group["params"]
        }
        copied = [
            {**group, "params": [self.masters[parameter] for parameter in group["params"]]}
            for group in self.param_groups
        ]
        self._inner = torch.optim.AdamW(copied, fused=options.get("fused", False))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters from their gradients; `closure` is not supported."""
        if closure is not None:
            raise ValueError("a closure would run the model again; give none")
        copied = [(parameter, master) for parameter, master in self.masters.items() if parameter is not master]
        for parameter, master in copied:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"] = group["lr"]
        self._inner.step()
        for parameter, master in copied:
            parameter.copy_(master)
            master.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return moments, step count (both after the first step) and master copy of one parameter, where it is held."""
        master = self.masters.get(parameter)
        if master is None:
            return {}
        held = self._inner.state.get(master, {})
        tensors = {key: held[key] for key in (*MOMENTS, STEP) if key in held}
        return tensors if master is parameter else tensors | {MASTER: master.detach()}

    @torch.no_grad()
    def load_state_of(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Put back what `state_of` gave; without a master copy it is made from the parameter."""
        master = self.masters[parameter]
        if master is not parameter:
            master.copy_(state.get(MASTER, parameter))
        if STEP in state:
            # Copies, because AdamW updates in place; it keeps the step count on the CPU unless it is fused.
            moments = {key: state[key].to(master.device, torch.float32, copy=True) for key in MOMENTS}
            place = master.device if self._inner.defaults["fused"] else torch.device("cpu")
            self._inner.state[master] = {STEP: state[STEP].to(place, copy=True), **moments}
