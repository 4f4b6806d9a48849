"""A second opinion on a plan file: every rule of docs/plan-file.md and the predicted times, from the JSON alone.

Nothing here comes from the package, so that a mistake in the validator or the simulator cannot hide itself.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

Content = dict[str, Any]
TOLERANCE = 1e-6


def first_offence_of(content: Content) -> str | None:
    """Return the first rule that the plan breaks, in words, or None where it is a valid plan."""
    for check in (_placement, _costs, _routes, _lengths, _coverage, _orders, _times_and_memory):
        offence = next(check(content), None)
        if offence:
            return offence
    return None


def _placement(content: Content) -> Iterator[str]:
    nodes, stages = content["nodes"], content["stages"]
    if len(content.get("regions") or nodes) != len(nodes):
        yield "regions do not fit the nodes"
    if sorted(node for stage in stages for node in stage["nodes"]) != sorted(set(nodes)) or len(set(nodes)) < len(
        nodes
    ):
        yield "the stages do not hold every node once"
    if len(stages) != content["rules"]["num_stages"]:
        yield "number of stages"
    absent = content["rules"].get("absent_stages") or []
    if [index for index, stage in enumerate(stages) if not stage["nodes"]] != absent:
        yield "the stages without a node are not those that are said to be absent"
    edges = [0, *(stage["layers"][1] for stage in stages)]
    if [stage["layers"][0] for stage in stages] != edges[:-1] or edges != sorted(set(edges)):
        yield "the layers are not held once, in order"


def _costs(content: Content) -> Iterator[str]:
    nodes, costs = content["nodes"], content["costs"]
    for table in ("forward_s", "backward_s", "loss_s", "memory"):
        if not set(nodes) <= set(costs[table]):
            yield f"{table} of a node is missing"
    if len(costs.get("reduce_s", [])) != len(content["stages"]):
        yield "reduce_s does not fit the stages"
    for node, weight_s in (costs.get("weight_s") or {}).items():
        if node not in nodes or not 0 < weight_s < costs["backward_s"][node]:
            yield f"weight_s of {node} is no part of its backward"
    shared = costs["contention"] != "none"
    tables = [costs["transfer_s"], *((costs["latency_s"], costs["gbit_per_s"]) if shared else ())]
    for source in nodes:
        for sink in set(nodes) - {source}:
            if any(sink not in table.get(source, {}) for table in tables):
                yield f"a cost from {source} to {sink} is missing"
            elif shared and costs["gbit_per_s"][source][sink] > (1 + TOLERANCE) * _narrowest(costs, source, sink):
                yield f"the link from {source} to {sink} is faster than what it leads through"
            elif shared:
                parts_s = costs["latency_s"][source][sink] + occupancy_s(costs, source, sink)
                if not _same(parts_s, costs["transfer_s"][source][sink]):
                    yield f"transfer_s from {source} to {sink} is not the sum of its parts"


def _narrowest(costs: Content, source: str, sink: str) -> float:
    """Gbit/s of the narrowest card or uplink between two nodes."""
    cards = costs.get("card_gbit_per_s") or {}
    found = [cards[source]["up"]] if source in cards else []
    found += [cards[sink]["down"]] if sink in cards else []
    for site in costs.get("uplinks") or []:
        if (source in site["nodes"]) != (sink in site["nodes"]):
            found.append(site["gbit_per_s"]["up" if source in site["nodes"] else "down"])
    return min(found, default=float("inf"))


def occupancy_s(costs: Content, source: str, sink: str) -> float:
    """Seconds for which one transfer keeps its link busy."""
    if costs["contention"] == "none":
        return 0.0
    return float(costs["activation_bytes"] * 8 / (costs["gbit_per_s"][source][sink] * 1e9))


def _stage_of(content: Content) -> dict[str, int]:
    return {node: index for index, stage in enumerate(content["stages"]) for node in stage["nodes"]}


def _routes(content: Content) -> Iterator[str]:
    stage_of, rules = _stage_of(content), content["rules"]
    if not content["microbatches"]:
        yield "no microbatch"
    for index, microbatch in enumerate(content["microbatches"]):
        if microbatch["id"] != index:
            yield f"microbatch {index} has another id"
        if not set(microbatch["route"]) <= set(stage_of):
            yield f"microbatch {index} visits an unknown node"
            return
        yield from _path_offences(microbatch, set(stage_of))
        stages = [stage_of[node] for node in microbatch["route"]]
        if stages[0] != 0 or len(set(stages)) < len(stages):
            yield f"microbatch {index} does not start at stage 0, or visits a stage twice"
        if not set(rules.get("protected_stages", [])) <= set(stages):
            yield f"microbatch {index} leaves out a protected stage"
        jumps = [stage - max(stages[:hop]) for hop, stage in enumerate(stages) if hop]
        over = [
            len(set(range(max(stages[:hop]), stage)) & set(rules.get("absent_stages") or []))
            for hop, stage in enumerate(stages)
            if hop
        ]
        if sum(jump < 0 for jump in jumps) > rules["max_swaps"]:
            yield f"microbatch {index} swaps too often"
        if -min(jumps) > rules["max_swap_distance"]:
            yield f"microbatch {index} swaps too far"
        if any(jump - absent > rules["max_forward_jump"] for jump, absent in zip(jumps, over, strict=True)):
            yield f"microbatch {index} jumps too far"


def _path_offences(microbatch: Content, nodes: set[str]) -> Iterator[str]:
    """The path is the route with other nodes behind any of its own."""
    route, path = microbatch["route"], _path(microbatch)
    if not set(path) <= nodes or len(set(path)) < len(path):
        yield f"microbatch {microbatch['id']} comes to an unknown node, or to one twice"
    if path[:1] != route[:1] or [node for node in path if node in route] != route:
        yield f"the path of microbatch {microbatch['id']} is not its route and more"


def _path(microbatch: Content) -> list[str]:
    given: list[str] | None = microbatch.get("path")
    path: list[str] = microbatch["route"] if given is None else given
    return path


def _lengths(content: Content) -> Iterator[str]:
    """Largest remainders: shares are rounded down or up, and none is rounded up before one that has a larger rest."""
    rules = content["rules"]
    shares = {int(length): share for length, share in (rules.get("route_lengths") or {}).items()}
    shares = shares or {rules["route_length"]: 1}
    found = Counter(len(microbatch["route"]) for microbatch in content["microbatches"])
    if not set(found) <= set(shares):
        yield "a route has a length that the rules do not name"
    exact = {length: found.total() * share / sum(shares.values()) for length, share in shares.items()}
    excess = {length: found[length] - int(exact[length] + 1e-9) for length in shares}
    if not set(excess.values()) <= {0, 1}:
        yield "the mix of lengths is not the one asked for"
    rest = {length: exact[length] - int(exact[length] + 1e-9) for length in shares}
    up, down = ([rest[length] for length in shares if excess[length] == way] for way in (1, 0))
    if up and down and min(up) < max(down) - 1e-9:
        yield "the mix of lengths is rounded the wrong way"


def _coverage(content: Content) -> Iterator[str]:
    stage_of = _stage_of(content)
    visits = Counter(stage_of[node] for microbatch in content["microbatches"] for node in microbatch["route"])
    protected = [*content["rules"].get("protected_stages", []), *(content["rules"].get("absent_stages") or [])]
    counts = [visits[stage] for stage in range(1, len(content["stages"])) if stage not in protected]
    if counts and content["rules"]["uniform_coverage"] and max(counts) - min(counts) > 1:
        yield "the stages are not visited equally often"


def _orders(content: Content) -> Iterator[str]:
    wanted: Counter[tuple[str, str, int]] = Counter()
    for index, microbatch in enumerate(content["microbatches"]):
        wanted.update((node, operation, index) for node in microbatch["route"] for operation in "FB")
        wanted[microbatch["route"][0], "L", index] += 1
        relays = set(_path(microbatch)) - set(microbatch["route"])
        wanted.update((node, operation, index) for node in relays for operation in ("RF", "RB"))
    found = Counter((node, *task) for node, tasks in content["order"].items() for task in tasks)
    for index, microbatch in enumerate(content["microbatches"]):
        for node in set(microbatch["route"][1:]) & set(content["costs"].get("weight_s") or {}):
            wanted[node, "W", index] = min(1, found[node, "W", index])
    wanted = +wanted
    if found != wanted or not set(content["order"]) <= set(content["nodes"]):
        yield "the order does not hold every task once"


def _times_and_memory(content: Content) -> Iterator[str]:
    spans = replay(content)
    if spans is None:
        yield "the order deadlocks"
        return
    for node, limit in content["costs"]["memory"].items():
        if _most_held(node, spans) > limit:
            yield f"{node} holds too many microbatches"
    times, predicted = times_s(content, spans), content["predicted"]
    for name, exact_s in times.items():
        if not _same(predicted[name], exact_s, times["iteration_s"]):
            yield f"predicted.{name} is {predicted[name]}, not {exact_s}"
    if predicted["lower_bound_s"] > times["iteration_s"] * (1 + TOLERANCE):
        yield "the lower bound is above the iteration"


Spans = dict[tuple[str, str, int], tuple[float, float]]
"""Start and end in seconds of each (node, operation, microbatch)."""


def times_s(content: Content, spans: Spans) -> dict[str, float]:
    """Return what a plan predicts, as it follows from when its tasks run."""
    pipeline_s = max(end_s for _, end_s in spans.values())
    stage_of = _stage_of(content)
    last_s = dict.fromkeys(stage_of.values(), 0.0)
    for (node, _, _), (_, end_s) in spans.items():
        last_s[stage_of[node]] = max(last_s[stage_of[node]], end_s)
    reduced_s = max(
        last_s[stage] + duration_s for stage, duration_s in enumerate(content["costs"]["reduce_s"]) if stage in last_s
    )
    iteration_s = max(pipeline_s, reduced_s)
    return {"iteration_s": iteration_s, "pipeline_s": pipeline_s, "reduce_exposed_s": iteration_s - pipeline_s}


def _most_held(node: str, spans: Spans) -> int:
    """Return the most microbatches between the start of their forward and the end of their backward, or of their weight
    gradient where there is one.
    """
    changes = [(start_s, 1) for (where, what, _), (start_s, _) in spans.items() if (where, what) == (node, "F")]
    ends = {microbatch: span[1] for (where, what, microbatch), span in spans.items() if (where, what) == (node, "B")}
    ends |= {microbatch: span[1] for (where, what, microbatch), span in spans.items() if (where, what) == (node, "W")}
    changes += [(end_s, -1) for end_s in ends.values()]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


def replay(content: Content) -> Spans | None:
    """Return when every task runs, or None where they wait for each other for ever.

    Rounds: all tasks whose input is there, then the one transfer that has been ready longest (then the lower
    microbatch), which starts when its link, and with contention "node" both cards, are free. With contention "shared"
    a round brings what happens next: a transfer gets ready, or the last byte of one leaves.
    """
    costs, spans = content["costs"], Spans()
    chains = [_chain(microbatch) for microbatch in content["microbatches"]]
    arrived_s = {(chain[0][0], "F", index): 0.0 for index, chain in enumerate(chains)}
    duration_s = {"F": costs["forward_s"], "L": costs["loss_s"], "B": costs["backward_s"], "W": costs.get("weight_s")}
    duration_s |= dict.fromkeys(("RF", "RB"), dict.fromkeys(content["nodes"], 0.0))
    left = {node: [(node, *task) for task in tasks] for node, tasks in content["order"].items()}
    idle_from_s: dict[str, float] = {}
    shared_from_s: dict[Any, float] = {}
    ready: list[tuple[float, int, int]] = []
    wires = _Wires(costs, chains)
    while True:
        for node, tasks in left.items():
            while tasks and tasks[0] in arrived_s:
                task = tasks.pop(0)
                start_s = max(arrived_s[task], idle_from_s.get(node, 0.0))
                taken_s = duration_s[task[1]][node]
                if task[1] == "B" and [*_weight_gradient(task)] in content["order"][node]:
                    taken_s -= duration_s["W"][node]
                    arrived_s[node, *_weight_gradient(task)] = start_s + taken_s
                spans[task] = start_s, start_s + taken_s
                idle_from_s[node] = spans[task][1] + costs.get("task_overhead_s", 0.0)
                step = chains[task[2]].index(task[:2]) if task[1] != "W" else len(chains[task[2]])
                if step + 1 < len(chains[task[2]]):
                    ready.append((spans[task][1], task[2], step))
        if not ready and not wires.queues:
            return spans if not any(left.values()) else None
        ready.sort()
        if costs["contention"] == "shared":
            arrived_s.update(wires.happen_next(ready))
            continue
        ready_s, microbatch, step = ready.pop(0)
        (source, _), (sink, operation) = chains[microbatch][step : step + 2]
        start_s = max(
            [ready_s, *(shared_from_s.get(queue, 0.0) for queue in _shared(costs["contention"], source, sink))]
        )
        for queue in _shared(costs["contention"], source, sink):
            shared_from_s[queue] = start_s + occupancy_s(costs, source, sink)
        arrived_s[sink, operation, microbatch] = start_s + costs["transfer_s"][source][sink]


class _Wires:
    """What is on its way with contention "shared": the first of each link at a fair share of cards and uplinks."""

    def __init__(self, costs: Content, chains: list[list[tuple[str, str]]]) -> None:
        self.costs, self.chains, self.now_s = costs, chains, 0.0
        self.queues: dict[tuple[str, str], list[list[Any]]] = {}

    def happen_next(self, ready: list[tuple[float, int, int]]) -> dict[tuple[str, str, int], float]:
        """Take the first of `ready` or let a message leave, whichever is earlier; return what then arrives when."""
        speeds = self._speeds()
        ends_s = {link: self.now_s + queue[0][0] / speeds[link] for link, queue in self.queues.items()}
        next_s = min([*ends_s.values(), *(entry[0] for entry in ready[:1])])
        for link, queue in self.queues.items():
            queue[0][0] -= speeds[link] * (next_s - self.now_s)
        self.now_s = next_s
        if ready and ready[0][0] == next_s:
            _, microbatch, step = ready.pop(0)
            (source, _), (sink, _) = self.chains[microbatch][step : step + 2]
            self.queues.setdefault((source, sink), []).append([self.costs["activation_bytes"] * 8, microbatch, step])
            return {}
        source, sink = link = min(ends_s, key=lambda link: ends_s[link])
        _, microbatch, step = self.queues[link].pop(0)
        self.queues = {link: queue for link, queue in self.queues.items() if queue}
        task = (*self.chains[microbatch][step + 1], microbatch)
        return {task: next_s + self.costs["latency_s"][source][sink]}

    def _speeds(self) -> dict[tuple[str, str], float]:
        """Bit/s of all links in use: the whole group of the tightest limit gets its equal part, then what is left."""
        limits = [(1e9 * self.costs["gbit_per_s"][source][sink], {(source, sink)}) for source, sink in self.queues]
        for node, card in (self.costs.get("card_gbit_per_s") or {}).items():
            limits.append((1e9 * card["up"], {link for link in self.queues if link[0] == node}))
            limits.append((1e9 * card["down"], {link for link in self.queues if link[1] == node}))
        for site in self.costs.get("uplinks") or []:
            inside = set(site["nodes"])
            leaves = {link for link in self.queues if link[0] in inside and link[1] not in inside}
            enters = {link for link in self.queues if link[1] in inside and link[0] not in inside}
            limits += [(1e9 * site["gbit_per_s"]["up"], leaves), (1e9 * site["gbit_per_s"]["down"], enters)]
        speeds: dict[tuple[str, str], float] = {}
        while len(speeds) < len(self.queues):
            parts = []
            for bits, links in limits:
                if open_links := links - speeds.keys():
                    rest = bits - sum(speeds[link] for link in links & speeds.keys())
                    parts.append((rest / len(open_links), sorted(open_links)))
            part, tightest = min(parts)
            speeds |= dict.fromkeys(tightest, part)
        return speeds


def _weight_gradient(backward: tuple[str, str, int]) -> tuple[str, int]:
    return "W", backward[2]


def _chain(microbatch: Content) -> list[tuple[str, str]]:
    """Return the tasks of a microbatch: forward, loss at the origin, backward the same way in reverse."""
    path = _path(microbatch)
    kind = {node: "" if node in microbatch["route"] else "R" for node in path}
    forward = [(node, f"{kind[node]}F") for node in path]
    return [*forward, (path[0], "L"), *((node, f"{kind[node]}B") for node in reversed(path))]


def _shared(contention: str, source: str, sink: str) -> list[Any]:
    link = [(source, sink)] if contention != "none" else []
    return [*link, ("out", source, 0), ("in", sink, 0)] if contention == "node" else link


def _same(one_s: float, other_s: float, scale_s: float = 0.0) -> bool:
    return abs(one_s - other_s) <= TOLERANCE * max(abs(one_s), abs(other_s), scale_s) + 1e-9
