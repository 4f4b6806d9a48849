"""The compute of one stage: tasks of one microbatch each, and the activations held between forward and backward."""

import zlib
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from skippipe.model.dropout.layer_dropout import StageDropout, rescaled
from skippipe.model.linear.weight_gradients import Product, WeightGradients
from skippipe.model.stage import Stage
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.program.faults import Faults
from skippipe.runtime.program.program import RELAYS, Opcode
from skippipe.runtime.runner_options import RunnerOptions


class StageCompute:
    """Runs the tasks of one stage. Tensors in and out are on the stage's device; a relay returns what it is given.

    Between its forward and its backward a microbatch holds its input and its output; with gradients off, nothing. The
    backwards of the microbatches in `split` leave the gradients of the weights to WEIGHT, and hold what it needs; an
    iteration may name others, or none, where some are named here.

    What a model's own dropout draws follows from the seed, the step, the microbatch and the stage, not from who
    computes when: a resumed run and another node draw the same.

    With an `exit_weight` the hidden state right behind the origin's own layers has a loss too, times that weight.

    In training, what the stage adds to a microbatch is multiplied by its scale of the iteration, 1 where there is none.
    """

    def __init__(
        self,
        stage: Stage,
        device: torch.device,
        split: Set[int] = frozenset(),
        dropout: StageDropout | None = None,
        exit_weight: float = 0.0,
        seed: int = 0,
        faults: Faults | None = None,
    ) -> None:
        self.stage = stage
        self._dropout = dropout
        self._exit_weight = exit_weight
        self._seed = seed
        self._faults = faults or Faults()
        self.split = split
        self._weights = WeightGradients(stage.body) if split else None
        self.device = device
        self.dtype = next(stage.parameters()).dtype
        self.reset(num_microbatches=1)

    def reset(
        self,
        num_microbatches: int,
        split: Set[int] | None = None,
        step: int = 0,
        scales: Mapping[int, float] | None = None,
    ) -> None:
        """Forget everything held and start to add up the loss of iteration `step`, of `num_microbatches`."""
        if split is not None:
            self.split = split
        self._step = step
        self._scales = scales or {}
        self.loss_sum = 0.0
        self.exit_loss_sum = 0.0
        self._exit_gradients: dict[int, Tensor] = {}
        self._num_microbatches = num_microbatches
        self._samples: dict[int, tuple[Tensor, Tensor]] = {}
        self._held: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._products: dict[int, list[Product]] = {}

    def load(self, microbatch: int, input_ids: Tensor, labels: Tensor) -> None:
        """Bring a microbatch's samples (B, T) to the device of its origin."""
        self._samples[microbatch] = (input_ids.to(self.device), labels.to(self.device))

    def run(self, opcode: Opcode, microbatch: int, received: Tensor | None) -> Tensor | None:
        """Run one task on what was received for it; return what to send.

        Nothing is received for the forward at the origin and for a WEIGHT, which has nothing to send either.
        """
        self._faults.reached(opcode.value, self._step + 1)
        if opcode is Opcode.FORWARD:
            return self.forward(microbatch, received)
        if opcode is Opcode.WEIGHT:
            self.weight(microbatch)
            return None
        if received is None:
            raise ValueError(f"{opcode} of microbatch {microbatch} needs an input")
        if opcode in RELAYS:
            return received
        return self.loss(microbatch, received) if opcode is Opcode.LOSS else self.backward(microbatch, received)

    def forward(self, microbatch: int, hidden: Tensor | None) -> Tensor:
        """Return the hidden state (B, T, D) behind the stage; at the origin `hidden` is None: samples are embedded."""
        self._begin(microbatch)
        if self.stage.training:
            torch.manual_seed(zlib.crc32(f"{self._seed}/{self._step}/{microbatch}/{self.stage.first}".encode()))
        if hidden is None:
            output = self.stage(self.stage.embed(self._samples[microbatch][0]))
        else:
            hidden = hidden.detach().requires_grad_(torch.is_grad_enabled())
            scale = self._scales.get(microbatch, 1.0) if self.stage.training else 1.0
            output = rescaled(hidden, self.stage(hidden), scale)
        if torch.is_grad_enabled():
            self._held[microbatch] = (hidden, output)
        detached: Tensor = output.detach()
        return detached

    def loss(self, microbatch: int, hidden: Tensor) -> Tensor | None:
        """Add the loss of `hidden` (B, T, D) over the number of microbatches; return its gradient by `hidden`."""
        hidden = hidden.detach().requires_grad_(torch.is_grad_enabled())
        _, labels = self._samples.pop(microbatch)
        loss = self.stage.loss(hidden, labels) / self._num_microbatches
        if torch.is_grad_enabled():
            torch.autograd.backward(loss)
            if self._exit_weight > 0:
                self._exit(microbatch, labels)
        self.loss_sum += float(loss.detach())
        return hidden.grad

    def _exit(self, microbatch: int, labels: Tensor) -> None:
        """Add the loss of what the origin's forward has given, and keep its gradient for the origin's backward."""
        _, output = self._held[microbatch]
        early = output.detach().requires_grad_()  # (B, T, D)
        loss = self.stage.loss(early, labels) / self._num_microbatches
        torch.autograd.backward(self._exit_weight * loss)
        self.exit_loss_sum += float(loss.detach())
        if early.grad is not None:
            self._exit_gradients[microbatch] = early.grad

    def backward(self, microbatch: int, gradient: Tensor) -> Tensor | None:
        """Add to the parameters' gradients; return the gradient (B, T, D) by the stage's input, None at the origin."""
        self._begin(microbatch)
        hidden, output = self._held.pop(microbatch)
        if microbatch in self._exit_gradients:
            gradient = gradient + self._exit_gradients.pop(microbatch)
        if self._weights is not None and microbatch in self.split:
            with self._weights.deferred() as products:
                _backward(output, gradient)
            self._products[microbatch] = products
        else:
            _backward(output, gradient)
        return None if hidden is None else hidden.grad

    def weight(self, microbatch: int) -> None:
        """Add the gradients of the weights that the microbatch's backward has left."""
        for product in self._products.pop(microbatch):
            product.add()

    def _begin(self, microbatch: int) -> None:
        if self._dropout is not None:
            self._dropout.begin(self._step, microbatch)

    def finish(self) -> None:
        """Wait until the device has done all that was asked, so that clocks tell the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _backward(output: Tensor, gradient: Tensor) -> None:
    """Add to the gradients behind `output`: none where a frozen embedding went past layers that were left out."""
    if output.requires_grad:
        torch.autograd.backward(output, gradient)


def make_compute(stage: Stage, plans: PlanSet, options: RunnerOptions, faults: Faults | None = None) -> StageCompute:
    """Return the compute of a stage in training by the options' recipe, along any plan of the set.

    Raises `ConfigError` where the model's layers have no part that the recipe leaves out.
    """
    recipe, num_layers = options.recipe, plans.main.num_layers
    dropout = None
    if recipe.leaves_out:
        dropout = StageDropout(
            stage,
            recipe,
            num_layers=num_layers,
            micro_batch_size=options.micro_batch_size,
            max_steps=options.max_steps,
            seed=options.seed,
        )
    nodes = next(planned.nodes for planned in plans.main.stages if planned.layers == (stage.first, stage.last))
    split = frozenset().union(*(plan.split_of[node] for _, plan in plans.items() for node in nodes))
    return StageCompute(stage, options.device, split, dropout, recipe.early_exit_loss, options.seed, faults)
