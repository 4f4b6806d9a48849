"""What is kept of changes of membership, over several starts of a run and on several disks."""

from pathlib import Path

from random_plans import random_plan

from skippipe.monitor.run_events import MembershipChange, read_changes
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.records.collecting import _merged_lines
from skippipe.training.recovery.membership_record import KnownEpochs, record
from skippipe_scheduler.plan.validate import load_plan

NODES = {f"node-{number}": f"incarnation {number}" for number in range(4)}


def loss(epoch: int, node: str, time: str = "2025-01-01T00:00:00Z") -> MembershipChange:
    """Return the change by which a node is lost."""
    return MembershipChange(
        time=time,
        epoch=epoch,
        lost={node: "connection closed"},
        joined=(),
        members=tuple(name for name in NODES if name != node),
        absent_stages=(),
        restored=(),
        reason=f"{node} lost",
        step=6,
        interrupted=True,
        durations_s={},
        total_s=1.5,
    )


def plans(seed: int) -> PlanSet:
    """Return a set of one plan."""
    return PlanSet(random_plan(seed, num_nodes=4, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=2))


def test_plans_of_all_starts_are_kept_under_the_numbers_of_their_events(tmp_path: Path) -> None:
    recorded = [(1, plans(1)), (3, plans(2)), (1, plans(3)), (2, plans(4))]  # of two starts; one epoch has not lasted
    for epoch, begun in recorded:
        record(loss(epoch, "node-1"), begun, tmp_path)
    changes = read_changes(tmp_path)
    assert [change.epoch for change in changes] == [1, 3, 4, 5]
    kept = [load_plan(tmp_path / "epochs" / f"epoch-{change.epoch:04d}.plan.json") for change in changes]
    assert [plan.hash for plan in kept] == [begun.main.hash for _, begun in recorded]


def test_a_change_is_counted_from_the_last_recorded_epoch_of_this_start(tmp_path: Path) -> None:
    record(loss(1, "node-1"), plans(1), tmp_path)  # an earlier start
    known = KnownEpochs(tmp_path)
    known.add(0, NODES)
    record(loss(1, "node-2"), plans(2), tmp_path)
    after_loss = {name: incarnation for name, incarnation in NODES.items() if name != "node-2"}
    known.add(1, after_loss)
    known.add(2, {"node-0": NODES["node-0"]})  # its first rank has died before it has recorded the change
    assert known.before_change(is_shared=True) == after_loss


def test_events_of_several_disks_are_merged_in_the_order_of_their_times(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    early = [loss(number, "node-1", "2025-01-01T00:00:00Z") for number in (1, 2)]
    late = [loss(number, "node-1", "2025-01-02T00:00:00Z") for number in (1, 2)]
    for folder, changes in ((first, (late[0], early[1])), (second, (early[0], late[1], late[0]))):
        folder.mkdir()
        for change in changes:
            change.append_to(folder)
    merged = _merged_lines(first / "events.jsonl", second / "events.jsonl")
    (tmp_path / "events.jsonl").write_text(merged)
    assert read_changes(tmp_path) == [*early, *late]
