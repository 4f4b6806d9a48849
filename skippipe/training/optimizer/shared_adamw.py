"""AdamW whose state is shared out among the replicas of a stage (ZeRO-1, Rajbhandari et al. 2020), by whole tensors.

Each replica updates its part of the parameters and sends it to the others. Where the run is to outlive its nodes, each
holds a second copy of another one's part in host memory, with the weights of that part, and updates it too, while new
weights are on their way: all replicas have all summed gradients, so that the copy costs no message and is never behind.
A step that has begun can be taken without the others: each updates what it holds, and weights that did not arrive come
with the next group.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from skippipe.config.experiment import OptimizerOptions, SchedulerOptions
from skippipe.errors import InputError
from skippipe.runtime.gradients.collectives import all_gather_text, begin_broadcast
from skippipe.runtime.ranks.whole_messages import Waitable, WholeMessage, receive_whole, send_whole
from skippipe.training.optimizer.adamw import AdamW
from skippipe.training.optimizer.clipping import WholeGradients
from skippipe.training.optimizer.interface import Guard
from skippipe.training.optimizer.master_adamw import LR_SCALE, MOMENTS, STEP
from skippipe.training.optimizer.settings import factor_of
from skippipe.training.optimizer.state_parts import (
    WEIGHTS,
    Holding,
    StatePart,
    Transfer,
    WeightsStand,
    handover,
    state_parts,
)
from skippipe_scheduler.files import parse, parse_json

NUMBERS = (STEP, LR_SCALE)
"""Keys of single numbers; the other tensors have the parameter's shape."""


class SharedAdamW(WholeGradients):
    """AdamW on the part of the parameters that is this replica's."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: OptimizerOptions,
        scheduler: SchedulerOptions,
        max_steps: int,
        replicas: ProcessGroup | None = None,
        guard: Guard | None = None,
        *,
        keeps_copies: bool = False,
    ) -> None:
        self._parameters = dict(parameters)
        self._options, self._scheduler, self._max_steps = options, scheduler, max_steps
        self._factor = factor_of(scheduler, max_steps)
        self._keeps_copies = keeps_copies
        self._steps = 0
        self._weights: WeightsStand = "right"
        self._has_state = True
        self._before: dict[str, dict[str, Tensor]] = {}
        self._replicas, self._guard = replicas, None if replicas is None else guard
        self._build()

    def _build(self) -> None:
        """Have an optimizer for each part that is to be held among the present replicas."""
        self._shares, rank = self._shares_among(self._replicas)
        own, copied = self._shares[rank]
        self._twins = {name: nn.Parameter(self._parameters[name].detach().cpu().clone()) for name in copied}
        self._own = self._adamw({name: self._parameters[name] for name in own})
        self._copy = self._adamw(self._twins)

    def _shares_among(self, replicas: ProcessGroup | None) -> tuple[list[StatePart], int]:
        """Return what each replica holds, and which one this is."""
        sizes = {name: parameter.numel() for name, parameter in self._parameters.items()}
        count, rank = (1, 0) if replicas is None else (replicas.size(), replicas.rank())
        return state_parts(sizes, count, copies=self._keeps_copies), rank

    def _adamw(self, parameters: Mapping[str, nn.Parameter]) -> AdamW | None:
        return AdamW(parameters, self._options, self._scheduler, self._max_steps) if parameters else None

    @property
    def _held(self) -> list[AdamW]:
        return [part for part in (self._own, self._copy) if part is not None]

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._options.lr * self._factor(self._steps)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are updated here, and those of the copy."""
        return tuple(name for part in self._held for name in part.names)

    @property
    def sharded(self) -> bool:
        """Whether the other replicas update other parameters."""
        return len(self._shares) > 1

    @property
    def resharing(self) -> "SharedAdamW":
        """Itself: it can be brought to other replicas."""
        return self

    def step(self) -> None:
        """Update what is held here, and send and receive weights meanwhile; where that raises, the update is done.

        Without a group, after `leave`, nothing is sent.
        """
        self._before = {}
        self._weights = "behind" if self.sharded else "right"
        if self._own is not None:
            self._own.step()
        under_way: list[Waitable] = []
        try:
            if self._guard is not None:
                under_way = self._guard(self._send_weights)
        finally:
            self._update_copy()
            self._steps += 1
        if self._guard is not None:
            self._guard(lambda: _wait(under_way))
            self._weights = "right"
            self._refresh_twins()

    def _update_copy(self) -> None:
        """Update the second copy, whose weights are its own: those of the stage arrive meanwhile."""
        for name, twin in self._twins.items():
            gradient = self._parameters[name].grad
            twin.grad = None if gradient is None else gradient.to(twin.device)
        if self._copy is not None:
            self._copy.step()
        for twin in self._twins.values():
            twin.grad = None

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return moments, step count and master copy of the parameters `names` that are updated here."""
        return {} if self._own is None else self._own.state(set(names).intersection(self._own.names))

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after `step` steps; see `OptimizerBackend`. A missing master copy is made from the parameter."""
        self._refresh_twins()
        for part in self._held:
            part.load(state, step)
        self._steps, self._weights, self._has_state, self._before = step, "right", True, {}

    def leave(self) -> None:
        """Let go of the group; see `Resharing`."""
        self._replicas, self._guard = None, None

    def lack_state(self, step: int) -> None:
        """Hold no state until the next group; see `Resharing`."""
        self._has_state, self._before = False, {}
        self._steps, self._weights = step, "given"

    def take_weights(self) -> None:
        """Take up weights that have come since `join`; see `Resharing`."""
        self._refresh_twins()

    def join(self, replicas: ProcessGroup | None, guard: Guard) -> int:
        """Share out the state among other replicas; see `Resharing`."""
        held = self._held_state() if self._has_state else {}
        with torch.no_grad():
            for name in held.keys() & self._twins.keys():
                self._parameters[name].copy_(self._twins[name])
        wanted, rank = self._shares_among(replicas)
        own = Holding(weights=self._weights, keys={name: tuple(state) for name, state in held.items()})
        self._replicas, self._guard = replicas, None if replicas is None else guard
        holdings = [own] if replicas is None else guard(lambda: _told(own, replicas))
        transfers, lost = handover(tuple(self._parameters), holdings, wanted)
        received = {} if replicas is None else guard(lambda: self._moved(transfers, held, replicas, rank))
        with torch.no_grad():
            for name, tensors in received.items():
                if WEIGHTS in tensors:
                    self._parameters[name].copy_(tensors[WEIGHTS])
        self._build()
        new = {name: self._new_state(name) for name in lost}
        states = {name: new.get(name) or held.get(name) or received.get(name, {}) for name in self.names}
        flat = {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}
        self.load(flat, self._steps)
        # Until the next step shows that all have what they need: one more may be lost before.
        self._before = held
        if replicas is not None:
            guard(lambda: dist.barrier(replicas))  # nobody asks for weights that are still being put right
        return sum(self._parameters[name].numel() for name in lost)

    def _held_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the state that is held here, on the CPU, by parameter and key."""
        held = {name: dict(state) for name, state in self._before.items()}
        for part in self._held:
            for name in part.names:
                held[name] = {key.removeprefix(f"{name}."): tensor for key, tensor in part.state([name]).items()}
        return held

    def _new_state(self, name: str) -> dict[str, Tensor]:
        """Return the state with which a parameter begins anew."""
        if not self._steps:
            return {}
        shape = self._parameters[name].shape
        return {key: torch.zeros(() if key == STEP else shape) for key in (*MOMENTS, STEP)}

    def _moved(
        self,
        transfers: Iterable[Transfer],
        held: Mapping[str, Mapping[str, Tensor]],
        replicas: ProcessGroup,
        rank: int,
    ) -> dict[str, dict[str, Tensor]]:
        """Send and receive what these transfers say; return what came, by parameter and key."""
        works, sent = list[WholeMessage](), list[Tensor]()
        received = defaultdict[str, dict[str, Tensor]](dict)
        for name, key, source, destination in transfers:
            parameter = self._parameters[name]
            if source == rank:
                sent.append((parameter.detach().cpu() if key == WEIGHTS else held[name][key]).contiguous())
                works.append(send_whole(sent[-1], replicas, destination, tag=0))
            elif destination == rank:
                dtype = parameter.dtype if key == WEIGHTS else torch.float32
                received[name][key] = torch.empty(() if key in NUMBERS else parameter.shape, dtype=dtype)
                works.append(receive_whole(received[name][key], replicas, source, tag=0))
        _wait(works)
        return received

    def _send_weights(self) -> list[Waitable]:
        """Begin to send the weights of the own part to the other replicas, and to receive those of theirs."""
        replicas = self._replicas
        assert replicas is not None
        return [
            work
            for rank, part in enumerate(self._shares)
            for name in part.own
            for work in begin_broadcast(self._parameters[name].detach(), replicas, rank)
        ]

    @torch.no_grad()
    def _refresh_twins(self) -> None:
        """Let the copies follow what the others' device has rounded in its way."""
        for name, twin in self._twins.items():
            twin.copy_(self._parameters[name])


def _told(own: Holding, replicas: ProcessGroup) -> list[Holding]:
    """Return what every replica has."""
    place = "what a replica has of the optimizer state"
    texts = all_gather_text(replicas, own.model_dump_json())
    return [parse(Holding, parse_json(text, place, InputError), place, InputError) for text in texts]


def _wait(works: Iterable[Waitable]) -> None:
    for work in works:
        work.wait()
