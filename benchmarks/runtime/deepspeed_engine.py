"""DeepSpeed's PipelineEngine as a contender: one pipeline over all ranks, on the same parts as the other rivals."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from parts import Batches, loss_of, make_optimizer, make_parts
from torch import Tensor

from skippipe.config.experiment import Experiment


class DeepSpeedEngine:
    """One rank of one pipeline."""

    def __init__(self, experiment: Experiment) -> None:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
        from deepspeed.pipe import PipelineModule

        __compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled on the spot; gloo is what all use
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        world_size = torch.distributed.get_world_size()
        module = PipelineModule(
            layers=list(make_parts(experiment, world_size)),
            num_stages=world_size,
            loss_fn=loss_of,
            partition_method="uniform",
            activation_checkpoint_interval=0,
        )
        training = experiment.training
        config = {
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": training.num_microbatches,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self._engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(experiment, module.parameters()),
            config=config,
            dist_init_required=False,
        )
        self._ends = module.stage_id in (0, world_size - 1)
        self._batches = Batches(experiment)
        self._step = 0

    def step(self) -> float:
        """Run one step; every rank is told the loss."""
        self._step += 1
        return float(self._engine.train_batch(self._samples(self._step - 1) if self._ends else None))

    def requests(self) -> dict[str, Callable[..., Any]]:
        """Return nothing: steps are all it does."""
        return {}

    def _samples(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches.of_step(step))


def make(experiment: Experiment, options: dict[str, Any]) -> DeepSpeedEngine:
    """Return this rank."""
    return DeepSpeedEngine(experiment)
