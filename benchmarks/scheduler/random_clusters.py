"""Clusters and models as different as those of users, each from a seed: what is asked of the planner on them."""

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any, get_args

from skippipe_scheduler.errors import InfeasibleError, ProblemError
from skippipe_scheduler.files import parse
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.problem.build import build_problem
from skippipe_scheduler.problem.cluster import Cluster
from skippipe_scheduler.problem.gradient_reduction import Reduction
from skippipe_scheduler.problem.infeasibility import check_feasible
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.rules import skip_rules
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.problem.stage_layout import StageLayout, StageSizesChoice
from skippipe_scheduler.problem.workload import Workload
from skippipe_scheduler.solver.plan_request import PlanRequest, StageSizeSource

_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Size:
    """How large clusters may be."""

    most_nodes: int = 100
    most_stages: int = 40
    most_microbatches: int = 200


LARGEST = Size()


def random_request(seed: int, options: SolveOptions, size: Size = LARGEST) -> PlanRequest:
    """Return a request about a random cluster; draws that no plan can exist for are drawn again."""
    for attempt in range(100):
        generator = random.Random(1000 * seed + attempt)
        try:
            return _drawn(generator, options, size)
        except (InfeasibleError, ProblemError):
            continue
    raise RuntimeError(f"seed {seed} has no feasible cluster")


def _drawn(generator: random.Random, options: SolveOptions, size: Size) -> PlanRequest:
    num_nodes = round(4 * (size.most_nodes / 4) ** generator.random())
    num_stages = generator.randint(2, min(size.most_stages, num_nodes))
    layers = num_stages * generator.choice((1, 1, 2, 3))
    rules = skip_rules(
        num_stages, generator.choice((0.0, 0.25, 0.33, 0.5)), max_swaps=generator.choice((0, 0, 1)), max_swap_distance=1
    )
    source: StageSizeSource = generator.choice(("rule", "rule", "auto"))
    cluster, workload = _cluster(generator, num_nodes), _workload(generator, layers)
    num_microbatches = generator.randint(max(4, num_nodes // num_stages), size.most_microbatches)
    reduction = generator.choice(get_args(Reduction))

    def with_sizes(sizes: StageSizesChoice | None) -> Problem:
        layout = StageLayout(stage_sizes=sizes)
        return build_problem(
            cluster, workload, rules, num_microbatches=num_microbatches, layout=layout, reduction=reduction
        )

    problem = with_sizes("auto" if source == "auto" else None)
    check_feasible(problem)
    return PlanRequest(problem, options, source, with_sizes=with_sizes)


def _cluster(generator: random.Random, num_nodes: int) -> Cluster:
    regions = [f"r{index}" for index in range(generator.randint(1, min(12, num_nodes)))]
    speeds = generator.choice(([100.0], [100.0, 300.0], [60.0, 150.0, 400.0]))
    memory_gib = generator.choice(([80.0], [40.0, 80.0], [24.0, 80.0]))
    nodes: list[dict[str, Any]] = [
        {
            "name": f"n{index}",
            "region": regions[index * len(regions) // num_nodes],
            "compute_tflop_per_s": generator.choice(speeds),
            "memory_gib": generator.choice(memory_gib),
        }
        for index in range(num_nodes)
    ]
    between = [
        {
            "regions": [a, b],
            "latency_ms": round(generator.uniform(1, 120), 1),
            "gbit_per_s": generator.choice((0.2, 0.5, 1, 2, 10)),
        }
        for a, b in combinations(regions, 2)
    ]
    contention = generator.choice(get_args(Contention))
    capacities = {
        "card_gbit_per_s": generator.choice((5, 20)),
        "uplink_gbit_per_s": {region: generator.choice((2, 10)) for region in regions},
    }
    links = {
        **(capacities if contention == "shared" else {}),
        "contention": contention,
        "within_region": {"latency_ms": 0.2, "gbit_per_s": generator.choice((5, 20, 100))},
        "between_regions": between,
    }
    content = {"name": "random", "nodes": nodes, "links": links, "task_overhead_s": generator.choice((0.0, 0.002))}
    return parse(Cluster, content, "random cluster", ProblemError)


def _workload(generator: random.Random, layers: int) -> Workload:
    tokens, hidden = generator.choice((512, 2048, 8192)), generator.choice((512, 2048, 4096))
    vocabulary = generator.choice((1024, 32_000, 128_000))
    layer = 12 * hidden**2
    return Workload(
        num_layers=layers,
        layer_forward_flop=2 * tokens * layer,
        loss_flop=6 * tokens * hidden * vocabulary,
        activation_bytes=2 * tokens * hidden,
        layer_gradient_bytes=2 * layer,
        embedding_and_head_gradient_bytes=2 * hidden * vocabulary,
        layer_state_bytes=_BYTES_PER_PARAMETER * layer,
        embedding_and_head_state_bytes=_BYTES_PER_PARAMETER * hidden * vocabulary,
        layer_resident_bytes=34 * tokens * hidden,
        embedding_and_head_resident_bytes=2 * tokens * hidden,
    )
