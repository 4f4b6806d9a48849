"""What the process that drives makes of others that are late, fail or answer what nobody waits for any more."""

import threading
from collections.abc import Iterator

import pytest
import torch

from skippipe.errors import CheckpointError, NodeLostError
from skippipe.inference.distributed.connections import Connections
from skippipe.inference.distributed.stage_assignment import StageAssignment
from skippipe.inference.distributed.worker_pool import WorkerPool
from skippipe.runtime.ranks.remote_errors import error_content

ASSIGNMENT = StageAssignment(("a", "b", "c"), ((0,), (1,), (1,)))


@pytest.fixture
def links() -> Iterator[tuple[Connections, ...]]:
    """Connections of the driver and two others, which are all in this process."""
    made = tuple(Connections(rank, "127.0.0.1", 5.0) for rank in range(3))
    doors = [links_of_rank.listen() for links_of_rank in made]
    for links_of_rank in made:
        links_of_rank.know(doors)
    yield made
    for links_of_rank in made:
        links_of_rank.close()


def test_who_does_not_come_is_lost(links: tuple[Connections, ...]) -> None:
    workers = WorkerPool(links[0], ASSIGNMENT, limit_s=0.2)
    links[2].send(0, {"here": True})
    workers.assemble()
    assert (workers.holders, workers.changes) == ({0: 0, 1: 2}, 1)
    assert str(workers.loss()).startswith("b was lost (did not come within 0.2 s); a replica takes its place")
    links[2].close()
    workers.wait_until_ready()
    assert workers.holders == {0: 0}
    assert str(workers.loss()).endswith("stage 1 with it; start again with --absent b --absent c")


def test_a_failure_elsewhere_ends_all_when_all_are_here(links: tuple[Connections, ...]) -> None:
    workers = WorkerPool(links[0], ASSIGNMENT, limit_s=5.0)
    links[1].send(0, {"here": True})
    links[1].send(0, {"failed": error_content(CheckpointError("its disk is damaged"))})
    links[2].send(0, {"here": True})

    def start() -> None:
        workers.assemble()  # may see all before it hears of the failure
        workers.wait_until_ready()

    with pytest.raises(CheckpointError, match="b: its disk is damaged") as failure:
        start()
    assert failure.value.exit_code == 2
    workers.end(2)
    for other in links[1:]:
        assert other.receive(5.0) == (0, ({"end": 2}, {}))


def test_an_answer_to_an_older_pass_is_not_taken(links: tuple[Connections, ...]) -> None:
    workers = WorkerPool(links[0], ASSIGNMENT, limit_s=5.0)
    hidden = torch.ones(1, 2, 3)

    def serve() -> None:
        received = links[1].receive(5.0)
        assert received is not None
        assert received[1] is not None
        number = received[1].header["pass"]
        links[1].send(0, {"pass": number - 1}, {"hidden": hidden})
        links[1].send(0, {"pass": number}, {"hidden": received[1].tensors["hidden"] + 1})

    server = threading.Thread(target=serve)
    server.start()
    answer = workers.run([(1, (2, 3))], {"cache": None}, {"hidden": hidden})
    server.join()
    assert torch.equal(answer, hidden + 1)


def test_one_that_another_cannot_reach_is_given_up(links: tuple[Connections, ...]) -> None:
    workers = WorkerPool(links[0], StageAssignment(("a", "b", "c"), ((0,), (1,), (2,))), limit_s=5.0)
    links[1].send(0, {"here": True})
    links[2].send(0, {"here": True})
    workers.assemble()
    links[1].send(0, {"pass": 1, "done": 0, "unreachable": 2})
    with pytest.raises(NodeLostError, match=r"c was lost \(cannot be reached from b\) and stage 2 with it"):
        workers.run([(1, (2,)), (2, (3,))], {"cache": None}, {"hidden": torch.ones(1, 1, 1)})
    assert links[2].receive(5.0) == (0, None)
