"""From cluster and workload to a problem with costs in seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from skippipe_scheduler.errors import InfeasibleError, ProblemError
from skippipe_scheduler.files import parse
from skippipe_scheduler.problem.build import build_problem, doubts_about_times
from skippipe_scheduler.problem.cluster import Cluster, Device, MeasuredFor, load_cluster
from skippipe_scheduler.problem.problem import Problem, load_problem, write_problem
from skippipe_scheduler.problem.rules import skip_rules
from skippipe_scheduler.problem.stage_layout import StageLayout
from skippipe_scheduler.problem.workload import LighterWorkload, LighterWorkloads, Workload

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
GIB = 2**30
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
OF_PROBLEM = ("lighter", "num_microbatches", "free_origins", "reduction", "task_overhead_s")

WORKLOAD = Workload(
    num_layers=8,
    layer_forward_flop=1e12,
    loss_flop=3e12,
    activation_bytes=1_000_000,
    layer_gradient_bytes=100,
    embedding_and_head_gradient_bytes=50,
    layer_state_bytes=GIB // 4,
    embedding_and_head_state_bytes=GIB // 2,
    layer_resident_bytes=GIB // 8,
    embedding_and_head_resident_bytes=GIB // 4,
)


def make_cluster(memory_gib: float = 8.0) -> Cluster:
    nodes = [{"name": f"n{index}", "region": "r", "compute_tflop_per_s": 2.0} for index in range(5)]
    nodes = [node | {"memory_gib": memory_gib} for node in nodes]
    measured = {"forward_s": 0.3, "backward_s": 0.5, "loss_s": 0.1, "max_in_flight": 2}
    content: dict[str, Any] = {
        "name": "test",
        "device": "cpu",
        "nodes": [*nodes, {"name": "slow", "region": "far", **measured}],
        "links": {
            "contention": "link",
            "within_region": {"latency_ms": 1, "gbit_per_s": 8},
            "between_regions": [
                {"regions": ["r", "far"], "latency_ms": 50, "gbit_per_s": 0.08},
                {"from": "far", "to": "r", "latency_ms": 40, "gbit_per_s": 0.8},
            ],
        },
    }
    return parse(Cluster, content, "test", ProblemError)


def build(cluster: Cluster | None = None, workload: Workload = WORKLOAD, **options: Any) -> Problem:
    """Build a problem of 4 stages from keywords of its rules, its layout and itself, whichever they are."""
    rules: dict[str, Any] = {"num_stages": 4, "skip_ratio": 0.25}
    layout: dict[str, Any] = {}
    others: dict[str, Any] = {"num_microbatches": 12}
    for name, value in options.items():
        fields = layout if name in StageLayout.__dataclass_fields__ else others if name in OF_PROBLEM else rules
        fields[name] = value
    built_from = (cluster or make_cluster()).model_copy(update={"task_overhead_s": others.pop("task_overhead_s", 0.0)})
    return build_problem(built_from, workload, skip_rules(**rules), layout=StageLayout(**layout), **others)


def test_costs_in_seconds() -> None:
    costs = build(task_overhead_s=0.01).costs
    # A mean stage has 2 layers of 1 TFLOP; the node does 2 TFLOP/s.
    assert (costs.forward_s["n0"], costs.backward_s["n0"], costs.loss_s["n0"]) == (1.0, 2.0, 1.5)
    assert (costs.forward_s["slow"], costs.backward_s["slow"], costs.loss_s["slow"]) == (0.3, 0.5, 0.1)
    assert costs.task_overhead_s == 0.01
    # 1 MB is 8 Mbit: 1 ms at 8 Gbit/s, 100 ms at 0.08, 10 ms at 0.8.
    assert costs.transfer_s["n0"]["n1"] == pytest.approx(0.002)
    assert costs.transfer_s["n0"]["slow"] == pytest.approx(0.150)
    assert costs.transfer_s["slow"]["n0"] == pytest.approx(0.050)
    assert costs.contention == "link"
    assert costs.occupancy_s("n0", "slow") == pytest.approx(0.1)


def measured_for(**facts: Any) -> Cluster:
    return make_cluster().model_copy(update={"measured_for": MeasuredFor(**facts)})


@pytest.mark.parametrize(
    ("facts", "times"),
    [  # a mean stage has forwards of 2 TFLOP, backwards of 4, and losses of 3
        ({"forward_tflop": 2.0}, (0.3, 0.5, 0.1)),
        ({"forward_tflop": 1.99, "backward_tflop": 4.02, "loss_tflop": 3.0}, (0.3, 0.5, 0.1)),
        ({"forward_tflop": 0.5}, (1.2, 2.0, 0.4)),
        ({"forward_tflop": 4.0, "backward_tflop": 4.0, "loss_tflop": 30.0}, (0.15, 0.5, 0.01)),
    ],
)
def test_measured_times_follow_the_flop(facts: dict[str, float], times: tuple[float, ...]) -> None:
    costs = build(measured_for(**facts)).costs
    found = costs.forward_s["slow"], costs.backward_s["slow"], costs.loss_s["slow"]
    same = times == (0.3, 0.5, 0.1)
    assert found == (times if same else pytest.approx(times))
    assert (costs.forward_s["n0"], costs.backward_s["n0"], costs.loss_s["n0"]) == (1.0, 2.0, 1.5), "a rate stays one"


def test_times_of_another_workload_are_told() -> None:
    def doubts(cluster: Cluster) -> list[str]:
        return doubts_about_times(cluster, WORKLOAD, 4, "bfloat16")

    (silent,) = doubts(make_cluster())
    line = "measured_for: {dtype: bfloat16, forward_tflop: 2, backward_tflop: 4, loss_tflop: 3}"
    assert silent.startswith("nothing says what the times were measured for; they are taken as they are.")
    assert f"add the line {line}; else measure with skippipe profile" in silent
    told = MeasuredFor(**yaml.safe_load(line)["measured_for"])
    assert doubts(make_cluster().model_copy(update={"measured_for": told})) == []
    (other,) = doubts(measured_for(forward_tflop=0.5, about="a small one"))
    assert other == (
        "the times were measured for other tasks (a small one); they are multiplied by 4 (forward: 2 TFLOP in place "
        "of 0.5), 4 (backward: 4 TFLOP in place of 1), 4 (loss: 3 TFLOP in place of 0.75); max_in_flight is kept, give "
        "memory_gib to have it follow the model. Measure with skippipe profile"
    )
    (second_loss,) = doubts(measured_for(forward_tflop=2.0, loss_tflop=1.5))
    assert "they are multiplied by 2 (loss: 3 TFLOP in place of 1.5); max_in_flight" in second_loss
    (slower,) = doubts(measured_for(forward_tflop=2.0, dtype="float32"))
    assert slower.startswith("the times were measured in float32, the experiment computes in bfloat16")
    rates = make_cluster().model_copy(update={"nodes": make_cluster().nodes[:5]})
    assert doubts(rates) == []


def test_free_placement() -> None:
    problem = build()
    assert problem.stages is None
    assert problem.stage_sizes == (2, 2, 1, 1)
    assert problem.stage_layers == (2, 2, 2, 2)
    assert problem.stage_bytes == (250, 200, 200, 200)
    assert problem.num_microbatches == 12
    assert (problem.rules.num_stages, problem.rules.route_length) == (4, 3)
    assert problem.regions == ("r", "r", "r", "r", "r", "far")
    # Gradients of a stage on n0 and n1: 2 steps of latency and half of the bytes.
    slowest = problem.reduce_s((("n0", "n1"), ("n2", "n3"), ("n4",), ("slow",)))
    assert slowest[0] == pytest.approx(2 * (0.001 + 125 * 8e-9 / 8))
    assert slowest[3] == 0


def test_options_reach_the_problem() -> None:
    problem = build(
        stage_sizes=(3, 1, 1, 1),
        layers_per_stage=(1, 3, 2, 2),
        max_swaps=2,
        max_swap_distance=3,
        max_forward_jump=2,
        uniform_coverage=False,
    )
    assert problem.stage_sizes == (3, 1, 1, 1)
    assert problem.stage_layers == (1, 3, 2, 2)
    rules = problem.rules
    assert (rules.max_swaps, rules.max_swap_distance, rules.max_forward_jump) == (2, 3, 2)
    assert not rules.uniform_coverage


def test_memory_is_that_of_the_stage_which_leaves_least_room() -> None:
    problem = build(make_cluster(memory_gib=4.0))
    # Stage 0: (4 - 2/4 - 1/2) / (2/8 + 1/4) = 6; the others: (4 - 2/4) / (2/8) = 14.
    assert problem.costs.memory["n0"] == 6
    assert problem.costs.memory["slow"] == 2


def test_memory_with_the_placement_known_and_never_more_than_all_microbatches() -> None:
    placement = [["n0", "n1"], ["n2", "n3"], ["n4"], ["slow"]]
    memory = build(make_cluster(memory_gib=4.0), placement=placement, num_microbatches=13).costs.memory
    assert memory == {"n0": 6, "n1": 6, "n2": 13, "n3": 13, "n4": 13, "slow": 2}


def test_a_node_that_cannot_hold_one_microbatch() -> None:
    with pytest.raises(InfeasibleError) as caught:
        build(make_cluster(memory_gib=0.5))
    assert str(caught.value) == (
        "node 'n0' has 0.5 GiB, but stage 0 needs 1.5 GiB: weights, gradients and optimizer state of 2 layers, "
        "embedding and head take 1 GiB, one microbatch 0.5 GiB; raise its memory_gib to 1.5"
    )
    assert build(make_cluster(memory_gib=1.5)).costs.memory["n0"] == 1


def test_state_that_replicas_share_out_leaves_room() -> None:
    placement = [["n0"], ["n1", "n2", "n3"], ["n4"], ["slow"]]
    whole = replace(WORKLOAD, layer_state_bytes=GIB)
    shared = replace(WORKLOAD, layer_state_bytes=GIB // 2, layer_shared_bytes=GIB // 2)
    # Two layers a stage: 2 GiB of state, of which three replicas share out 1, and 1/4 GiB for each microbatch.
    assert build(make_cluster(4.0), whole, placement=placement).costs.memory["n1"] == 8
    found = build(make_cluster(4.0), shared, placement=placement).costs.memory
    assert found["n1"] == 10
    assert found["n4"] == 8


@pytest.mark.parametrize(
    ("parts", "held"),
    [
        ({}, 6),  # 1 GiB of state, and half a GiB for each microbatch
        ({"working_bytes": GIB}, 4),
        ({"embedding_and_head_working_bytes": GIB}, 4),
        ({"message_bytes": GIB}, 4),
        ({"stage_resident_bytes": GIB // 4}, 4),
        ({"layer_copy_bytes": GIB // 2}, 4),
        ({"embedding_and_head_update_bytes": GIB}, 5),  # only what it needs more than one microbatch
        ({"embedding_and_head_update_bytes": GIB, "working_bytes": GIB}, 4),
    ],
)
def test_what_is_there_once_takes_room_once(parts: dict[str, int], held: int) -> None:
    workload = replace(WORKLOAD, **parts)
    assert build(make_cluster(memory_gib=4.0), workload, num_microbatches=13).costs.memory["n0"] == held


def test_what_a_task_works_with_is_named() -> None:
    parts = {"working_bytes": GIB // 2, "message_bytes": GIB // 4, "embedding_and_head_copy_bytes": GIB // 4}
    with pytest.raises(InfeasibleError, match="checkpoint copy, messages and the work of a task 1 GiB"):
        build(make_cluster(memory_gib=1.5), replace(WORKLOAD, **parts))
    with pytest.raises(InfeasibleError, match="take 1 GiB, the work of a task 1 GiB"):
        build(make_cluster(memory_gib=1.5), replace(WORKLOAD, working_bytes=GIB))


IN_HOST_MEMORY = {"message_bytes": GIB // 2, "layer_copy_bytes": GIB // 2, "embedding_and_head_copy_bytes": GIB // 2}
PLACEMENT = [["n0", "n1"], ["n2", "n3"], ["n4"], ["slow"]]


@pytest.mark.parametrize(
    ("of_cluster", "of_node", "held"), [("cpu", None, 2), ("cpu", "cuda", 6), ("cuda", "cpu", 2), (None, None, 6)]
)
def test_host_memory_counts_where_the_node_has_no_gpu(of_cluster: str | None, of_node: str | None, held: int) -> None:
    cluster = make_cluster(memory_gib=4.0)
    first = cluster.nodes[0].model_copy(update={"device": of_node})
    cluster = cluster.model_copy(update={"device": of_cluster, "nodes": (first, *cluster.nodes[1:])})
    memory = build(cluster, replace(WORKLOAD, **IN_HOST_MEMORY), placement=PLACEMENT).costs.memory
    # Half a GiB for each microbatch beside 1 GiB of state, and on a CPU beside 2 GiB of copy and messages.
    assert memory["n0"] == held
    assert cluster.on_device("cpu").devices() == dict.fromkeys(memory, "cpu")


def test_offloaded_state_counts_on_a_cpu_alone() -> None:
    workload = replace(
        WORKLOAD,
        layer_shared_bytes=GIB // 4,
        layer_offloaded_bytes=GIB // 4,
        embedding_and_head_offloaded_bytes=GIB // 2,
    )
    held = [
        build(make_cluster(8.0).on_device(device), workload, placement=PLACEMENT, num_microbatches=20)
        for device in DEVICES
    ]
    # Half a GiB for each microbatch beside 1.25 GiB of state, of which 0.25 are half of what two replicas share out.
    assert [problem.costs.memory["n0"] for problem in held] == [13, 15]


def test_an_assumed_device_is_told() -> None:
    workload = replace(WORKLOAD, **IN_HOST_MEMORY)
    cluster = make_cluster(memory_gib=0.5)
    with pytest.raises(InfeasibleError, match=r"^node 'n0' \(device cpu\) has 0\.5 GiB"):
        build(cluster, workload)
    with pytest.raises(
        InfeasibleError, match=r"^node 'n0' \(device cuda, assumed as the cluster file gives none\) has"
    ):
        build(cluster.model_copy(update={"device": None}), workload)


def test_only_remedies_that_can_still_be_had_are_named() -> None:
    """One layer a stage on equal nodes: no fewer layers, no more stages, and no other node has more room."""
    nodes = tuple(node.model_copy(update={"count": 8, "memory_gib": 0.9}) for node in make_cluster().nodes[:1])
    cluster = make_cluster().model_copy(update={"nodes": nodes})
    smaller = LighterWorkload("set less to 1", lambda: replace(WORKLOAD, embedding_and_head_resident_bytes=0))
    useless = LighterWorkload("set nothing to 1", lambda: WORKLOAD)
    for groups, last_resort, advice in [
        ([[useless]], [], ""),
        ([[useless, smaller], [smaller], []], [], ", or set less to 1, or set less to 1"),
        ([[useless]], [smaller], ", or set less to 1"),
        ([[smaller]], [useless], ", or set less to 1"),
    ]:
        with pytest.raises(InfeasibleError) as caught:
            build(cluster, num_stages=8, lighter=LighterWorkloads(groups, last_resort))
        assert str(caught.value).split("; ")[1] == "raise its memory_gib to 1.13" + advice


def test_every_remedy_for_a_small_node_works() -> None:
    with pytest.raises(InfeasibleError) as caught:
        build(make_cluster(memory_gib=1.25))
    assert str(caught.value).endswith(
        "; raise its memory_gib to 1.5, or give stage 0 at most 1 layer (more stages, or layers_per_stage), "
        "or use a smaller micro-batch, or checkpoint activations, or fix the placement so that other nodes hold stage 0"
    )
    assert build(make_cluster(memory_gib=1.25), layers_per_stage=(1, 3, 2, 2)).costs.memory["n0"] == 1
    smaller = replace(WORKLOAD, layer_resident_bytes=GIB // 16, embedding_and_head_resident_bytes=GIB // 8)
    assert build(make_cluster(memory_gib=1.25), smaller).costs.memory["n0"] == 1


def test_a_small_node_at_a_given_stage() -> None:
    placement = [["n0"], ["slow"], ["n1", "n2"], ["n3", "n4"]]
    with pytest.raises(InfeasibleError, match=r"'n0' .* stage 0 needs 1.5 GiB: .* so that other nodes hold stage 0$"):
        build(make_cluster(memory_gib=1.25), placement=placement)
    with pytest.raises(InfeasibleError, match=r"'n1' .* stage 2 needs 0.75 GiB: .* of 2 layers take 0.5 GiB") as caught:
        build(
            make_cluster(memory_gib=0.7),
            placement=[["slow"], ["n0"], ["n1", "n2"], ["n3", "n4"]],
            layers_per_stage=(3, 1, 2, 2),
        )
    assert "hold stages 0, 2, 3" in str(caught.value)


def test_a_node_too_small_for_stage_0_may_hold_another() -> None:
    cluster = make_cluster(memory_gib=1.25)
    with pytest.raises(InfeasibleError, match="embedding and head"):
        build(cluster)
    roomy_origin = [["slow"], ["n0", "n1"], ["n2", "n3"], ["n4"]]
    assert build(cluster, placement=roomy_origin).costs.memory["n0"] == 3


def test_small_sizes_are_told_in_mib() -> None:
    workload = replace(WORKLOAD, embedding_and_head_resident_bytes=0, layer_resident_bytes=2**20)
    with pytest.raises(InfeasibleError, match="one microbatch 2 MiB"):
        build(make_cluster(memory_gib=1.001), workload)


@pytest.mark.parametrize(
    "placement",
    [
        [["n0", "n1"], ["n2", "n3"], ["n4"], ["slow"]],
        {3: ["slow"], 0: ["n0", "n1"], 1: ["n2", "n3"], 2: ["n4"]},
        (("n0", "n1"), ("n2", "n3"), ("n4",), ("slow",)),
    ],
)
def test_given_placement(placement: Any) -> None:
    problem = build(placement=placement, stage_sizes=(2, 2, 1, 1))
    assert problem.stages is not None
    assert [stage.nodes for stage in problem.stages] == [("n0", "n1"), ("n2", "n3"), ("n4",), ("slow",)]
    assert problem.stage_sizes is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": [["n0"], ["n1"]]}, "placement has 2 stages, num_stages is 4"),
        ({"placement": {1: ["n0"]}}, r"placement has stages \[1\], expected 0 to 3"),
        ({"placement": [["n0"], [], ["n1"], ["n2"]]}, "stage 1 has no node"),
        ({"placement": [["n0"], ["n1"], ["n2"], ["slwo"]]}, "unknown node 'slwo'; did you mean 'slow'"),
        ({"placement": [["n0"], ["n1"], ["n0"], ["n2"]]}, "'n0' is in stage 0 and again in stage 2"),
        ({"placement": [["n0"], ["n1"], ["n2"], ["n3"]]}, "node 'n4' of the cluster has no stage"),
        (
            {"placement": [["n0", "n1"], ["n2", "n3"], ["n4"], ["slow"]], "stage_sizes": (3, 1, 1, 1)},
            "contradict the placement",
        ),
        ({"stage_sizes": (3, 3, 1, 1)}, "stage_sizes add up to 8 but there are 6 nodes"),
        ({"stage_sizes": (3, 3)}, "stage_sizes has 2 entries for 4 stages"),
        ({"stage_sizes": ()}, "stage_sizes has 0 entries for 4 stages"),
        ({"num_microbatches": 0}, "greater than or equal to 1"),
        ({"max_swaps": -1}, "Rules: max_swaps: .*greater than or equal to 0"),
        ({"task_overhead_s": -1.0}, "Costs: task_overhead_s"),
        ({"layers_per_stage": (8, 0, 0, 0)}, "stage 1 has 0 layers"),
        ({"skip_ratio": 0.9}, "the largest ratio that works"),
        ({"num_stages": 9}, "9 stages need at least 9 layers"),
    ],
)
def test_input_that_does_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        build(**options)


def test_more_stages_than_nodes() -> None:
    with pytest.raises(InfeasibleError, match="8 stages need at least 8 nodes, the cluster has 6"):
        build(num_stages=8)


def test_a_written_problem_is_read_back(tmp_path: Path) -> None:
    problem = build()
    write_problem(problem, tmp_path / "problem.json")
    assert load_problem(tmp_path / "problem.json") == problem


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_clusters_pose_a_problem(path: Path, tmp_path: Path) -> None:
    cluster = load_cluster(path)
    problem = build(cluster)
    assert problem.costs.missing(problem.nodes) is None
    assert sum(problem.sizes) == len(cluster.members())
    assert all(held >= 1 for held in problem.costs.memory.values())
