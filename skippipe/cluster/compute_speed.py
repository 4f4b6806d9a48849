"""How long a node's tasks take: the runtime's own forward, loss and backward, on a stage of the model."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from skippipe.config.lora_options import LoraOptions
from skippipe.errors import ConfigError
from skippipe.model.activations.activation_checkpointing import Mode
from skippipe.model.architecture import build_config
from skippipe.model.compilation import make_ready
from skippipe.model.cost import model_cost
from skippipe.model.stage import Stage, build_stage
from skippipe.runtime.stage_compute import StageCompute

WARM_UP = 2
LEAST_REPEATS = 3
TRIMMED = 0.1
"""Share of the shortest and of the longest times that a mean leaves out."""
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
PROBE_S = 0.3
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class ProbeWorkload:
    """What is computed: `num_layers` layers of a model on microbatches of one shape."""

    config: PretrainedConfig
    num_layers: int
    micro_batch_size: int
    sequence_length: int
    dtype: torch.dtype
    checkpointing: Mode = "none"
    lora: LoraOptions | None = None
    compile: bool = False


@dataclass(frozen=True)
class TaskTimes:
    """Seconds of one microbatch on the workload's layers; `loss_s` is all that an origin does besides them."""

    forward_s: float
    backward_s: float
    loss_s: float


def typical_workload(device: torch.device) -> ProbeWorkload:
    """Return a layer of common shape for the device, for a profile that knows no model."""
    size, tokens = (4096, 2048) if device.type == "cuda" else (512, 256)
    options = {
        "hidden_size": size,
        "intermediate_size": 4 * size,
        "num_attention_heads": size // 64,
        "num_hidden_layers": 1,
        "vocab_size": 1024,
        "max_position_embeddings": tokens,
    }
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return ProbeWorkload(build_config("llama", options), 1, 1, tokens, dtype)


def measure_tasks(workload: ProbeWorkload, device: torch.device, limit_s: float) -> TaskTimes:
    """Run tasks for about `limit_s` seconds; return trimmed means, as interruptions are part of a shared machine.

    The embedding's forward and backward count as part of the loss: the planner knows them nowhere else.
    Raises `ConfigError` where the stage does not fit into the device's memory.
    """
    try:
        times = _Tasks(workload, device).repeat(limit_s)
    except torch.OutOfMemoryError:
        remedies = {
            "more stages": workload.num_layers > 1,
            "a smaller micro-batch": workload.micro_batch_size > 1,
            "activation checkpointing": workload.checkpointing != "full",
        }
        still = " or ".join(remedy for remedy, possible in remedies.items() if possible) or "a larger device"
        raise ConfigError(
            f"{workload.num_layers} layers with embedding and head do not fit into the memory of {device}; use {still}"
        ) from None
    mean = {task: _trimmed_mean(values) for task, values in times.items()}
    embedding_s = sum(mean[f"origin {task}"] - mean[task] for task in ("forward", "backward"))
    return TaskTimes(mean["forward"], mean["backward"], mean["loss"] + max(0.0, embedding_s))


def sustained_tflop_per_s(workload: ProbeWorkload, times: TaskTimes) -> float:
    """Return the rate of forward and backward, by the planner's count of a layer's FLOP."""
    shape = (workload.micro_batch_size, workload.sequence_length)
    cost = model_cost(workload.config, *shape, workload.dtype, workload.checkpointing, workload.lora)
    flop = cost.layer_forward_flop * (1 + cost.backward_to_forward) * workload.num_layers
    return flop / (times.forward_s + times.backward_s) / 1e12


@torch.no_grad()
def measured_peak_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate of a product of square matrices."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    finish = torch.cuda.synchronize if device.type == "cuda" else _nothing
    best_s = float("inf")
    end_s = time.perf_counter() + PROBE_S
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        left @ right
        finish()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s / 1e12


def copy_s(workload: ProbeWorkload, device: torch.device) -> float:
    """Return the seconds in which an activation leaves the device and another comes in; 0 on a CPU."""
    if device.type == "cpu":
        return 0.0
    shape = (workload.micro_batch_size, workload.sequence_length, workload.config.hidden_size)
    activation = torch.zeros(shape, dtype=workload.dtype, device=device)  # (B, T, D)
    times = []
    for _ in range(10):
        start_s = time.perf_counter()
        activation.cpu().to(device)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def probe_stage(workload: ProbeWorkload, device: torch.device) -> Stage:
    """Build what is measured as a run builds its stages, with embedding and head."""
    stage = build_stage(
        workload.config,
        0,
        workload.num_layers,
        with_embedding_and_head=True,
        seed=0,
        device=device,
        dtype=workload.dtype,
        lora=workload.lora,
    )
    shape = (workload.micro_batch_size, workload.sequence_length, workload.config.hidden_size)
    make_ready(stage, workload.checkpointing, device, shape if workload.compile else None)
    stage.train()
    return stage


class _Tasks:
    """The times of a stage's tasks."""

    def __init__(self, workload: ProbeWorkload, device: torch.device) -> None:
        self._compute = StageCompute(probe_stage(workload, device), device)
        generator = torch.Generator().manual_seed(0)
        shape = (2, workload.micro_batch_size, workload.sequence_length)
        self._samples = torch.randint(0, workload.config.vocab_size, shape, generator=generator)  # (2, B, T)
        self._times: defaultdict[str, list[float]] = defaultdict(list)

    def repeat(self, limit_s: float) -> dict[str, list[float]]:
        """Run a microbatch as at its origin, then as elsewhere, again and again."""
        repeats = 0
        end_s = time.perf_counter() + limit_s
        while repeats < WARM_UP + LEAST_REPEATS or time.perf_counter() < end_s:
            if repeats == WARM_UP:
                self._times.clear()
            self._once()
            repeats += 1
        return self._times

    def _once(self) -> None:
        compute = self._compute
        compute.load(0, *self._samples)
        hidden = self._timed("origin forward", lambda: compute.forward(0, None))  # (B, T, D)
        gradient = self._timed("loss", lambda: compute.loss(0, hidden))
        if gradient is None:
            raise ValueError("a loss without gradient")
        self._timed("origin backward", lambda: compute.backward(0, gradient))
        self._timed("forward", lambda: compute.forward(0, hidden))
        self._timed("backward", lambda: compute.backward(0, gradient))

    def _timed(self, task: str, run: Callable[[], Returned]) -> Returned:
        start_s = time.perf_counter()
        result = run()
        self._compute.finish()
        self._times[task].append(time.perf_counter() - start_s)
        return result


def _trimmed_mean(values: Sequence[float]) -> float:
    cut = int(TRIMMED * len(values))
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _nothing() -> None:
    """Stand for the synchronisation that a CPU does not need."""
