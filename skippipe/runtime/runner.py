"""What a training loop needs of a runtime, whatever runs underneath."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from skippipe.model.stage import Stage
from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe_scheduler.plan.simulate import Direction

Result = TypeVar("Result")
BatchLoader = Callable[[int], tuple[Tensor, Tensor]]
"""Gives (input_ids, labels) of a microbatch, int64 (B, T) each, on the CPU."""


class Span(NamedTuple):
    """One measured task of a plan's order, or reduction (REDUCE, microbatch -1); seconds since the iteration began."""

    node: str
    operation: str
    microbatch: int
    start_s: float
    end_s: float


COMPUTING: Final = frozenset("FLBW")
"""Operations that compute; relays and reductions do not."""


def computing_s(spans: Iterable[Span]) -> float:
    """Return the seconds of all tasks that compute."""
    return sum(span.end_s - span.start_s for span in spans if span.operation in COMPUTING)


class TransferWait(NamedTuple):
    """How long a receiver stood still for one message; seconds since the iteration began."""

    source: str
    destination: str
    microbatch: int
    hop: int
    direction: Direction
    start_s: float
    end_s: float


class IterationTotals(NamedTuple):
    """What this process has added up in an iteration: known at STEP, where the ranks' one sum is made.

    `loss` is the sum of loss / num_microbatches over the microbatches whose origin is here, so that the sum over
    ranks is the mean loss, and `exit_loss` the same right behind the origin's layers; `busy_s` is the time spent in
    tasks that compute, and `pace` that time over what the plan says of the same tasks: 0 where there was none, or where
    one process runs the tasks of all nodes. `waiting_s` is how long it stood still for messages.
    """

    loss: float
    busy_s: float
    exit_loss: float = 0.0
    pace: float = 0.0
    waiting_s: float = 0.0


@dataclass(frozen=True)
class IterationResult(Generic[Result]):
    """One iteration as this process saw it; `loss` and `busy_s` as in `IterationTotals`.

    Spans count from the moment at which this process began: no barrier makes ranks begin together. With emulation
    they begin together, and the spans lie on the emulated clock; `duration_s` is always wall clock.
    """

    loss: float
    duration_s: float
    busy_s: float
    spans: Sequence[Span]
    transfers: Sequence[TransferWait]
    step_result: Result
    """What `step` returned."""


class Runner(Protocol):
    """Runs iterations, each of any plan of one set, on the stages that this process holds."""

    plans: PlanSet
    rank: int
    iteration: int
    """Number of the last iteration, from 1; who continues a run sets it, so that messages name the step."""
    stages: dict[int, Stage]

    @property
    def replicas(self) -> ProcessGroup | None:
        """The group of the ranks that hold the same stage as this one; None where there is no other."""

    def with_replicas(self, call: Callable[[], Result]) -> Result:
        """Call something that waits for the other replicas; a failure is one of theirs."""

    def reduce_with(self, reduction: Callable[[float], None] | None) -> None:
        """Call `reduction` at REDUCE to sum this stage's gradients over its replicas and scale them.

        With None the runner does it. Every parameter has a gradient by then.
        """

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters for which this process answers: over all ranks, each that is trained exactly once."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters held here that are trained, under the names they are stored by."""

    def train_iteration(
        self,
        batch: BatchLoader,
        step: Callable[[], Result],
        plan: str = MAIN_PLAN,
        before_reduction: Callable[[], None] | None = None,
    ) -> IterationResult[Result]:
        """Run one iteration of a plan of the set; `step` is called when all gradients are in `.grad`.

        `before_reduction` is called when this process has done its tasks, before its first wait for other replicas.

        All ranks name the same plan. Another one than the last costs nothing: all are compiled and connected.

        `batch(microbatch)` gives (input_ids, labels), int64 (B, T), on the CPU. Gradients are the sum over all
        microbatches of d(loss / num_microbatches), times num_microbatches / visits where the options say "visits".
        Nothing else makes the ranks wait for each other: `step` is the place for the one sum over all of them.
        Raises `PeerLostError` where another rank stops.
        """

    def tally(self) -> IterationTotals:
        """Return what the running iteration (or the last one) has added up here; complete when `step` is called."""

    def evaluate(self, batch: BatchLoader, num_microbatches: int) -> float:
        """Return the mean loss at full depth, without gradients; the same number on every rank."""

    def sum_over_ranks(self, values: Sequence[float], own: Sequence[float] = ()) -> list[float]:
        """Return the sums over all ranks, in float64, the same on every rank.

        Behind them stands what each rank has given as its `own`, as many from each, in the order of ranks.
        """

    def abort(self) -> None:
        """Make every wait for other ranks fail, here and there; nothing but the stages can be used any more."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Release process groups."""
