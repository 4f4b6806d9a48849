"""What one microbatch of an experiment costs: FLOP, bytes on links, bytes held, for the planner."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from skippipe.config.experiment import Experiment
from skippipe.model.activations.activation_memory import (
    ActivationCase,
    ActivationMemory,
    activation_memory,
    tell_activation_memory,
)
from skippipe.model.architecture import experiment_model
from skippipe.model.cost import model_cost
from skippipe.model.device import torch_dtype
from skippipe.model.dropout.probability import mean_share
from skippipe.runtime.gradients.compression import int8_gradient_bytes, powersgd_gradient_bytes
from skippipe.runtime.gradients.reduction import BUCKET_BYTES, BUCKETS_IN_FLIGHT
from skippipe.runtime.ranks.agreement import on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.runtime.transport.wire import Wire
from skippipe_scheduler.problem.workload import Workload

MESSAGES_PER_RECEIVE = 2
"""Room that is set aside for messages, as a multiple of the receive window: as many again that wait to be sent.

Chosen: more wait only behind a slow peer, up to `executor_factory.UNFINISHED_SENDS_PER_RECEIVE`, where training stops
to wait for it.
"""


def experiment_workload(experiment: Experiment) -> Workload:
    """Return what one microbatch costs in FLOP and bytes; the model is built on the meta device only.

    It is the same whatever machine asks: `Workload.on` says what of it counts on a node.
    """
    training, case = experiment.training, activation_case(experiment)
    shape, dtype = case.shape, case.dtype
    cost = model_cost(case.config, *shape, dtype, case.mode, case.lora)
    memory = activation_memory(case)
    sent = torch_dtype(experiment.comm.activation_dtype or training.dtype)
    gradient_bytes, optimizer_bytes = _trained_bytes(experiment, dtype.itemsize)
    sharded = experiment.optimizer.traits.shards_state
    splits = experiment.pipeline.split_backward
    kept_bytes = optimizer_bytes if not sharded else 0
    activation_bytes = Wire((*shape, case.config.hidden_size), sent, experiment.comm.activation_compression).size_bytes
    copied_bytes = dtype.itemsize + kept_bytes
    offloaded_bytes = optimizer_bytes if experiment.optimizer.offload else 0
    window = min(experiment.comm.receive_window, training.num_microbatches)
    update_bytes = 4 if dtype.itemsize < 4 else 0  # fp32 gradients for the master copies
    computed = mean_share(
        experiment.recipe, num_layers=cost.num_layers, max_steps=training.max_steps, ffn_share=cost.ffn_share
    )
    return Workload(
        num_layers=cost.num_layers,
        layer_forward_flop=cost.layer_forward_flop * computed,
        loss_flop=cost.loss_flop * experiment.recipe.num_losses,
        activation_bytes=activation_bytes,
        layer_gradient_bytes=_gradient_bytes(experiment, cost.layer_shapes) // cost.num_layers,
        embedding_and_head_gradient_bytes=_gradient_bytes(experiment, cost.embedding_and_head_shapes),
        layer_state_bytes=cost.layer_parameters * dtype.itemsize
        + cost.layer_trained_parameters * (gradient_bytes + kept_bytes),
        # The embedding is one tensor, which one replica keeps whole.
        embedding_and_head_state_bytes=cost.embedding_and_head_parameters * dtype.itemsize
        + cost.embedding_and_head_trained_parameters * (gradient_bytes + optimizer_bytes),
        layer_shared_bytes=cost.layer_trained_parameters * optimizer_bytes if sharded else 0,
        # Between its input and its weight gradient a microbatch may hold more than what was kept for its backward.
        layer_resident_bytes=max(memory.layer_bytes, cost.weight_resident_bytes if splits else 0),
        stage_resident_bytes=memory.stage_bytes,
        # The gradient of an early exit waits for the origin's backward.
        embedding_and_head_resident_bytes=memory.embedding_and_head_bytes
        + (experiment.recipe.num_losses - 1) * cost.activation_bytes,
        working_bytes=memory.working_bytes,
        embedding_and_head_working_bytes=memory.embedding_and_head_working_bytes,
        message_bytes=MESSAGES_PER_RECEIVE * window * activation_bytes,
        layer_copy_bytes=cost.layer_trained_parameters * copied_bytes,
        embedding_and_head_copy_bytes=cost.embedding_and_head_trained_parameters * (dtype.itemsize + optimizer_bytes),
        layer_offloaded_bytes=cost.layer_trained_parameters * offloaded_bytes,
        embedding_and_head_offloaded_bytes=cost.embedding_and_head_trained_parameters * offloaded_bytes,
        layer_update_bytes=cost.layer_trained_parameters * update_bytes,
        embedding_and_head_update_bytes=cost.embedding_and_head_trained_parameters * update_bytes,
        bucket_bytes=BUCKETS_IN_FLIGHT * BUCKET_BYTES,
        backward_to_forward=cost.backward_to_forward,
        weight_share=cost.weight_to_forward / cost.backward_to_forward if splits else 0.0,
    )


def activation_case(experiment: Experiment) -> ActivationCase:
    """Return what the activation memory of an experiment's microbatch depends on."""
    training = experiment.training
    return ActivationCase(
        experiment_model(experiment),
        training.micro_batch_size,
        training.sequence_length,
        torch_dtype(training.dtype),
        training.activation_checkpointing,
        experiment.lora,
    )


def share_activation_memory(experiment: Experiment, context: DistributedContext) -> None:
    """Let rank 0 measure the activation memory for all: processes of one machine would keep each other busy with it."""
    if context.store is None:
        return
    case = activation_case(experiment)
    content = on_first_rank(context, Topic.ACTIVATION_MEMORY, lambda: asdict(activation_memory(case)))
    tell_activation_memory(case, ActivationMemory(**content))


def _gradient_bytes(experiment: Experiment, shapes: Sequence[tuple[int, ...]]) -> int:
    """Return in how many bytes gradients of these shapes travel."""
    comm = experiment.comm
    numbers = sum(math.prod(shape) for shape in shapes)
    if comm.gradient_compression == "int8":
        return int8_gradient_bytes(numbers)
    if comm.gradient_compression == "powersgd":
        return powersgd_gradient_bytes(shapes, comm.powersgd.rank)
    return numbers * torch_dtype(comm.gradient_dtype or experiment.training.dtype).itemsize


def _trained_bytes(experiment: Experiment, itemsize: int) -> tuple[int, int]:
    """Return the bytes that each trained parameter takes besides its own, on every replica, and those of the optimizer.

    The gradient in the run's dtype, and in fp32 what compressed sums left out.
    """
    options, comm = experiment.optimizer, experiment.comm
    remembered = 4 if comm.gradient_compression != "none" and comm.error_feedback else 0
    return itemsize + remembered, options.traits.state_bytes_per_parameter(itemsize)
