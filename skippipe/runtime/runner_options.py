"""How a runner executes: shapes, dtypes, devices, transport; made from an experiment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PretrainedConfig

from skippipe.config.experiment import EmulationOptions, Experiment, PowerSgdOptions
from skippipe.config.lora_options import LoraOptions
from skippipe.config.recipe_options import RecipeOptions
from skippipe.model.activations.activation_checkpointing import Mode
from skippipe.model.device import choose_device, torch_dtype
from skippipe.runtime.plans.visit_scales import visit_scales
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.transport.wire import ActivationCompression, Wire
from skippipe_scheduler.plan.plan import Plan


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
    sums_by_region: bool = False
    """Whether exact sums of gradients go within each region first, and then between the regions."""
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
    lora: LoraOptions = field(default_factory=LoraOptions)
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

    def scales(self, plan: Plan, stage: int) -> Mapping[int, float]:
        """Return by what a stage's residual is multiplied in training, for each microbatch that does not count as 1."""
        return visit_scales(plan, stage) if self.recipe.rescale_stages else {}


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
        dtype=torch_dtype(training.dtype),
        device=device,
        gradient_normalization=training.gradient_normalization,
        activation_checkpointing=training.activation_checkpointing,
        compile=training.compile,
        activation_dtype=_dtype(comm.activation_dtype),
        gradient_dtype=_dtype(comm.gradient_dtype),
        activation_compression=comm.activation_compression,
        gradient_compression=comm.gradient_compression,
        sums_by_region=experiment.pipeline.reduction == "hierarchical",
        error_feedback=comm.error_feedback,
        powersgd=comm.powersgd,
        receive_window=comm.receive_window,
        executor=comm.executor,
        backend=backend,
        matching="order" if backend == "nccl" else "tags",
        emulation=experiment.emulation,
        recipe=experiment.recipe,
        lora=experiment.lora,
        max_steps=training.max_steps,
        seed=experiment.seed,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else torch_dtype(name)
