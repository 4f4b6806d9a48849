"""What the training loop needs of an optimizer.

State is a flat mapping from `<parameter name>.<key>` to a tensor, so that it can be stored by name and loaded under
another split of the model, another number of replicas or another back-end. The keys are `exp_avg`, `exp_avg_sq` and
`step` (a single number), `master` for the fp32 copy of a parameter in another dtype, and `lr_scale` (a single number)
where a parameter's learning rate is multiplied by that.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class Guard(Protocol):
    """Calls something that waits for the other replicas, and turns its failure into one that names them."""

    def __call__(self, call: Callable[[], Result], /) -> Result:
        """Return what `call` returns."""


class Resharing(Protocol):
    """Brings state that is shared out from one group of replicas to another one."""

    def leave(self) -> None:
        """Let go of the group: a step from now on updates what is held here, and sends nothing."""

    def lack_state(self, step: int) -> None:
        """Stand behind `step` steps without state, until `join` or `load` brings it.

        Weights come from another replica, before `join` or after it, which `take_weights` says.
        """

    def take_weights(self) -> None:
        """Take up the weights that another replica has given."""

    def join(self, replicas: ProcessGroup | None, guard: Guard) -> int:
        """Take the right weights, and a share of the state, among the replicas, which all call this; None: all of it.

        Returns of how many of the stage's numbers nobody had the state: it begins anew. Where `guard` raises, all that
        was held is held still.
        """


class OptimizerBackend(Protocol):
    """Updates the parameters of one rank; the replicas of a stage call it together."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters whose state is held here, or a part of it."""

    @property
    def sharded(self) -> bool:
        """Whether the other replicas hold other parts of the state."""

    @property
    def reduce(self) -> Callable[[float], None] | None:
        """Sums all `.grad` over the replicas at REDUCE and scales them; None where the runner does it."""

    @property
    def resharing(self) -> Resharing | None:
        """What brings the state to other replicas; None where each has all, or it cannot be brought."""

    def squared_norm(self, owned: Iterable[nn.Parameter]) -> float:
        """Return this rank's part of the squared norm of the whole model's gradient.

        `owned` are the parameters for which this rank answers. The parts of all ranks count every parameter once.
        """

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradients by max_norm / norm where the global `norm` is larger."""

    def step(self) -> None:
        """Update the parameters from their gradients and move on along the learning rate's schedule.

        With `resharing`, what is held here is updated also where this raises, because another replica is lost.
        """

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the state of those of the parameters `names` that this rank saves, on the CPU.

        Over the replicas each parameter is saved once where the state is sharded; they call this together.
        """

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps with the state of all parameters; raise `CheckpointError` where some is missing.

        Before the first step (0) there is none. The parameters themselves must have been loaded before.
        """

    def close(self) -> None:
        """Release what is held beside the parameters."""
