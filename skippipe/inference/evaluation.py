"""Perplexity of a trained run against the share of its depth that is kept."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from skippipe.config import Experiment
from skippipe.config_file import load_run
from skippipe.data.cache import open_cache
from skippipe.data.samples import SampleOrder
from skippipe.inference.policies import StagePolicy, build_policy, kept_stages
from skippipe.model.device import choose_device
from skippipe.model.stage import Stage, build_stage
from skippipe.planning import experiment_model
from skippipe.training.checkpoint import load_parameters, require_checkpoint
from skippipe_scheduler.files import write_atomically
from skippipe_scheduler.validate import load_plan


@dataclass(frozen=True)
class DepthResult:
    """Perplexity at one share of the depth."""

    keep: float
    kept_stages: int
    share_computed: float
    """Share of the layers that really ran."""
    perplexity: float
    perplexity_std: float
    """Standard deviation over the repeats, which differ in the random choices of stages alone."""
    samples: int
    """Batches evaluated over all repeats, each with a choice of stages of its own."""


@dataclass(frozen=True)
class Evaluation:
    """What `skippipe evaluate` writes to evaluation.json."""

    policy: str
    model: str
    checkpoint: str
    tokens: int
    results: list[DepthResult]


def evaluate_run(
    run_dir: Path,
    *,
    policy_name: str,
    keeps: Sequence[float],
    num_batches: int = 24,
    repeats: int = 4,
    seed: int = 0,
    device: str = "auto",
) -> Evaluation:
    """Evaluate the newest checkpoint of a run on its validation text, in one process; write RUN/evaluation.json.

    Every depth sees the same batches, `repeats` times. Each batch draws its own stages, as in the paper's evaluation
    (SkipPipe, inference with stages removed); perplexity is the exponential of the mean loss over all of them.
    Raises `InputError` where the run has no configuration, plan or checkpoint.
    """
    experiment = load_run(run_dir)
    checkpoint = require_checkpoint(run_dir)
    policy = build_policy(policy_name, seed)
    stages = _load_stages(experiment, run_dir, checkpoint, choose_device(device))
    counts = [kept_stages(keep, len(stages)) for keep in keeps]
    batches = _validation_batches(experiment, num_batches)
    results = [
        _evaluate_depth(stages, batches, policy, keep, count, repeats)
        for keep, count in zip(keeps, counts, strict=True)
    ]
    tokens = sum(labels.numel() for _, labels in batches)
    evaluation = Evaluation(policy.name, experiment.name, checkpoint.name, tokens, results)
    write_atomically(run_dir / "evaluation.json", json.dumps(asdict(evaluation), indent=1) + "\n")
    return evaluation


def _load_stages(experiment: Experiment, run_dir: Path, checkpoint: Path, device: torch.device) -> list[Stage]:
    plan = load_plan(run_dir / "plan.json")
    config = experiment_model(experiment)
    dtype = getattr(torch, experiment.training.dtype)
    stages = []
    for index, stage in enumerate(plan.stages):
        first, last = stage.layers
        stages.append(
            build_stage(config, first, last, ends=index == 0, seed=experiment.seed, device=device, dtype=dtype)
        )
    load_parameters(checkpoint, config, stages)
    return stages


def _validation_batches(experiment: Experiment, num_batches: int) -> list[tuple[Tensor, Tensor]]:
    training = experiment.training
    cache = open_cache(experiment.data, experiment.seed)
    order = SampleOrder(cache, seed=experiment.seed, sequence_length=training.sequence_length)
    return [order.validation_batch(index, training.micro_batch_size) for index in range(num_batches)]


def _evaluate_depth(
    stages: Sequence[Stage],
    batches: Sequence[tuple[Tensor, Tensor]],
    policy: StagePolicy,
    keep: float,
    count: int,
    repeats: int,
) -> DepthResult:
    layers = [stage.last - stage.first for stage in stages]
    losses: list[list[float]] = []
    computed = []
    for repeat in range(1 if count == len(stages) else repeats):
        losses.append([])
        for index, batch in enumerate(batches):
            chosen = policy.stages(len(stages), count, repeat * len(batches) + index)
            losses[-1].append(_loss_of(stages, chosen, batch))
            computed.append(sum(layers[stage] for stage in chosen) / sum(layers))
    perplexities = [math.exp(statistics.fmean(repeat)) for repeat in losses]
    return DepthResult(
        keep=keep,
        kept_stages=count,
        share_computed=statistics.fmean(computed),
        perplexity=math.exp(statistics.fmean(loss for repeat in losses for loss in repeat)),
        perplexity_std=statistics.pstdev(perplexities),
        samples=len(computed),
    )


@torch.no_grad()
def _loss_of(stages: Sequence[Stage], chosen: Sequence[int], batch: tuple[Tensor, Tensor]) -> float:
    """Return the mean loss of one batch through the chosen stages."""
    device = next(stages[0].parameters()).device
    input_ids, labels = (tensor.to(device) for tensor in batch)
    hidden = stages[0].embed(input_ids)  # (B, T) -> (B, T, D)
    for index in chosen:
        hidden = stages[index](hidden)  # (B, T, D)
    return float(stages[0].loss(hidden, labels))
