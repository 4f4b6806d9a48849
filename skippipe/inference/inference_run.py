"""A run directory as inference sees it: its newest checkpoint, its stages and who holds them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PretrainedConfig

from skippipe.checkpoint.model_tensors import load_parameters
from skippipe.checkpoint.reader import require_checkpoint
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_run
from skippipe.data.kept_tokenizer import kept_options
from skippipe.errors import InputError
from skippipe.inference.decoder import Bounds
from skippipe.model.architecture import experiment_model
from skippipe.model.device import torch_dtype
from skippipe.model.skeleton import Skeleton, build_skeleton, materialise
from skippipe.model.stage import Stage
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan


@dataclass(frozen=True)
class InferenceRun:
    """What a run directory says, weights apart."""

    folder: Path
    experiment: Experiment
    checkpoint: Path
    config: PretrainedConfig
    bounds: tuple[Bounds, ...]
    """[first, last) layers of each stage."""
    plan: Plan | None
    """None where another split than the plan's was asked for."""

    @property
    def stage_nodes(self) -> list[tuple[str, ...]]:
        """Nodes that hold each stage; empty without a plan."""
        return [stage.nodes for stage in self.plan.stages] if self.plan is not None else []

    @property
    def protected_stages(self) -> tuple[int, ...]:
        """Stages beside 0 that the training left out of no route."""
        return self.plan.rules.protected_stages if self.plan is not None else ()

    def load_stages(self, stages: Iterable[int], device: torch.device) -> Skeleton:
        """Return the model with the weights of these stages alone, of which stage 0 has embedding and head."""
        skeleton = build_skeleton(self.config, torch_dtype(self.experiment.training.dtype))
        parts, seed = [], self.experiment.seed
        for first, last in _joined(self.bounds[stage] for stage in sorted(stages)):
            with_embedding = first == 0
            materialise(skeleton, range(first, last), with_embedding_and_head=with_embedding, seed=seed, device=device)
            parts.append(Stage(skeleton, first, last, with_embedding_and_head=with_embedding))
        load_parameters(self.checkpoint, self.config, parts)
        return skeleton


def _joined(bounds: Iterable[Bounds]) -> list[Bounds]:
    """Return the bounds with neighbours made one, so that each file is read once."""
    joined: list[Bounds] = []
    for first, last in bounds:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, last))
    return joined


def read_inference_run(folder: Path, num_stages: int | None = None) -> InferenceRun:
    """Read a run directory; `num_stages` asks for another split than the plan's, as even as possible."""
    experiment = load_run(folder)
    checkpoint = require_checkpoint(folder)
    data = kept_options(experiment.data, folder)
    config = experiment_model(experiment.model_copy(update={"data": data}))
    plan = load_plan(folder / "plan.json") if num_stages is None else None
    bounds: Sequence[Bounds]
    if plan is not None:
        bounds = [stage.layers for stage in plan.stages]
    else:
        bounds = even_bounds(config.num_hidden_layers, num_stages or 0)
    return InferenceRun(folder, experiment, checkpoint, config, tuple(bounds), plan)


def even_bounds(num_layers: int, num_stages: int) -> list[Bounds]:
    """Return [first, last) layers of each stage; raise `InputError` where there are fewer layers than stages."""
    if not 1 <= num_stages <= num_layers:
        raise InputError(f"--stages {num_stages}: the model has {num_layers} layers, and a stage needs at least one")
    edges = [index * num_layers // num_stages for index in range(num_stages + 1)]
    return list(pairwise(edges))


def stages_without(stage_nodes: Sequence[Sequence[str]], absent: Collection[str]) -> frozenset[int]:
    """Return the stages that nobody holds when the nodes `absent` are gone.

    Raises `InputError` for a node that is not in the plan, and where stage 0 is among them.
    """
    if absent and not stage_nodes:
        raise InputError("--absent names nodes of a run's plan; there is no plan here, leave --stages and --absent out")
    known = {node for nodes in stage_nodes for node in nodes}
    for node in absent:
        if node not in known:
            raise InputError(f"--absent {node}: the plan has no such node; it has {', '.join(sorted(known))}")
    gone = frozenset(stage for stage, nodes in enumerate(stage_nodes) if not set(nodes) - set(absent))
    if 0 in gone:
        raise InputError(
            f"stage 0 holds embedding and head, and of its nodes ({', '.join(stage_nodes[0])}) none is there; "
            "nothing can be answered without one of them"
        )
    return gone
