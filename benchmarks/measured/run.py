"""Iteration times that others measured on clusters of GPUs, beside those that the planner's model of time gives.

    python benchmarks/measured/run.py --data FOLDER

`FOLDER` holds what Sailor publishes (SOSP 2025, github.com/eth-easl/sailor at cf2c8e3, all JSON): `validation/`, its
measured set-ups; `layer-profiles.json`, seconds of every layer (there `profiles_tmp.json`); and
`multizone_bandwidths_het.json`, bandwidth by message size.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click

from common.table import Columns, Result, machine, markdown
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.gradient_reduction import LinkSpeeds, reduction_s
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.solver.solve import solve

HERE = Path(__file__).parent
MODELS = {"OPT-350": "_training_config_opt_350.json", "GPT-Neo-2.7": "_training_config_gpt_neo27.json"}
REPEATED = "mit-N6_D2"
"""Its numbers are those of mit-N3_D1, which has half of the nodes."""
BYTES = 4
"""Of a number of activations, gradients and weights; chosen, as with 2 all rows come out lower."""
EVALUATIONS = 50
"""Steps of the search: every stage has one node, so that a plan is but an order."""
IN_ADVANCE = 2
"""Microbatches that a stage can hold beside one for each stage. Our first stage computes the loss, theirs the last one:
with these it waits for no loss."""
CLUSTERS = {"clariden": "GH200", "mit": "RTX"}


@dataclass(frozen=True)
class Tables:
    """What was measured of the parts: layers and links."""

    layers: Mapping[str, Any]
    links: Mapping[str, Any]

    def seconds(self, model: str, group: "Group", micro_batch_size: int, layers: Sequence[int]) -> tuple[float, ...]:
        """Return forward, backward and update of some layers."""
        known = self.layers[model][group.gpu][str(micro_batch_size)][str(group.gpus)]
        return tuple(sum(known[str(layer)][part] for layer in layers) for part in range(3))

    def gbit_per_s(self, source: "Group", sink: "Group", gpus: int, size_bytes: float) -> float:
        """Return the bandwidth between two groups for a message, over the cards of so many GPUs of each.

        It is a polynomial in the logarithm of the size that falls again beyond what was measured, and has a limit.
        """
        fit: tuple[list[float], float] = self.links[source.zone][source.gpu][str(gpus)][sink.zone][sink.gpu][str(gpus)]
        coefficients, most = fit
        powers = range(len(coefficients) - 1, -1, -1)
        logarithm = min(math.log2(size_bytes / 1e6), _peak(coefficients))
        terms: list[float] = [factor * logarithm**power for factor, power in zip(coefficients, powers, strict=True)]
        bytes_per_s = 1e9 * sum(terms)
        return 8e-9 * min(bytes_per_s, most)


def _peak(coefficients: Sequence[float]) -> float:
    """Return where a parabola that opens downwards is highest."""
    second, first = coefficients[:2]
    return -first / (2 * second) if second < 0 else math.inf


@dataclass(frozen=True)
class Group:
    """GPUs that share the tensors of one stage: one node of ours."""

    gpu: str
    gpus: int
    zone: str


@dataclass(frozen=True)
class Setup:
    """A training that was measured."""

    name: str
    content: Mapping[str, Any]
    sizes: Mapping[str, Any]
    """The model's hidden size, sequence length and so on."""
    tables: Tables

    @cached_property
    def layers(self) -> list[list[int]]:
        """Layers of each stage; one list has a slip of the pen, where a layer stands twice."""
        counts = [len(stage) for stage in self.content["pipeline_list"][0]["layers_per_stage"]]
        return [[*range(sum(counts[:stage]), sum(counts[: stage + 1]))] for stage in range(len(counts))]

    @cached_property
    def replicas(self) -> list[list[Group]]:
        """The groups of each stage; those of one index make a pipeline."""
        return [
            [Group(gpu, degree, zone) for ((gpu, _, zone),), degree in stage]
            for stage in self.content["pipeline_list"][0]["tmp_per_stage"]
        ]

    @property
    def num_pipelines(self) -> int:
        """How many pipelines share the microbatches."""
        return len(self.replicas[0])

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one pipeline."""
        return math.ceil(int(self.content["gbs"]) / int(self.content["mbs"]) / self.num_pipelines)

    def predicted_s(self) -> float:
        """Return the iteration time of the slowest pipeline; equal ones are planned once."""
        reductions_s = [self.reduction_s(stage) for stage in range(len(self.layers))]
        return max(self._pipeline_s(groups, reductions_s) for groups in dict.fromkeys(zip(*self.replicas, strict=True)))

    def reduction_s(self, stage: int) -> float:
        """Return how long the replicas of a stage reduce their gradients round a ring, over the cards of all GPUs."""
        groups = {f"replica-{index}": group for index, group in enumerate(self.replicas[stage])}
        if len(groups) == 1:
            return 0.0
        size_bytes = BYTES * sum(self._parameters(layer) for layer in self.layers[stage])
        speeds = {
            name: {
                other: self.tables.gbit_per_s(group, peer, group.gpus, size_bytes / len(groups))
                for other, peer in groups.items()
                if other != name
            }
            for name, group in groups.items()
        }
        links = LinkSpeeds({name: dict.fromkeys(row, 0.0) for name, row in speeds.items()}, speeds)
        return reduction_s("ring", links, tuple(groups), size_bytes * 8e-9)

    def _pipeline_s(self, groups: Sequence[Group], reductions_s: Sequence[float]) -> float:
        names = [f"stage-{stage}" for stage in range(len(groups))]
        forward_s, backward_s, end_s = {}, {}, []
        for stage, name in enumerate(names):
            forward, backward, update = self.tables.seconds(
                self.sizes["model"], groups[stage], self.content["mbs"], self.layers[stage]
            )
            busy_s = self._transfers_s(groups, stage)
            forward_s[name], backward_s[name] = forward + busy_s, backward + busy_s
            end_s.append(reductions_s[stage] + update)
        problem = Problem(
            nodes=tuple(names),
            stages=tuple(StageNodes(nodes=(name,)) for name in names),
            microbatches_per_origin=self.num_microbatches,
            costs=Costs(
                forward_s=forward_s,
                backward_s=backward_s,
                loss_s=dict.fromkeys(names, 0.0),
                transfer_s={name: {other: 0.0 for other in names if other != name} for name in names},
                memory=dict.fromkeys(names, len(names) + IN_ADVANCE),
                reduce_s=tuple(end_s),
            ),
            rules=Rules(num_stages=len(names), route_length=len(names), max_swaps=0),
        )
        return solve(problem, SolveOptions(max_evaluations=EVALUATIONS)).predicted.iteration_s

    def _transfers_s(self, groups: Sequence[Group], stage: int) -> float:
        """Return for how long a stage sends and receives beside each task: nothing else runs meanwhile.

        Every GPU has a whole activation and sends it by its own card.
        """
        size_bytes: float = BYTES * self.content["mbs"] * self.sizes["sequence_length"] * self.sizes["hidden_size"]
        beside = [groups[other] for other in (stage - 1, stage + 1) if 0 <= other < len(groups)]
        return sum(size_bytes * 8e-9 / self.tables.gbit_per_s(groups[stage], other, 1, size_bytes) for other in beside)

    def _parameters(self, layer: int) -> int:
        """Return how many parameters a layer has; the first one is the embedding, the last one the head."""
        hidden, last = self.sizes["hidden_size"], self.sizes["num_all_layers"] - 1
        if layer in (0, last):
            positions = self.sizes["sequence_length"] if layer == 0 else 0
            return int(hidden * (self.sizes["vocab_size"] + positions))
        return int(12 * hidden**2 + 13 * hidden)


def all_setups(data: Path) -> Iterator[Setup]:
    """Yield the set-ups that are pipelines; those with one stage have nothing to plan."""
    tables = Tables(
        json.loads((data / "layer-profiles.json").read_text()),
        json.loads((data / "multizone_bandwidths_het.json").read_text()),
    )
    sizes = {model: json.loads((data / "validation" / name).read_text()) for model, name in MODELS.items()}
    for path in sorted((data / "validation").glob("[a-z]*.json")):
        content = json.loads(path.read_text())
        if content["pipeline_list"][0]["num_stages"] > 1 and path.stem != REPEATED:
            model = "GPT-Neo-2.7" if "GPT-NEO" in path.stem else "OPT-350"
            yield Setup(path.stem, content, sizes[model], tables)


def measure(setup: Setup) -> Result:
    """Return the row of a set-up."""
    real_s, predicted_s = setup.content["real"], setup.predicted_s()
    return {
        "name": setup.name,
        "cluster": CLUSTERS[setup.name.partition("-")[0]],
        "model": setup.sizes["model"],
        "pipelines": setup.num_pipelines,
        "stages": len(setup.layers),
        "microbatches": setup.num_microbatches,
        "measured_s": real_s,
        "predicted_s": predicted_s,
        "error": predicted_s / real_s - 1,
        "reduction_measured_s": setup.content["red_grads"],
        "reduction_predicted_s": max(map(setup.reduction_s, range(len(setup.layers)))),
    }


COLUMNS: Columns = {
    "set-up": lambda row: f"`{row['name']}`",
    "GPUs": lambda row: row["cluster"],
    "model": lambda row: row["model"],
    "pipelines × stages": lambda row: f"{row['pipelines']} × {row['stages']}",
    "microbatches of each": lambda row: str(row["microbatches"]),
    "measured, s": lambda row: f"{row['measured_s']:.2f}",
    "predicted, s": lambda row: f"{row['predicted_s']:.2f}",
    "error": lambda row: f"{row['error']:+.1%}",
    "reduction measured, predicted, s": lambda row: (
        f"{row['reduction_measured_s']:.2f}, {row['reduction_predicted_s']:.2f}"
    ),
}


def summary(results: Sequence[Result]) -> str:
    """Return the errors of each cluster in words."""
    lines = []
    for cluster in dict.fromkeys(row["cluster"] for row in results):
        errors = [abs(row["error"]) for row in results if row["cluster"] == cluster]
        lines.append(
            f"- {cluster}, {len(errors)} set-ups: error {mean(errors):.1%} on the mean, {median(errors):.1%} in the "
            f"median, {max(errors):.1%} at worst"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE, help="Folder of the results.")
def main(data: Path, out: Path) -> None:
    """Predict all set-ups and write results.json and results.md."""
    about = {"quick": False, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    results = [measure(setup) | about for setup in all_setups(data)]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    page = markdown("Iteration times that others measured", COLUMNS, results, text=summary(results))
    (out / "results.md").write_text(page)
    click.echo(page)


if __name__ == "__main__":
    main()
