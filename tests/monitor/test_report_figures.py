"""What the pictures are drawn from: every task has its bar, every route its line."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from crowding import at_most_s
from hypothesis import given, strategies as st
from random_plans import random_plan

from skippipe.monitor.evaluation_results import DepthResult, Evaluation
from skippipe.monitor.metrics import Metric
from skippipe.monitor.report.churn_page import averaged
from skippipe.monitor.report.figures.curves import (
    MOST_POINTS,
    depth_figure,
    iteration_figure,
    loss_figure,
    percentiles,
    thin,
)
from skippipe.monitor.report.figures.gantt import MOST_ROWS, NUMBERED_BARS, gantt_figure, gantt_rows, select
from skippipe.monitor.report.figures.load_over_time import held_in_parts, load_figure, memory_figure
from skippipe.monitor.report.figures.region_map import RegionMap, regions_figure
from skippipe.monitor.report.figures.route_map import RouteMap, routes_figure
from skippipe.monitor.report.page import Bar
from skippipe.monitor.report.spans import REDUCE, ChartSpan, timeline_spans
from skippipe.monitor.report.theme import colour, fade
from skippipe.monitor.report.units import percent, seconds, significant
from skippipe.monitor.report.waits import BELOW_BAR, path_line, path_tables
from skippipe.planning.churn.replay import Stretch
from skippipe_scheduler.analysis.critical_path import critical_path
from skippipe_scheduler.analysis.usage import LOAD_PARTS, analyse
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.0456, "45.6 ms"),
        (0.0009996, "1.00 ms"),
        (3.1e-5, "31.0 µs"),
        (0.0, "0 s"),
        (math.inf, "not finite"),
    ],
)
def test_seconds_have_a_fitting_unit(value: float, shown: str) -> None:
    assert seconds(value) == shown


@given(st.floats(min_value=1e-4, max_value=1e6))
def test_significant_digits_keep_the_value(value: float) -> None:
    assert float(significant(value)) == pytest.approx(value, rel=6e-3)


def test_small_formats() -> None:
    assert percent(0.1234) == "12.3 %"
    assert fade("#4c8dff", 0.5) == "rgba(76, 141, 255, 0.5)"
    assert colour(0) == colour(12)


def test_gantt_has_a_row_a_node_grouped_by_region_then_stage(plan: Plan) -> None:
    rows = gantt_rows(plan)
    assert [row.node for row in rows] == ["ams-0", "ams-1", "ams-2", "nyc-0", "nyc-1", "nyc-2"]
    assert [row.group for row in rows] == ["ams"] * 3 + ["nyc"] * 3


def test_gantt_draws_each_task_once_at_its_time(plan: Plan) -> None:
    timeline = simulate(plan)
    figure = gantt_figure(plan, timeline_spans(plan, timeline), "title")
    rows = [row.node for row in gantt_rows(plan)]
    drawn = sorted(
        (rows[y], trace.name[0], int(detail[1]), base, base + x)
        for trace in figure.data
        if trace.name != "Gradient reduction"
        for y, detail, base, x in zip(trace.y, trace.customdata, trace.base, trace.x, strict=True)
    )
    expected = sorted((t.node, t.operation, t.microbatch, t.start_s, t.end_s) for t in timeline.tasks)
    assert [bar[:3] for bar in drawn] == [task[:3] for task in expected]
    for bar, task in zip(drawn, expected, strict=True):
        assert bar[3:] == pytest.approx(task[3:], abs=1e-6)


def test_gantt_shows_the_reduction_on_every_replica(plan: Plan) -> None:
    spans = [span for span in timeline_spans(plan, simulate(plan)) if span.operation == REDUCE]
    assert sorted(span.node for span in spans) == ["ams-0", "ams-2", "nyc-0", "nyc-2"]
    reduction = gantt_figure(plan, spans, "title").data[0]
    assert len(reduction.x) == 4
    assert reduction.marker.pattern.shape == "/"


def test_hop_of_a_bar_is_the_place_on_the_route(plan: Plan) -> None:
    spans = [
        ChartSpan("nyc-1", "F", 3, 0.0, 1.0),
        ChartSpan("nyc-0", "L", 3, 1.0, 2.0),
        ChartSpan("ams-2", "B", 99, 2.0, 3.0),
    ]
    hops = {trace.name: trace.customdata[0][2] for trace in gantt_figure(plan, spans, "title").data}
    assert hops == {"Forward": 2, "Loss": 0, "Backward": -1}


def test_gantt_marks_each_relay_at_its_time_with_its_hop_on_the_path(relaying_plan: Plan) -> None:
    timeline = simulate(relaying_plan)
    figure = gantt_figure(relaying_plan, timeline_spans(relaying_plan, timeline), "title")
    traces = {trace.name: trace for trace in figure.data}
    rows = [row.node for row in gantt_rows(relaying_plan)]
    for operation, name, symbol in (
        ("RF", "Forward relay", "triangle-right"),
        ("RB", "Backward relay", "triangle-left"),
    ):
        marks = traces[name]
        drawn = [
            (rows[y], detail[1], detail[2], x) for y, detail, x in zip(marks.y, marks.customdata, marks.x, strict=True)
        ]
        relays = [span for span in timeline.tasks if span.operation == operation]
        assert drawn == [(span.node, span.microbatch, span.hop, round(span.start_s, 7)) for span in relays]
        assert len(relays) == 4
        assert (marks.mode, marks.marker.symbol) == ("markers", symbol)
        assert name in marks.hovertemplate
    bars = sum(len(trace.x) for trace in figure.data if trace.type == "bar" and trace.name != "Gradient reduction")
    assert bars + 8 == len(timeline.tasks)


def test_gantt_leaves_out_nodes_that_the_plan_does_not_know(plan: Plan) -> None:
    figure = gantt_figure(plan, [ChartSpan("gone", "F", 0, 0.0, 1.0)], "title")
    assert len(figure.data) == 0


def test_gantt_of_thousands_of_bars_is_quick_and_plain(plan: Plan) -> None:
    spans = [ChartSpan(plan.nodes[i % 6], "FLB"[i % 3], i % 4, i * 0.1, i * 0.1 + 0.05) for i in range(20_000)]
    start_s = time.perf_counter()
    figure = gantt_figure(plan, spans, "title")
    assert time.perf_counter() - start_s < at_most_s(5)
    assert len(figure.data) == 3
    assert all(trace.text is None for trace in figure.data)
    assert gantt_figure(plan, spans[:NUMBERED_BARS], "title").data[0].text is not None


def test_few_bars_are_all_drawn(plan: Plan) -> None:
    spans = timeline_spans(plan, simulate(plan))
    assert select(plan, spans) == (spans, plan.nodes, "")


def test_of_too_many_bars_those_of_the_busiest_nodes_are_drawn(plan: Plan) -> None:
    spans = [
        ChartSpan(node, "F", 0, i, i + 0.1 * (rank + 1)) for i in range(10) for rank, node in enumerate(plan.nodes)
    ]
    chosen = select(plan, spans, most_bars=35)
    assert sorted(chosen.nodes) == sorted(plan.nodes[3:])
    assert len(chosen.spans) == 30
    assert chosen.note == "To keep the page quick, only the 3 busiest of 6 nodes are drawn."
    assert [len(gantt_figure(plan, chosen.spans, "title", nodes=chosen.nodes).layout.yaxis.tickvals)] == [3]
    single = select(plan, spans, most_bars=4)
    assert [span.node for span in single.spans] == [plan.nodes[-1]] * 4
    assert single.note.endswith("only the 1 busiest of 6 nodes are drawn, up to bar 4.")


def test_of_too_many_nodes_forty_are_drawn(plan: Plan) -> None:
    spans = [ChartSpan(f"node-{i % 100}", "F", 0, i, i + 1) for i in range(1000)]
    assert len(select(plan, spans, most_bars=900).nodes) == MOST_ROWS


def test_critical_path_runs_from_the_start_to_the_end_below_its_bars(plan: Plan) -> None:
    path = critical_path(plan)
    position = {row.node: index for index, row in enumerate(gantt_rows(plan))}
    line = path_line(path, position)
    assert (line.x[0], line.x[-1]) == pytest.approx((0.0, plan.predicted.iteration_s))
    assert list(line.x) == sorted(line.x)
    for segment, start, end in zip(path.segments, line.y[::2], line.y[1::2], strict=True):
        arrives = segment.destination if segment.kind == "transfer" else segment.node
        assert (start, end) == (position[segment.node] + BELOW_BAR, position[arrives or ""] + BELOW_BAR)
    assert len(line.text) == len(line.x)


def test_critical_path_has_a_gap_where_a_node_is_not_drawn(plan: Plan) -> None:
    path = critical_path(plan)
    gone = path.segments[0].node
    position = {row.node: index for index, row in enumerate(gantt_rows(plan)) if row.node != gone}
    line = path_line(path, position)
    missing = sum(
        gone in (segment.node, segment.kind == "transfer" and segment.destination) for segment in path.segments
    )
    assert list(line.x).count(None) == missing > 0
    assert len(line.text) == len(line.x) == len(line.y)


def test_path_tables_add_up(plan: Plan) -> None:
    tables = path_tables(plan, critical_path(plan))
    assert [table.header[0] for table in tables] == ["Kind of work or waiting", "Region", "Node or link"]
    for table in tables:
        assert sum(cell.share for row in table.rows for cell in row if isinstance(cell, Bar)) == pytest.approx(1)


def test_load_and_memory_have_a_row_a_node_in_the_order_of_the_gantt(plan: Plan) -> None:
    analysis = analyse(plan)
    load, memory = (draw(plan, analysis).data[0] for draw in (load_figure, memory_figure))
    rows = [row.node for row in gantt_rows(plan)]
    assert [texts[0] for texts in load.text] == rows
    nodes = {node.node: node for node in analysis.nodes}
    for node, percents, held in zip(rows, load.z, memory.customdata, strict=True):
        assert len(percents) == LOAD_PARTS
        assert sum(percents) / LOAD_PARTS == pytest.approx(100 * nodes[node].utilisation, abs=0.1)
        assert max(held) == nodes[node].peak_held


def test_held_in_parts_takes_the_most_of_each_part() -> None:
    steps = [(0.0, 0), (0.0, 1), (1.5, 2), (1.6, 1), (3.0, 0)]
    assert held_in_parts(steps, 4.0, parts=4) == [1, 2, 1, 0]


def test_names_are_shown_as_written(plan: Plan) -> None:
    renamed = plan.model_copy(update={"regions": ("<b>x</b>",) * 6})
    figure = gantt_figure(renamed, [], "<i>title</i>")
    assert figure.layout.annotations[0].text == "&lt;b&gt;x&lt;/b&gt;"
    assert figure.layout.title.text == "&lt;i&gt;title&lt;/i&gt;"


def test_route_lines_meet_their_nodes_and_avoid_skipped_ones(plan: Plan) -> None:
    routes = RouteMap(plan)
    for microbatch in plan.microbatches:
        points = routes.line(microbatch.id)
        near = [node for x, y in points for node, at in routes.place.items() if at[0] == x and abs(at[1] - y) < 0.26]
        assert near == list(microbatch.route)
        assert all(abs(a[0] - b[0]) == 1 for a, b in pairwise(points)), "every stage on the way is crossed"


def test_lines_go_through_relays_which_are_marked(relaying_plan: Plan) -> None:
    routes = RouteMap(relaying_plan)
    marks = next(trace for trace in routes_figure(relaying_plan).data if trace.name == "Relay")
    marked = set(zip(marks.x, marks.y, marks.text, strict=True))
    for microbatch in relaying_plan.microbatches:
        points = routes.line(microbatch.id)
        near = [node for x, y in points for node, at in routes.place.items() if at[0] == x and abs(at[1] - y) < 0.26]
        assert near == list(microbatch.whole_path)
        (relay,) = microbatch.relays
        x, y = next(point for point, node in zip(points, near, strict=True) if node == relay)
        assert (x, y, f"{relay} relays microbatch {microbatch.id}") in marked
    assert len(marked) == 4
    assert sum(routes.traffic.values()) == 4 * 3
    assert not [trace for trace in routes_figure(with_direct_messages(relaying_plan)).data if trace.name == "Relay"]


def with_direct_messages(plan: Plan) -> Plan:
    """Return the plan's routes without its paths; its order is not made to fit."""
    direct = tuple(microbatch.model_copy(update={"path": None}) for microbatch in plan.microbatches)
    return plan.model_copy(update={"microbatches": direct})


def test_visits_of_a_node_do_not_count_what_it_relays(relaying_plan: Plan) -> None:
    texts = {
        node: detail[2]
        for trace in routes_figure(relaying_plan).data
        if trace.mode == "markers+text"
        for node, detail in zip(trace.text, trace.customdata, strict=True)
    }
    assert texts == {
        **{"ams-0": "2", "nyc-0": "2", "nyc-1": "3 + 1 relayed", "ams-1": "3 + 1 relayed"},
        **{"ams-2": "1 + 1 relayed", "nyc-2": "1 + 1 relayed"},
    }
    lines = [text for trace in routes_figure(relaying_plan).data if trace.mode == "lines" for text in trace.text or ()]
    assert "<b>Microbatch 0</b><br>ams-0 → nyc-1 → ams-1 → ams-2 (relay)<br>skips stage 3" in lines


def test_route_map_counts_traffic(plan: Plan) -> None:
    traffic = RouteMap(plan).traffic
    assert traffic["nyc-0", "ams-1"] == 2
    assert sum(traffic.values()) == 4 * 2


@pytest.mark.parametrize("with_regions", [True, False])
def test_route_figure_has_a_line_for_each_microbatch(plan: Plan, with_regions: bool) -> None:
    shown = plan if with_regions else plan.model_copy(update={"regions": None})
    figure = routes_figure(shown)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.legendgroup]
    assert len({trace.line.color for trace in lines}) == 2
    assert sum(list(trace.x).count(None) for trace in lines) == 4
    named = [name for trace in figure.data if trace.mode == "markers+text" for name in trace.text]
    assert sorted(named) == sorted(plan.nodes)


def test_regions_are_as_far_apart_as_messages_take() -> None:
    """Three regions in a triangle of 3, 4 and 5 ms, which a plane can show exactly."""
    plan = random_plan(1, num_nodes=6, num_stages=3, route_length=3, num_microbatches=4)
    regions = ("east", "east", "north", "west", "west", "west")
    side_ms = {("east", "north"): 3.0, ("east", "west"): 4.0, ("north", "west"): 5.0}
    region_of = dict(zip(plan.nodes, regions, strict=True))
    latency_s = {
        a: {
            b: side_ms.get((region_of[a], region_of[b]), side_ms.get((region_of[b], region_of[a]), 0.0)) / 1e3
            for b in plan.nodes
            if b != a
        }
        for a in plan.nodes
    }
    costs = plan.costs.model_copy(update={"latency_s": latency_s})
    drawn = RegionMap(plan.model_copy(update={"regions": regions, "costs": costs}))
    assert drawn.num_nodes == {"east": 2, "north": 1, "west": 3}
    for (a, b), expected_ms in side_ms.items():
        assert math.dist(drawn.place[a], drawn.place[b]) == pytest.approx(expected_ms)
    hops = [pair for microbatch in plan.microbatches for pair in closed(microbatch.route)]
    crossing = Counter(frozenset(map(region_of.__getitem__, pair)) for pair in hops)
    carried = {frozenset(ends): sum(link.num_transfers for link in links) for ends, links in drawn.traffic.items()}
    assert carried == {ends: 2 * hops for ends, hops in crossing.items() if len(ends) == 2}  # there and back
    figure = regions_figure(drawn.plan)
    assert [list(trace.text) for trace in figure.data if trace.mode == "markers+text"] == [["east", "north", "west"]]
    assert len([trace for trace in figure.data if trace.mode == "lines"]) == len(carried)


def closed(route: Sequence[str]) -> list[tuple[str, str]]:
    """Return the hops of a route, that back to its origin for the loss included."""
    return [*pairwise(route), (route[-1], route[0])]


def test_loss_curves_take_what_was_recorded() -> None:
    steps = [
        {"tokens": 10.0, "train/loss": 3.0},
        {"tokens": 20.0, "train/loss": 2.0, "val/loss": 2.5},
        {"step": 3.0},
    ]
    training, validation = loss_figure({"one": steps}, Metric.TOKENS, "tokens").data
    assert list(training.x) == [10.0, 20.0]
    assert list(training.y) == [3.0, 2.0]
    assert list(validation.y) == [2.5]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=50), st.integers(1, 200))
def test_thinning_keeps_the_range_and_bounds_the_number(points: list[tuple[float, float]], repeat: int) -> None:
    many = points * repeat
    thinned = thin(many)
    assert len(thinned) <= MOST_POINTS
    assert bool(thinned) == bool(many)
    if many:
        slack = 1e-6 * (1 + max(y for _, y in many))
        assert min(y for _, y in many) - slack <= min(y for _, y in thinned)
        assert max(y for _, y in thinned) <= max(y for _, y in many) + slack


def test_iteration_bars_show_prediction_median_and_spread() -> None:
    predicted, measured = iteration_figure({"one": [1.0, 2.0, 3.0]}, {"one": 1.9}).data
    assert list(predicted.x) == [1.9]
    assert list(measured.x) == [2.0]
    assert list(measured.error_x.array) == pytest.approx([0.9])
    assert percentiles([7.0]) == (7.0, 7.0)


def depth_result(policy: str, *, kept_stages: int | None, share: float, perplexity: float) -> DepthResult:
    return DepthResult(
        policy=policy,
        keep=share,
        kept_stages=kept_stages,
        kept_layers=4 * share,
        share_computed=share,
        perplexity=perplexity,
        perplexity_std=0.0,
        samples=1,
    )


def evaluation_of(policies: list[str], results: list[DepthResult]) -> Evaluation:
    return Evaluation(model="model", checkpoint="step-00000001", tokens=32, policies=policies, results=results)


@pytest.mark.parametrize(("worst", "axis"), [(6.0, None), (600.0, "log")])
def test_depth_curve_is_sorted_and_logarithmic_where_it_must_be(worst: float, axis: str | None) -> None:
    results = [
        depth_result("random", kept_stages=4, share=1.0, perplexity=3.0),
        depth_result("random", kept_stages=2, share=0.5, perplexity=worst),
    ]
    figure = depth_figure({"one": evaluation_of(["random"], results)})
    assert list(figure.data[0].x) == [50.0, 100.0]
    assert list(figure.data[0].y) == [worst, 3.0]
    assert figure.layout.yaxis.type == axis


def evaluation(*policies: str) -> Evaluation:
    results = [
        depth_result(policy, kept_stages=None, share=share, perplexity=4 / share)
        for policy in policies
        for share in (1.0, 0.5)
    ]
    return evaluation_of(list(policies), results)


def test_policies_have_colours_and_markers_models_have_line_styles() -> None:
    models = {"normal": evaluation("full", "random", "exit"), "skip": evaluation("exit", "random", "best")}
    figure = depth_figure(models)
    lines = {(line.legendgroup, line.name): line for line in figure.data}
    assert set(lines) == {(name, policy) for name, model in models.items() for policy in model.policies}
    looks = {key: (line.line.color, line.marker.symbol) for key, line in lines.items()}
    for policy in ("random", "exit"):
        assert looks["normal", policy] == looks["skip", policy]
    for part in (0, 1):
        assert len({look[part] for look in looks.values()}) == 4
    styles = {name: {line.line.dash for key, line in lines.items() if key[0] == name} for name in models}
    assert styles == {"normal": {"solid"}, "skip": {"dash"}}
    assert {line.legendgrouptitle.text for line in figure.data} == {"normal", "skip"}


def test_models_under_one_policy_have_a_colour_each() -> None:
    figure = depth_figure({"one": evaluation("random"), "two": evaluation("random")})
    assert [line.name for line in figure.data] == ["one", "two"]
    assert len({line.line.color for line in figure.data}) == 2
    assert len({line.line.dash for line in figure.data}) == 2


def test_throughput_is_averaged_over_equal_parts_of_the_time() -> None:
    stretches = (Stretch(0.0, 3.0, 1.0), Stretch(3.0, 7.0, 0.0), Stretch(7.0, 10.0, 0.5))
    assert averaged(stretches, 10.0, 5) == pytest.approx([1.0, 0.5, 0.0, 0.25, 0.5])
    assert averaged(stretches, 10.0, 1) == pytest.approx([0.45])
