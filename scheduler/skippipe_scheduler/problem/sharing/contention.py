"""How transfers share the network: the kinds of contention, and every place that has to know a kind.

"none"  transfers never wait for each other;
"link"  a directed link carries one transfer at a time;
"node"  a node's network card sends one transfer at a time, and receives one at a time;
"shared"  as "link", and transfers that are under way at once share cards and uplinks fairly (`sharing.fluid`).

A transfer waits until every resource that it occupies is free, occupies all of them for bytes / bandwidth
(`Costs.occupancy_s`; with "shared" for as long as its share takes), and arrives its latency later. It is served in the
order in which it became ready.

To add a kind, add its name to `Contention`: mypy then names each `match` below that lacks it, and the kernel fails to
import until the kind has its number. All places that know kinds:

    occupied_resources, shares_cards (here)       what a transfer occupies: `plan.simulate` and `analysis.critical_path`
                                                  ask the one, `problem.gradient_reduction` the other
    plan.shared_links                             transfers that share capacities
    problem.costs.Costs                           which costs the kind needs, and for how long a transfer occupies
    search.kernel.arrays                          the kind's number
    search.kernel.timing.retime                   the simulator's rule again, compiled; `search.kernel.fair_sharing`
    search.kernel.reduction_time                  the rule of gradient reductions again, compiled
    plan.validate                                 whether transfer times are latency and bytes / bandwidth
    analysis.usage                                how long a link was occupied
    bounds                                        count every transfer as alone: valid for any kind that only delays;
                                                  `bounds.carrying` what capacities alone take
    search.kernel.loads                           what cards and uplinks carry, before exact times
    baselines.dispatch                            chooses as if there were none, and times exactly
    skippipe.runtime.executors.emulation          what of it one sender can make real
    tests/scheduler/{independent_checker,brute_force}.py, docs/plan-file.md, docs/clusters.md
"""

from typing import Literal, assert_never

Contention = Literal["none", "link", "node", "shared"]
Resource = tuple[str, str]
"""What carries one transfer at a time: a link by its ends, or a network card as ("out" or "in", node). Or what several
share fairly: such a card, or an uplink as ("up" or "down", its name)."""


def occupied_resources(contention: Contention, source: str, destination: str) -> tuple[Resource, ...]:
    """Return all that a transfer from `source` to `destination` occupies; of one kind, names never clash."""
    match contention:
        case "none":
            return ()
        case "link" | "shared":
            return ((source, destination),)
        case "node":
            # The cards serve their transfers one by one, so the link between them never has two.
            return (("out", source), ("in", destination))
        case _:
            assert_never(contention)


def shares_cards(contention: Contention) -> bool:
    """Return whether messages that leave a node at the same time queue at its network card."""
    match contention:
        case "none" | "link" | "shared":
            return False
        case "node":
            return True
        case _:
            assert_never(contention)
