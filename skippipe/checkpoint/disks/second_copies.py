"""On which two disks each file of a checkpoint lies: that of its writer, and one more."""

from collections.abc import Sequence

from skippipe.checkpoint.disks.run_disks import RunDisks
from skippipe.checkpoint.report_board import FileReport
from skippipe_scheduler.plan.plan import Plan


def second_writer(plan: Plan, stage: int, disks: RunDisks) -> int | None:
    """Return the first rank that has the stage on another disk than its first rank, or None where there is none.

    It has the same weights and optimizer state already, so that nothing need travel.
    """
    if disks.shared:
        return None
    first, *others = (plan.rank_of[node] for node in plan.stages[stage].nodes)
    return next((rank for rank in others if disks.of_rank[rank] != disks.of_rank[first]), None)


def files_to_fetch(reports: Sequence[FileReport], disks: RunDisks, disk: int) -> dict[str, int]:
    """Return which files a disk needs of which rank, so that each lies on two disks.

    Those are the files of which no second disk has written the same bytes: the disk after the writer's takes them.
    Devices of different makes may round differently, so the second writer's file counts only if it is equal.
    """
    wanted: dict[str, int] = {}
    for writer, report in enumerate(reports):
        own = disks.of_rank[writer]
        for name, record in report.files.items():
            has_second = any(
                other.second.get(name) == record and disks.of_rank[rank] != own for rank, other in enumerate(reports)
            )
            if not has_second and disks.next_after(own) == disk != own:
                wanted[name] = writer
    return wanted


def files_on_disk(reports: Sequence[FileReport], disks: RunDisks, disk: int) -> set[str]:
    """Return which files of a checkpoint lie on a disk once it has what `files_to_fetch` names."""
    records = {name: record for report in reports for name, record in report.files.items()}
    held = set(files_to_fetch(reports, disks, disk))
    for rank, report in enumerate(reports):
        if disks.of_rank[rank] == disk:
            held |= report.files.keys()
            held |= {name for name, record in report.second.items() if records.get(name) == record}
    return held
