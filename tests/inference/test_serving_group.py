"""What the processes that serve make of others that fail, go, or answer what nobody waits for any more."""

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import pytest
import torch
from test_frame_links import KEYS, LIMIT_S, next_frame
from tiny_decoders import decoder_of, tiny

from skippipe.errors import CheckpointError, NodeLostError, PeerLostError, SkipPipeError
from skippipe.inference.distributed.frame_links import FrameLinks
from skippipe.inference.distributed.serving_group import ServingGroup
from skippipe.inference.distributed.stage_assignment import StageAssignment
from skippipe.inference.distributed.worker import Worker
from skippipe.inference.distributed.worker_pool import WorkerPool
from skippipe.inference.task_progress import KnownSteps, TaskProgress
from skippipe.membership.membership import Membership

HIDDEN = torch.ones(1, 2, 3)


class Group:
    """Three processes in one, each with a thread of its own where it waits for others."""

    def __init__(self, assignment: StageAssignment) -> None:
        self.ended = threading.Event()
        self.links = [FrameLinks(KEYS, 5.0) for _ in assignment.names]
        secret = secrets.token_hex(32)
        self.memberships = [
            Membership.open(name, "127.0.0.1", secret, 5.0, data_port=links.port)
            for name, links in zip(assignment.names, self.links, strict=True)
        ]
        self.threads = ThreadPoolExecutor(8)
        members = [membership.own for membership in self.memberships]
        list(self.threads.map(lambda membership: membership.begin(members, LIMIT_S), self.memberships))
        self.of = [
            ServingGroup(membership, links, assignment, rank)
            for rank, (membership, links) in enumerate(zip(self.memberships, self.links, strict=True))
        ]

    def follow(self, *ranks: int) -> None:
        """Let these go into each next epoch when it comes."""

        def go_along(group: ServingGroup) -> None:
            with suppress(SkipPipeError):
                while group.end_code is None and not self.ended.is_set():
                    group.links.receive(0.02)
                    if group.epoch_ends:
                        group.next_epoch()

        for rank in ranks:
            self.threads.submit(go_along, self.of[rank])

    def die(self, rank: int) -> None:
        """Close all that a process has."""
        self.memberships[rank].close()

    def close(self) -> None:
        """End all."""
        self.ended.set()
        for membership in self.memberships:
            membership.close()
        self.threads.shutdown()
        for links in self.links:
            links.close()


@contextmanager
def group_of(*stages_of: tuple[int, ...]) -> Iterator[Group]:
    """Give processes a, b, ... that hold these stages."""
    names = tuple("abcdef"[: len(stages_of)])
    with closing(Group(StageAssignment(names, stages_of))) as group:
        yield group


def test_all_learn_with_which_code_they_end() -> None:
    with group_of((0,), (1,), (1,)) as group:
        group.follow(1, 2)
        group.of[0].end(3)
        group.threads.shutdown()
        assert [each.end_code for each in group.of] == [3, 3, 3]
        group.of[0].end(1)  # they end already
        assert group.of[0].end_code == 3


def test_a_failure_elsewhere_ends_all_when_all_are_here() -> None:
    with group_of((0,), (1,), (1,)) as group:
        group.threads.submit(group.of[1].fail, CheckpointError("its disk is damaged"))
        group.follow(2)
        with pytest.raises(CheckpointError, match="b: its disk is damaged") as failure:
            group.of[0].next_epoch()
        assert failure.value.exit_code == 2
        group.threads.shutdown()
        assert [each.end_code for each in group.of] == [2, 2, 2]


def test_one_that_stood_by_is_not_missed_and_one_that_served_is() -> None:
    """The answer of the one that serves arrives though another one is lost meanwhile."""
    with group_of((0,), (1,), (1,)) as group:
        group.follow(1)
        workers = WorkerPool(group.of[0])
        answer = group.threads.submit(workers.run, [(1, (2, 3))], {"cache": None}, {"hidden": HIDDEN})
        group.die(2)
        while 2 not in group.of[1].lost:
            assert not answer.done()
        group.links[2].send(group.of[0].member(0), {"pass": 1}, {"hidden": HIDDEN + 1})
        assert torch.equal(answer.result(LIMIT_S), HIDDEN + 1)
        assert (group.of[0].holders, group.of[0].changes) == ({0: 0, 1: 1}, 0)
        group.die(1)
        with pytest.raises(
            NodeLostError, match=r"b was lost \(connection closed\) and stage 1 with it; start again"
        ) as loss:
            workers.run([(1, (2, 3))], {"cache": None}, {"hidden": HIDDEN})
        assert str(loss.value).endswith("; start again with --absent b --absent c")
        assert (group.of[0].holders, group.of[0].changes) == ({0: 0}, 1)


def test_without_the_only_process_with_stage_0_nothing_goes_on() -> None:
    with group_of((0,), (1,), (2,)) as group:
        group.die(0)
        group.follow(2)
        with pytest.raises(PeerLostError, match=r"a was lost \(connection closed\) and stage 0 with it, without which"):
            group.of[1].next_epoch()


def test_an_answer_to_an_older_pass_is_not_taken() -> None:
    with group_of((0,), (1,)) as group:

        def serve() -> None:
            frame, driver = next_frame(group.links[1]), group.of[1].member(0)
            number = frame.header["pass"]
            group.links[1].send(driver, {"pass": number - 1}, {"hidden": HIDDEN})
            group.links[1].send(driver, {"pass": number}, {"hidden": frame.tensors["hidden"] + 1})

        server = threading.Thread(target=serve)
        server.start()
        answer = WorkerPool(group.of[0]).run([(1, (2, 3))], {"cache": None}, {"hidden": HIDDEN})
        server.join()
        assert torch.equal(answer, HIDDEN + 1)


def test_a_worker_runs_what_comes_twice_once() -> None:
    with group_of((0,), (1,)) as group:
        decoder = decoder_of(tiny("llama"))
        worker = Worker(group.of[1], decoder, torch.device("cpu"))
        serving = group.threads.submit(worker.serve)
        hidden = torch.randn(1, 2, decoder.config.hidden_size)
        order = {"pass": 1, "hop": 0, "hops": [[1, [0]]], "cache": None, "live": [], "position_ids": [[0, 1]]}
        for number in (1, 1, 2):
            group.links[0].send(group.of[0].member(1), order | {"pass": number}, {"hidden": hidden})
        frames = [next_frame(group.links[0]) for _ in range(2)]
        assert [frame.header for frame in frames] == [{"pass": 1}, {"pass": 2}]
        assert torch.equal(frames[0].tensors["hidden"], decoder.run_layers(hidden, (0,)))
        group.of[0].end(0)
        serving.result(LIMIT_S)
        assert group.of[1].end_code == 0
        assert group.links[0].receive(0.0) is None


def test_the_next_one_with_stage_0_goes_on_from_what_it_knows() -> None:
    with group_of((0,), (1,), (0,), (0,)) as group:
        decoder = decoder_of(tiny("llama"))
        workers = [Worker(group.of[rank], decoder, torch.device("cpu")) for rank in (2, 3)]
        group.follow(1)
        serving = [group.threads.submit(worker.serve) for worker in workers]
        generator = torch.Generator().manual_seed(5)
        progress = TaskProgress(tell=group.of[0].tell_step)
        told = [progress.step(lambda: torch.rand(1, generator=generator).item(), generator) for _ in range(3)]
        following = torch.rand(1, generator=generator).item()
        while any(worker.known.values != told for worker in workers):
            assert not serving[0].done()
        group.die(0)
        serving[0].result(LIMIT_S)
        drives = [each.drives for each in group.of[1:]]
        assert (drives, group.of[2].holders) == ([False, True, False], {0: 2, 1: 1})
        later = TaskProgress(workers[0].known, group.of[2].tell_step)
        again = torch.Generator()
        found = [later.step(lambda: torch.rand(1, generator=again).item(), again) for _ in range(4)]
        assert found == [*told, following]
        while workers[1].known.values != found:
            assert not serving[1].done()
        # One that was silent and comes back is not heard.
        group.links[0].send(group.of[2].member(3), {"driver": 0, "step": 0, "value": None})
        group.of[2].end(0)
        serving[1].result(LIMIT_S)
        assert workers[1].known.values == found


def test_a_step_of_which_one_before_did_not_arrive_is_done_again() -> None:
    known = KnownSteps()
    for number in (0, 1, 3):
        known.add(number, number, None)
    assert known.values == [0, 1]
    known.add(1, "another", None)
    assert known.values == [0, "another"]
