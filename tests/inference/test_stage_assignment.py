"""Who holds what, from the plan, the nodes that are there and what ranks claim to be."""

from collections.abc import Sequence

import pytest
from serving_ranks import make_run

from skippipe.errors import InputError
from skippipe.inference.distributed.stage_assignment import StageAssignment, assign_stages
from skippipe.inference.inference_run import InferenceRun, read_inference_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> InferenceRun:
    """A run of nodes that hold stages 1, 2, 0 and 1."""
    return read_inference_run(make_run(tmp_path_factory.mktemp("assignment")))


def unnamed(count: int) -> list[str | None]:
    return [None] * count


def test_as_many_ranks_as_nodes_are_these_nodes(run: InferenceRun) -> None:
    assignment = assign_stages(run, unnamed(4), ())
    assert assignment.names == ("node-0", "node-1", "node-2", "node-3")
    assert assignment.stages_of == ((1,), (2,), (0,), (1,))
    assert assignment.driver() == 2


def test_absent_nodes_are_not_started_or_stand_by(run: InferenceRun) -> None:
    fewer, all_there = assign_stages(run, unnamed(2), ["node-1", "node-3"]), assign_stages(run, unnamed(4), ["node-1"])
    assert (fewer.names, fewer.stages_of) == (("node-0", "node-2"), ((1,), (0,)))
    assert fewer.holders() == {0: 1, 1: 0}
    assert all_there.stages_of == ((1,), (), (0,), (1,))
    assert set(all_there.holders()) == {0, 1}


@pytest.mark.parametrize(
    ("world_size", "absent", "stages"),
    [
        (2, (), ((0,), (1, 2))),
        (1, (), ((0, 1, 2),)),
        (5, (), ((0,), (1,), (2,), (0,), (1,))),
        (2, ("node-1",), ((0,), (1,))),
    ],
)
def test_other_numbers_of_ranks_share_the_stages(
    run: InferenceRun, world_size: int, absent: tuple[str, ...], stages: tuple[tuple[int, ...], ...]
) -> None:
    assert assign_stages(run, unnamed(world_size), absent).stages_of == stages


def test_ranks_may_say_who_they_are_and_others_are_absent(run: InferenceRun) -> None:
    assignment = assign_stages(run, ["node-2", "node-3"], ())
    assert (assignment.stages_of, assignment.driver(), assignment.holders()) == (((0,), (1,)), 0, {0: 0, 1: 1})


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        (["node-2", "node-9"], "SKIPPIPE_NODE of rank 1: the plan has no node 'node-9'"),
        (["node-2", None], "SKIPPIPE_NODE of rank 1: the plan has no node ''"),
        (["node-2", "node-0", "node-2"], "ranks 0 and 2 are both 'node-2'"),
        (["node-0", "node-1"], "stage 0 holds embedding and head"),
    ],
)
def test_claims_that_cannot_be_are_refused(run: InferenceRun, claims: Sequence[str | None], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        assign_stages(run, claims, ())


def test_names_need_the_stages_of_the_plan(run: InferenceRun) -> None:
    with pytest.raises(InputError, match="leave --stages out, or unset it"):
        assign_stages(read_inference_run(run.folder, 6), ["node-2", "node-0"], ())


def test_replicas_are_those_with_the_shortest_way_through_all() -> None:
    """The way over b and d is the shortest, though c is nearest to a."""
    transfer_s = {
        "a": {"b": 2.0, "c": 1.0, "d": 5.0, "e": 6.0},
        "b": {"a": 3.0, "d": 1.0, "e": 9.0},
        "c": {"a": 1.0, "d": 9.0, "e": 8.0},
        "d": {"a": 1.0},
        "e": {"a": 1.0},
    }
    assignment = StageAssignment(("a", "b", "c", "d", "e"), ((0,), (1,), (1,), (2,), (2,)), transfer_s)
    assert assignment.holders() == {0: 0, 1: 1, 2: 3}
    assert assignment.holders(lost=[1]) == {0: 0, 1: 2, 2: 4}
    assert assignment.holders(lost=[3, 4]) == {0: 0, 1: 2}
    assert assignment.holders(lost=[1, 2]) == {0: 0, 2: 3}
