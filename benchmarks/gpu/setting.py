"""What the rows share: the models, the experiments, their plans, and the figures that they hand over."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skippipe.config.experiment import Experiment
from skippipe.planning.sharing import choose_plans
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.context import DistributedContext
from skippipe_scheduler.plan.validate import load_plan

ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
VOCABULARY = 50304
"""Of GPT-2, rounded up to a multiple of 64, as usual for its size of 124M (nanoGPT, Karpathy 2022)."""
SIZES: Mapping[str, Mapping[str, int]] = {
    "124M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "350M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
}
"""Llama layers of GPT-2's and GPT-3's sizes (Brown et al. 2020, arXiv 2005.14165, table 2.1)."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 2}
"""Stands for every size in a rehearsal."""
CLUSTER = """
format: skippipe.cluster/1
name: one card
nodes:
  - {{name: rank, count: {count}, region: here, compute_tflop_per_s: {tflop_per_s}, memory_gib: {memory_gib}}}
links:
  contention: link
  within_region: {{latency_ms: 5, gbit_per_s: 4}}
"""
"""Links that are slow beside a card's memory, so that emulated ones can be told from none."""


@dataclass(frozen=True)
class Bar:
    """What a figure has to reach."""

    at_least: float = -math.inf
    at_most: float = math.inf

    @classmethod
    def near_one(cls, tolerance: float) -> "Bar":
        """Return the bar of a ratio that should be 1."""
        return cls(1 - tolerance, 1 + tolerance)

    def is_met(self, value: float) -> bool:
        """Return whether `value` reaches it."""
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        if self.at_most == math.inf:
            return f">= {self.at_least:g}"
        return f"<= {self.at_most:g}" if self.at_least == -math.inf else f"{self.at_least:g} to {self.at_most:g}"


@dataclass
class Figures:
    """What a row has measured so far. Every figure is printed at once: what a row had when it was ended counts."""

    rehearse: bool
    seconds: float
    """How long the row may take."""
    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, label: str, value: float, unit: str, bar: Bar | None = None) -> None:
        """Add a figure, and whether it reaches its bar where it has one."""
        met = None if bar is None else bar.is_met(value)
        self.found.append({"label": label, "value": value, "unit": unit, "bar": str(bar or ""), "met": met})
        print(json.dumps({"figures": self.found}), flush=True)

    def say(self, text: str) -> None:
        """Tell the person who waits."""
        print(text, file=sys.stderr, flush=True)

    @property
    def device(self) -> torch.device:
        """What is measured."""
        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)


def model_options(size: str, *, rehearse: bool) -> dict[str, Any]:
    """Return the options of a Llama of this size, with tied embeddings."""
    options = dict(TINY if rehearse else SIZES[size])
    return options | {"vocab_size": 512 if rehearse else VOCABULARY, "tie_word_embeddings": True}


def make_experiment(folder: Path, name: str, size: str, *, rehearse: bool, **sections: Any) -> Experiment:
    """Return an experiment that writes into `folder`; `sections` are laid over it, key by key.

    `num_nodes`, and `tflop_per_s` and `memory_gib` of each, make its cluster.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_nodes = sections.pop("num_nodes", 4)
    rate = sections.pop("tflop_per_s", 0.05 if rehearse else 100)
    cluster = folder / f"{name}-cluster.yaml"
    cluster.write_text(CLUSTER.format(count=num_nodes, tflop_per_s=rate, memory_gib=sections.pop("memory_gib", 64)))
    content: dict[str, Any] = {
        "name": name,
        "run_dir": str(folder / name),
        "cluster": str(cluster),
        "model": {"options": model_options(size, rehearse=rehearse)},
        "data": {
            "source": "python_stdlib",
            "max_bytes": 300_000 if rehearse else 20_000_000,
            "cache_dir": str(folder / "cache"),
        },
        "pipeline": {"num_stages": 4, "skip_ratio": 0, "planner": {"max_evaluations": 50 if rehearse else 2000}},
        "training": {
            "max_steps": 4,
            "num_microbatches": 4,
            "micro_batch_size": 1 if rehearse else 16,
            "sequence_length": 32 if rehearse else 1024,
            "dtype": "float32" if rehearse else "bfloat16",
            "device": "cpu" if rehearse else "cuda",
        },
        "optimizer": {"lr": 6e-4},
        "lr_scheduler": {"warmup_steps": 2},
        "checkpoint": {"interval": 0},
        "evaluation": {"interval": 0},
        "logging": {"wandb": {"mode": "disabled"}},
    }
    for section, given in sections.items():
        content[section] = content.get(section, {}) | given if isinstance(given, dict) else given
    return Experiment.model_validate(content)


def plans_of(experiment: Experiment, carried: Path | None) -> PlanSet:
    """Return the plans of an experiment: those that were carried here, else new ones, which needs OR-tools."""
    kept = carried / "plans" / experiment.name if carried is not None else None
    if kept is None or not kept.is_dir():
        return choose_plans(experiment, None)
    plans = {path.stem: load_plan(path) for path in sorted(kept.glob("*.json"))}
    return PlanSet(plans.pop("main"), plans)


def save_plans(experiment: Experiment, folder: Path) -> None:
    """Solve the plans of an experiment and put them where `plans_of` finds them."""
    for name, plan in choose_plans(experiment, None).items():
        plan.save(folder / "plans" / experiment.name / f"{name}.json")
