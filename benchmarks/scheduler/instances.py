"""Seeded synthetic problems: regions on a globe, latency by distance, uneven bandwidth, unequal nodes.

    python benchmarks/scheduler/instances.py --seed 3 --out problem.json

writes one whose shape is drawn from the seed as well; `skippipe plan --problem problem.json` solves it.
"""

import random
from dataclasses import dataclass
from math import acos, asin, cos, exp, pi, sin
from pathlib import Path

import click

from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import AutoMicrobatches, EvenMicrobatches, Problem
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.workload import route_length, stage_sizes

_FORWARD_S = 0.44
_ACTIVATION_GBIT = 0.5
_EARTH_RADIUS_KM = 6371
_LIGHT_KM_PER_S = 200_000
_DETOUR = 1.4
"""How much longer a cable is than the straight way."""


@dataclass(frozen=True)
class Shape:
    """How large a synthetic problem is, and how unequal; `speeds` are factors on a node's task times."""

    num_nodes: int
    num_stages: int
    route_length: int
    num_microbatches: int
    num_regions: int = 12
    speeds: tuple[float, ...] = (1.0, 1.5, 2.2)
    least_memory: int = 4
    most_memory: int = 8


LARGE = Shape(num_nodes=1000, num_stages=25, route_length=17, num_microbatches=4096)
TINY = Shape(num_nodes=8, num_stages=4, route_length=3, num_microbatches=8, num_regions=2)
LARGE_QUICK = Shape(num_nodes=100, num_stages=10, route_length=7, num_microbatches=300)


def synthetic_problem(shape: Shape, seed: int) -> Problem:
    """Return a problem with a free placement; stage sizes follow the skip ratio (`workload.stage_sizes`)."""
    generator = random.Random(seed)
    region = sorted(generator.randrange(shape.num_regions) for _ in range(shape.num_nodes))
    names = tuple(f"region-{where}-node-{index}" for index, where in enumerate(region))
    between_s = _transfers_s(shape.num_regions, generator)
    speed = {name: generator.choice(shape.speeds) for name in names}
    costs = Costs(
        forward_s={name: _FORWARD_S * speed[name] for name in names},
        backward_s={name: 2 * _FORWARD_S * speed[name] for name in names},
        loss_s={name: _FORWARD_S / 4 * speed[name] for name in names},
        task_overhead_s=0.05,
        transfer_s={
            a: {b: between_s[here][there] for b, there in zip(names, region, strict=True) if b != a}
            for a, here in zip(names, region, strict=True)
        },
        memory={name: generator.randint(shape.least_memory, shape.most_memory) for name in names},
    )
    return Problem(
        about=f"synthetic, seed {seed}: {shape}",
        nodes=names,
        regions=tuple(f"region-{where}" for where in region),
        stage_sizes=stage_sizes(shape.num_nodes, shape.num_stages, shape.route_length),
        microbatches_per_origin=EvenMicrobatches(even=shape.num_microbatches),
        costs=costs,
        rules=Rules(num_stages=shape.num_stages, route_length=shape.route_length),
    )


def _transfers_s(num_regions: int, generator: random.Random) -> list[list[float]]:
    """Return the seconds of one activation from region to region; both ways alike, fast within one."""
    places = [(asin(generator.uniform(-0.8, 0.8)), generator.uniform(-pi, pi)) for _ in range(num_regions)]
    table = [[0.0005 + _ACTIVATION_GBIT / 10.0] * num_regions for _ in range(num_regions)]
    for a, (latitude_a, longitude_a) in enumerate(places):
        for b, (latitude_b, longitude_b) in enumerate(places[:a]):
            straight = sin(latitude_a) * sin(latitude_b)
            straight += cos(latitude_a) * cos(latitude_b) * cos(longitude_a - longitude_b)
            distance_km = _EARTH_RADIUS_KM * acos(max(-1.0, min(1.0, straight)))
            latency_s = 0.001 + _DETOUR * distance_km / _LIGHT_KM_PER_S
            gbit_per_s = exp(generator.gauss(0.0, 0.6)) * 2.0 / (1.0 + distance_km / 3000)
            table[a][b] = table[b][a] = latency_s + _ACTIVATION_GBIT / gbit_per_s
    return table


def varied_problem(seed: int) -> Problem:
    """Return a problem whose size, speeds and network are drawn from `seed`: for judging what was never tuned on."""
    generator = random.Random(seed)
    num_stages = generator.randint(4, 10)
    length = route_length(num_stages, generator.choice((0.25, 1 / 3, 0.5)))
    num_nodes = generator.randint(3 * num_stages, 8 * num_stages)
    origins = stage_sizes(num_nodes, num_stages, length)[0]
    shape = Shape(
        num_nodes=num_nodes,
        num_stages=num_stages,
        route_length=length,
        num_microbatches=origins * generator.randint(4, 10),
        num_regions=generator.randint(1, 12),
        speeds=generator.choice(((1.0,), (1.0, 2.0), (1.0, 1.5, 2.2))),
        least_memory=2,
        most_memory=generator.randint(2, 6),
    )
    return synthetic_problem(shape, seed)


def placement_free(problem: Problem) -> Problem:
    """Return the problem with its placement left to the planner."""
    return problem.model_copy(update={"stages": None, "stage_sizes": problem.sizes, "published": None})


def origins_free(problem: Problem) -> Problem:
    """Return the problem with the number of microbatches of each origin left to the planner."""
    return problem.model_copy(update={"microbatches_per_origin": AutoMicrobatches(auto=problem.num_microbatches)})


@click.command()
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", "out_path", type=click.Path(path_type=Path), required=True, help="Problem file to write.")
def main(seed: int, out_path: Path) -> None:
    """Write a synthetic problem whose shape and content follow from the seed."""
    problem = varied_problem(seed)
    out_path.write_text(problem.model_dump_json(exclude_none=True))
    click.echo(f"{out_path}: {problem.about}")


if __name__ == "__main__":
    main()
