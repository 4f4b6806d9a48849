"""What all contenders of a row train, and the plan that ours follows: costs are measured in the same run."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from crew import Hosts

from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import save_experiment
from skippipe.data.token_cache import open_cache
from skippipe.errors import InfeasibleError
from skippipe.planning.experiment_plan import plan_experiment
from skippipe_scheduler.plan.plan import Plan

LOCAL_LINK = {"latency_ms": 0.2, "gbit_per_s": 8.0}
MEASURED_LAYERS = 2


@dataclass(frozen=True)
class Setting:
    """Model, data and iteration of a row. `links` is that section of the cluster file, `regions` one for each rank."""

    world_size: int
    num_layers: int = 8
    hidden_size: int = 256
    vocabulary: int = 1024
    num_microbatches: int = 8
    micro_batch_size: int = 4
    sequence_length: int = 64
    planner_s: float = 4.0
    regions: tuple[str, ...] = ()
    links: Mapping[str, Any] = field(default_factory=lambda: {"contention": "link", "within_region": LOCAL_LINK})

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one iteration."""
        return self.num_microbatches * self.micro_batch_size * self.sequence_length

    def experiment(self, folder: Path, **sections: Mapping[str, Any]) -> Experiment:
        """Return the experiment, its files in `folder`; `sections` are laid over it key by key."""
        content: dict[str, dict[str, Any]] = {
            "model": {
                "options": {
                    "vocab_size": self.vocabulary,
                    "hidden_size": self.hidden_size,
                    "intermediate_size": 11 * self.hidden_size // 4,
                    "num_hidden_layers": self.num_layers,
                    "num_attention_heads": self.hidden_size // 32,
                    "num_key_value_heads": self.hidden_size // 32,
                }
            },
            "data": {"source": "python_stdlib", "max_bytes": 2_000_000, "cache_dir": str(folder / "cache")},
            "pipeline": {"num_stages": 2, "skip_ratio": 0.0, "planner": {"time_limit_s": self.planner_s}},
            "training": {
                "max_steps": 1_000_000,
                "num_microbatches": self.num_microbatches,
                "micro_batch_size": self.micro_batch_size,
                "sequence_length": self.sequence_length,
                "max_grad_norm": None,
                "device": "cpu",
                "threads": 1,
            },
            "optimizer": {"fused": True},
            "lr_scheduler": {"warmup_steps": 0, "min_lr_ratio": 1.0},
            "evaluation": {"interval": 0},
            "logging": {"wandb": {"mode": "disabled"}},
            "recovery": {"enabled": False},
        }
        for section, given in sections.items():
            content[section] = {**content.get(section, {}), **given}
        return Experiment.model_validate(
            {"name": "benchmark", "cluster": str(folder / "cluster.yaml"), "seed": 1, **content}
        )

    def write(self, folder: Path) -> Path:
        """Write the experiment and its token cache into `folder`; return the experiment's path."""
        experiment = self.experiment(folder)
        open_cache(experiment.data, experiment.seed)
        save_experiment(experiment, folder / "experiment.yaml")
        return folder / "experiment.yaml"


def measure_tasks(hosts: Hosts, setting: Setting, experiment: Path, repeats: int) -> list[dict[str, float]]:
    """Return the seconds of FORWARD, LOSS and BACKWARD of one layer on every rank, all computing at once.

    The ranks are processes of one machine, so they are alike: all get the median, and noise makes none look faster.
    """
    crew = hosts.start("tasks", "tasks", experiment, {"layers": MEASURED_LAYERS})
    crew.steps(2)
    measured = crew.call("measure", repeats=repeats)
    crew.close()
    pooled = {name: statistics.median(measurement[name] for measurement in measured) for name in measured[0]}
    layer_s = {name: seconds / (1 if name == "LOSS" else MEASURED_LAYERS) for name, seconds in pooled.items()}
    return [layer_s] * len(measured)


def best_plan(
    setting: Setting, folder: Path, layer_s: list[dict[str, float]], shapes: Iterable[Mapping[str, Any]]
) -> Plan:
    """Solve the plan for each of `shapes` (parts of the pipeline section); return the one predicted to be fastest."""
    return min(plans_of(setting, folder, layer_s, shapes), key=lambda plan: plan.predicted.iteration_s)


def plans_of(
    setting: Setting, folder: Path, layer_s: list[dict[str, float]], shapes: Iterable[Mapping[str, Any]]
) -> list[Plan]:
    """Solve the plan for each of `shapes` that there is one for."""
    plans = []
    for shape in shapes:
        write_cluster(setting, folder, layer_s, num_stages=shape["num_stages"])
        layers = {"layers_per_stage": "auto", "microbatches_per_origin": "auto"}
        try:
            planner = {"planner": {"time_limit_s": setting.planner_s}}
            plans.append(plan_experiment(setting.experiment(folder, pipeline={**layers, **planner, **shape})))
        except InfeasibleError:
            continue
    return plans


def write_cluster(setting: Setting, folder: Path, layer_s: list[dict[str, float]], num_stages: int) -> None:
    """Write the cluster file: measured costs of a stage of mean size on every node."""
    layers = setting.num_layers / num_stages
    nodes = [
        {
            "name": f"node-{rank}",
            "region": setting.regions[rank] if setting.regions else "here",
            "forward_s": times_s["FORWARD"] * layers,
            "backward_s": times_s["BACKWARD"] * layers,
            "loss_s": times_s["LOSS"],
            "max_in_flight": setting.num_microbatches,
        }
        for rank, times_s in enumerate(layer_s)
    ]
    content = {"format": "skippipe.cluster/1", "name": "benchmark", "nodes": nodes, "links": dict(setting.links)}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def full_shapes(setting: Setting) -> list[dict[str, Any]]:
    """Return every number of stages of a pipeline without skips."""
    return [
        {"num_stages": count, "skip_ratio": 0.0} for count in range(2, min(setting.world_size, setting.num_layers) + 1)
    ]


def skip_shapes(setting: Setting) -> list[dict[str, Any]]:
    """Return ways to leave out a third of the stages: one route length, or a mix where a third is no whole number."""
    shapes: list[dict[str, Any]] = []
    for count in range(3, min(setting.world_size, setting.num_layers) + 1):
        kept = count * 2 / 3
        shape: dict[str, Any] = {"num_stages": count, "skip_ratio": 1 / 3, "max_swaps": 1}
        if not math.isclose(kept, round(kept)):
            below = math.floor(kept)
            shape["route_lengths"] = {below + 1: round(3 * (kept - below)), below: round(3 * (below + 1 - kept))}
        shapes.append(shape)
    return shapes
