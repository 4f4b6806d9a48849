"""What a training loop needs of a runtime, whatever runs underneath."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from skippipe.config.experiment import EmulationOptions, Experiment, PowerSgdOptions
from skippipe.config.recipe_options import RecipeOptions
from skippipe.errors import ConfigError, PlanError
from skippipe.model.activation_checkpointing import Mode, enable
from skippipe.model.compilation import check_compilable, compile_stage, warm_up
from skippipe.model.device import choose_device
from skippipe.model.stage import Stage, build_stage
from skippipe.plans.plan_set import MAIN, PlanSet
from skippipe.runtime.program.program import Direction
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.exchange import gather
from skippipe.runtime.transport.wire import ActivationCompression, Wire
from skippipe_scheduler.plan.plan import Plan

COMPILATION_LIMIT_S = 1800.0
"""A rank that has not compiled its stage by then is given up."""

Batch = Callable[[int], tuple[Tensor, Tensor]]
"""Gives (input_ids, labels) of a microbatch, int64 (B, T) each, on the CPU."""


class Span(NamedTuple):
    """One measured task (F, L, B, W) or reduction (REDUCE, microbatch -1); seconds since the iteration began."""

    node: str
    operation: str
    microbatch: int
    start_s: float
    end_s: float


class Wait(NamedTuple):
    """How long a receiver stood still for one message; seconds since the iteration began."""

    source: str
    destination: str
    microbatch: int
    hop: int
    direction: Direction
    start_s: float
    end_s: float


class Tally(NamedTuple):
    """What this process has added up in an iteration: known at STEP, where the ranks' one sum is made.

    `loss` is the sum of loss / num_microbatches over the microbatches whose origin is here, so that the sum over
    ranks is the mean loss, and `exit_loss` the same right behind the origin's layers; `busy_s` is the time spent in
    tasks.
    """

    loss: float
    busy_s: float
    exit_loss: float = 0.0


@dataclass(frozen=True)
class IterationResult:
    """One iteration as this process saw it; `loss` and `busy_s` as in `Tally`.

    Spans count from the moment at which this process began: no barrier makes ranks begin together. With emulation
    they begin together, and the spans lie on the emulated clock; `duration_s` is always wall clock.
    """

    loss: float
    duration_s: float
    busy_s: float
    spans: Sequence[Span]
    transfers: Sequence[Wait]


@dataclass(frozen=True)
class RunnerOptions:
    """Shape of an activation and how to run it."""

    micro_batch_size: int
    sequence_length: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    gradient_normalization: Literal["global", "visits"] = "global"
    activation_checkpointing: Mode = "none"
    compile: bool = False
    activation_dtype: torch.dtype | None = None
    """In what activations travel; `dtype` where None."""
    gradient_dtype: torch.dtype | None = None
    """In what gradients travel between replicas; `dtype` where None."""
    activation_compression: ActivationCompression = "none"
    gradient_compression: Literal["none", "int8", "powersgd"] = "none"
    error_feedback: bool = True
    powersgd: PowerSgdOptions = field(default_factory=PowerSgdOptions)
    receive_window: int = 16
    executor: Literal["static", "dynamic"] = "static"
    backend: Literal["gloo", "nccl"] = "gloo"
    """What carries activations between stages."""
    matching: Literal["tags", "order"] = "tags"
    """How the static executor's messages find their receive; NCCL knows order only."""
    emulation: EmulationOptions = field(default_factory=EmulationOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    max_steps: int = 1
    """Steps over which a recipe's probabilities grow."""
    seed: int = 0
    """Seed of a recipe's draws."""

    @property
    def wire(self) -> Wire:
        """What travels between stages: activations (B, T, D) and their gradients."""
        shape = self.micro_batch_size, self.sequence_length, self.hidden_size
        return Wire(shape, self.activation_dtype or self.dtype, self.activation_compression)

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation on its way."""
        return self.wire.size_bytes


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

    def with_replicas(self, call: Callable[[], object]) -> None:
        """Call something that waits for the other replicas; a failure is one of theirs."""

    def reduce_with(self, reduction: Callable[[float], None] | None) -> None:
        """Call `reduction` at REDUCE to sum this stage's gradients over its replicas and scale them.

        With None the runner does it. Every parameter has a gradient by then.
        """

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters for which this process answers: over all ranks, each of the model's exactly once."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters held here, under their Hugging Face names."""

    def train_iteration(self, batch: Batch, step: Callable[[], None], plan: str = MAIN) -> IterationResult:
        """Run one iteration of a plan of the set; `step` is called when all gradients are in `.grad`.

        All ranks name the same plan. Another one than the last costs nothing: all are compiled and connected.

        `batch(microbatch)` gives (input_ids, labels), int64 (B, T), on the CPU. Gradients are the sum over all
        microbatches of d(loss / num_microbatches), times num_microbatches / visits where the options say "visits".
        Nothing else makes the ranks wait for each other: `step` is the place for the one sum over all of them.
        Raises `PeerLostError` where another rank stops.
        """

    def tally(self) -> Tally:
        """Return what the running iteration (or the last one) has added up here; complete when `step` is called."""

    def evaluate(self, batch: Batch, num_microbatches: int) -> float:
        """Return the mean loss at full depth, without gradients; the same number on every rank."""

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, in float64, the same on every rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Release process groups."""


def make_runner(
    experiment: Experiment, plans: Plan | PlanSet, config: PretrainedConfig, context: DistributedContext
) -> Runner:
    """Build this process's stages and the runner for them: one process runs all stages, several one node each.

    Raises `PlanError` where the plans do not fit the model or the number of processes.
    """
    from skippipe.runtime.distributed_runner import DistributedRunner
    from skippipe.runtime.local_runner import LocalRunner

    plans = PlanSet.of(plans)
    plan = plans.main
    check_plan(plan, config.num_hidden_layers, context.world_size)
    options = runner_options(experiment, config, context)
    if options.compile:
        _check_compilable(plans, options)
    if context.world_size == 1:
        stages = {stage: make_stage(plan, stage, config, experiment.seed, options) for stage in range(len(plan.stages))}
        return LocalRunner(plans, stages, options)
    index = plan.stage_of[plan.nodes[context.rank]]
    build = partial(make_stage, plan, index, config, experiment.seed, options)
    stage = compiled_together(build, context) if options.compile else build()
    return DistributedRunner(plans, stage, context, options)


def _check_compilable(plans: PlanSet, options: RunnerOptions) -> None:
    check_compilable(options.device, options.activation_checkpointing)
    if any(any(plan.split_of.values()) for _, plan in plans.items()):
        raise ConfigError(
            "training.compile: the plan splits backwards, and a compiled backward is one piece; turn compile off, or "
            "make a plan with pipeline.split_backward=false"
        )


def compiled_together(build: Callable[[], Stage], context: DistributedContext) -> Stage:
    """Return the compiled stage of `build` once every rank has its own; where one fails, all raise its `ConfigError`.

    Ranks meet outside of any process group: compiling may take longer than `comm.timeout_s`.
    """
    built: list[Stage] = []

    def build_own() -> None:
        try:
            built.append(build())
        except RuntimeError as reason:  # whatever torch.compile and its compilers raise
            first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
            raise ConfigError(
                f"training.compile: the stage cannot be compiled: {first_line}; set training.compile to false"
            ) from reason

    gather(context, "compiled", build_own, limit_s=COMPILATION_LIMIT_S)
    return built[0]


def runner_options(experiment: Experiment, config: PretrainedConfig, context: DistributedContext) -> RunnerOptions:
    """Return how the experiment wants to be run; all ranks call this together."""
    from skippipe.runtime.ranks.backend import choose_backend

    training, comm = experiment.training, experiment.comm
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    device = choose_device(training.device, context.local_rank)
    emulated = experiment.emulation.links or experiment.emulation.compute
    needs_gloo = comm.executor == "dynamic" or emulated
    asked = "gloo" if needs_gloo and comm.backend == "auto" else comm.backend
    backend = choose_backend(asked, device, context)
    return RunnerOptions(
        micro_batch_size=training.micro_batch_size,
        sequence_length=training.sequence_length,
        hidden_size=config.hidden_size,
        dtype=getattr(torch, training.dtype),
        device=device,
        gradient_normalization=training.gradient_normalization,
        activation_checkpointing=training.activation_checkpointing,
        compile=training.compile,
        activation_dtype=_dtype(comm.activation_dtype),
        gradient_dtype=_dtype(comm.gradient_dtype),
        activation_compression=comm.activation_compression,
        gradient_compression=comm.gradient_compression,
        error_feedback=comm.error_feedback,
        powersgd=comm.powersgd,
        receive_window=comm.receive_window,
        executor=comm.executor,
        backend=backend,
        matching="order" if backend == "nccl" else "tags",
        emulation=experiment.emulation,
        recipe=experiment.recipe,
        max_steps=training.max_steps,
        seed=experiment.seed,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def check_plan(plan: Plan, num_layers: int, world_size: int) -> None:
    """Raise `PlanError` where the plan was made for another model or another number of processes."""
    if plan.num_layers != num_layers:
        raise PlanError(
            f"the plan splits {plan.num_layers} layers but the model has {num_layers}; make a plan for this model"
        )
    if world_size not in (1, len(plan.nodes)):
        raise PlanError(
            f"{world_size} processes run but the plan has {len(plan.nodes)} nodes; start {len(plan.nodes)} processes "
            "(torchrun: nnodes times nproc-per-node), or one to run every stage in it"
        )


def make_stage(plan: Plan, stage: int, config: PretrainedConfig, seed: int, options: RunnerOptions) -> Stage:
    """Build one stage of the plan; stage 0 also holds the embedding, the final norm and the head."""
    first, last = plan.stages[stage].layers
    built = build_stage(config, first, last, ends=stage == 0, seed=seed, device=options.device, dtype=options.dtype)
    enable(built, options.activation_checkpointing)
    if options.compile:
        compile_stage(built)
        warm_up(built, options.wire.shape, options.device)
    return built
