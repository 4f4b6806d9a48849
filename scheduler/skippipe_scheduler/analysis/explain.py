"""What a plan's iteration time comes from, in words."""

from collections.abc import Iterable, Mapping

from skippipe_scheduler.analysis.critical_path import REASONS, CriticalPath, PathSegment, critical_path
from skippipe_scheduler.analysis.usage import Analysis, NodeAnalysis, analyse
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate

MOST_SHOWN = 5
"""So many nodes, links and segments are named at most in each list."""


def explain(plan: Plan) -> str:
    """Say in words what a plan's iteration time comes from.

    Args:
        plan: The plan.

    Returns:
        Several lines: the bottleneck, the critical path by kind and place, the busiest node, the tightest memory, the
        waits, the busiest link. Times are in seconds.

    Raises:
        DeadlockError: The order of the plan makes nodes wait for each other.

    Examples:
        >>> print(explain(plan))
        Bottleneck: ...
        Critical path: ... s in ... segments, each waiting for the one before it
          by kind ...
        Busiest node: ...
        Tightest memory: ...
        Nodes are idle for ...
        Busiest link: ...
    """
    timeline = simulate(plan)
    analysis, path = analyse(plan, timeline), critical_path(plan, timeline)
    return "\n".join([bottleneck(plan, path), *path_summary(plan, path), *_nodes(analysis), *_links(analysis)])


def bottleneck(plan: Plan, path: CriticalPath) -> str:
    """Return one sentence on what the critical path consists of most, and where."""
    seconds_of: dict[str, float] = {}
    for segment in path.segments:
        cause = _cause(segment)
        seconds_of[cause] = seconds_of.get(cause, 0.0) + segment.duration_s
    if not seconds_of:
        return "Bottleneck: none, the plan has no tasks."
    cause = max(seconds_of, key=lambda name: seconds_of[name])
    places: dict[str, float] = {}
    for segment in path.segments:
        if _cause(segment) == cause:
            places[segment.place] = places.get(segment.place, 0.0) + segment.duration_s
    place = max(places, key=lambda name: places[name])
    if cause == "gradient reduction":
        where = f"of stage {plan.stage_of[place]}"
    else:
        where = f"most on {place}" + (f" (stage {plan.stage_of[place]})" if place in plan.stage_of else "")
    share = seconds_of[cause] / path.iteration_s if path.iteration_s else 0.0
    return f"Bottleneck: {cause}, {seconds_of[cause]:.4f} s of {path.iteration_s:.4f} s ({share:.1%}), {where}."


def _cause(segment: PathSegment) -> str:
    """Return what a segment of the critical path is due to, in words."""
    match segment.kind:
        case "reduction":
            return "gradient reduction"
        case "queueing":
            return "transfers that queue"
        case "transfer" | "forward relay" | "backward relay":
            return "transfers"
        case "overhead":
            return "overhead after tasks"
        case "forward" | "backward" | "loss" | "weight gradient":
            return "the work of nodes"


def path_summary(plan: Plan, path: CriticalPath) -> list[str]:
    """Return the lines that say what the iteration time is made of."""
    whole_s = path.iteration_s
    lines = [
        f"Critical path: {whole_s:.4f} s in {len(path.segments)} segments, each waiting for the one before it",
        f"  by kind     {_shares(path.by_kind, whole_s)}",
        f"  by place    {_shares(path.by_place, whole_s)}",
    ]
    if plan.regions is not None:
        lines.append(f"  by region   {_shares(path.by_region(plan), whole_s)}")
    longest = sorted(path.segments, key=lambda segment: (-segment.duration_s, segment.start_s))[:MOST_SHOWN]
    lines.append("  its longest segments:")
    lines += [f"    {describe(segment)}" for segment in longest]
    return [*lines, *(f"  and its last: {describe(segment)}" for segment in path.segments[-1:])]


def describe(segment: PathSegment) -> str:
    """Return one segment of the critical path in words, with why it could not be earlier."""
    whose = "" if segment.microbatch < 0 else f" of microbatch {segment.microbatch}"
    reason = REASONS[segment.reason]
    return f"{segment.start_s:.4f} s  {segment.kind}{whose}, {segment.place}: {segment.duration_s:.4f} s; {reason}"


def _nodes(analysis: Analysis) -> list[str]:
    nodes = analysis.nodes
    busiest = max(nodes, key=lambda node: node.utilisation)
    tightest = max(nodes, key=lambda node: (node.peak_held / node.memory, node.peak_held))
    full = sum(node.peak_held == node.memory for node in nodes)
    lines = [
        f"Busiest node: {busiest.node} (stage {busiest.stage}) computes {busiest.utilisation:.1%} of the time; "
        f"all nodes {1 - analysis.bubble_fraction:.1%}",
        f"Tightest memory: {tightest.node} holds {tightest.peak_held} of {tightest.memory} microbatches; "
        f"{full} of {len(nodes)} nodes are full at some time",
    ]
    lines.append(f"Nodes are idle for {_parts(nodes, analysis.iteration_s)} of all node time")
    exposed = {node.node: node.exposed_communication_s for node in nodes if node.exposed_communication_s > 0}
    if exposed:
        ranked = dict(sorted(exposed.items(), key=lambda item: -item[1]))
        lines.append(f"  waiting for transfers most: {_shares(ranked, analysis.iteration_s)}")
    return lines


def _parts(nodes: Iterable[NodeAnalysis], iteration_s: float) -> str:
    listed = list(nodes)
    whole_s = (iteration_s * len(listed)) or 1.0
    parts = {
        "transfers": sum(node.exposed_communication_s for node in listed),
        "the work of other nodes": sum(node.waiting_s for node in listed),
        "reductions": sum(node.reduction_s for node in listed),
        "the end": sum(node.ending_s for node in listed),
        "overhead": sum(node.overhead_s for node in listed),
    }
    return ", ".join(f"{name} {seconds / whole_s:.1%}" for name, seconds in parts.items())


def _links(analysis: Analysis) -> list[str]:
    if not analysis.links:
        return []
    link = analysis.links[0]
    lines = [
        f"Busiest link: {link.source} to {link.destination}, {link.num_transfers} transfers, "
        f"occupied {link.occupancy:.1%} of the time"
    ]
    queued = max(analysis.links, key=lambda link: link.queued_s)
    if queued.queued_s > 0:
        lines.append(
            f"Longest queue: {queued.source} to {queued.destination}, {queued.queued_s:.4f} s in all, "
            f"{queued.longest_queue_s:.4f} s for one transfer"
        )
    return lines


def _shares(seconds_of: Mapping[str, float], whole_s: float) -> str:
    shown = list(seconds_of.items())[:MOST_SHOWN]
    text = ", ".join(f"{name} {seconds:.4f} s ({seconds / whole_s if whole_s else 0:.1%})" for name, seconds in shown)
    more = len(seconds_of) - len(shown)
    return f"{text}, {more} more" if more > 0 else text
