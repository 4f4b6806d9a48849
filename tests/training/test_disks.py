"""Hosts that share no disk: every part of a checkpoint on two of them, and a run that goes on when one disk is gone."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from training_runs import ALONE, WORLD_SIZE, disk_of, make_experiment, on_ranks, ranks_plan, train_on_ranks

from skippipe.checkpoint.disks.disk_view import DiskView, WholeCheckpoint, needed_files, whole_checkpoint
from skippipe.checkpoint.disks.remote_folder import RemoteFolder
from skippipe.checkpoint.disks.run_disks import RunDisks, disks_of, named_disk, open_run_disks
from skippipe.checkpoint.disks.second_copies import files_on_disk, files_to_fetch, second_writer
from skippipe.checkpoint.held_files import HELD, held_files
from skippipe.checkpoint.reader import (
    LATEST,
    METADATA,
    FileRecord,
    Metadata,
    complete_checkpoints,
    file_sha256,
    read_metadata,
)
from skippipe.checkpoint.report_board import FileReport
from skippipe.config.experiment import Experiment
from skippipe.errors import CheckpointError, LeftOutError, MinorityError, SkipPipeError, StorageError
from skippipe.inference.model_loading import load_model
from skippipe.monitor.metrics_file import read_metrics
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.records.collecting import collect_run

FILES = ("model-stage-0.safetensors", "model-stage-1.safetensors", "optimizer-stage-0.safetensors")


def record(content: int) -> FileRecord:
    return FileRecord(size_bytes=1, sha256=str(content))


def metadata(elapsed_s: float = 0.0, layers: tuple[tuple[int, int], ...] | None = ((0, 2), (2, 4))) -> Metadata:
    facts = {"step": 3, "tokens": 0, "elapsed_s": elapsed_s, "seed": 1, "dtype": "float32", "model": {}, "data": {}}
    return Metadata.model_validate(
        facts | {"plan_hash": "", "layers": layers, "files": {name: record(1) for name in FILES}}
    )


def view(*sound: str, of: Metadata | None = None) -> DiskView:
    return DiskView(metadata=(of or metadata()).model_dump_json(), sound=sound)


@st.composite
def written(draw: st.DrawFn) -> tuple[list[FileReport], RunDisks]:
    """What ranks on several disks have written: each file by one writer, some by a second one, equal or not."""
    of_rank = draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=8).filter(lambda names: len(set(names)) > 1))
    disks = disks_of(of_rank, 0)
    files: list[dict[str, FileRecord]] = [{} for _ in of_rank]
    second: list[dict[str, FileRecord]] = [{} for _ in of_rank]
    for stage in range(draw(st.integers(1, 6))):
        name = f"model-stage-{stage}.safetensors"
        writer = draw(st.integers(0, len(of_rank) - 1))
        files[writer][name] = record(0)
        others = [rank for rank, disk in enumerate(of_rank) if disk != of_rank[writer]]
        if draw(st.booleans()):
            second[draw(st.sampled_from(others))][name] = record(draw(st.integers(0, 1)))
    return [FileReport(files=own, second=twice) for own, twice in zip(files, second, strict=True)], disks


@given(written())
def test_every_file_lies_on_two_disks_as_its_writer_wrote_it(case: tuple[list[FileReport], RunDisks]) -> None:
    reports, disks = case
    lies_on = Counter[str]()
    for disk in disks.firsts:
        lies_on.update(files_on_disk(reports, disks, disk))
        for name, writer in files_to_fetch(reports, disks, disk).items():
            assert name in reports[writer].files
            assert disks.of_rank[writer] != disk
    assert set(lies_on) == {name for report in reports for name in report.files}
    assert set(lies_on.values()) <= {2}


def test_replica_on_another_disk_is_the_second_writer() -> None:
    plan = ranks_plan()
    replicas = [plan.rank_of[node] for node in max(plan.stages, key=lambda stage: len(stage.nodes)).nodes]
    stage = next(index for index, held in enumerate(plan.stages) if len(held.nodes) == len(replicas))
    assert second_writer(plan, stage, disks_of(["a", "b", "c"], 0)) == replicas[1]
    assert second_writer(plan, stage, disks_of(["a", "a", "a"], 0)) is None
    assert second_writer(plan, 1 - stage, disks_of(["a", "b", "c"], 0)) is None  # no other has that stage


def test_disks_are_told_apart_by_what_is_seen_there(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert named_disk(one, "x") == named_disk(one, "x") != named_disk(other, "x")
    assert disks_of(["a", "b", "a", "c", "b"], 4) == RunDisks((0, 1, 0, 3, 1), 4)
    assert disks_of(["a", "b", "a", "c", "b"], 4).next_after(3) == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file: cannot be written"):
        named_disk(tmp_path / "file", "x")


def test_disks_have_a_checkpoint_together() -> None:
    whole = whole_checkpoint({0: view(*FILES[:2]), 1: view(FILES[2], FILES[0]), 2: DiskView()})
    assert isinstance(whole, WholeCheckpoint)
    assert whole.to_fetch(2, FILES) == {FILES[0]: 0, FILES[1]: 0, FILES[2]: 1}
    assert whole.to_fetch(1, FILES) == {FILES[1]: 0}
    assert whole.held_by(1) == [FILES[0], FILES[2]]


def test_files_of_two_states_are_never_mixed() -> None:
    other = metadata(elapsed_s=1.0)
    apart = {0: view(*FILES[:2]), 1: view(FILES[2], of=other)}
    assert whole_checkpoint(apart) == f"{FILES[2]}: sound on none of the 2 disks"
    whole = whole_checkpoint(apart | {2: view(*FILES, of=other)})
    assert isinstance(whole, WholeCheckpoint)
    assert whole.metadata == other
    assert whole.to_fetch(0, FILES) == dict.fromkeys(FILES[:2], 2) | {FILES[2]: 1}


def test_stages_need_the_files_with_their_layers() -> None:
    assert needed_files(metadata(), [(1, 2)]) == [FILES[0], FILES[2]]
    assert needed_files(metadata(), [(1, 3)]) == sorted(FILES)
    assert needed_files(metadata(layers=((0, 0), (0, 4))), [(0, 0)]) == [FILES[0], FILES[2]]  # embeddings alone
    assert needed_files(metadata(layers=None), [(0, 1)]) == sorted(FILES)


def disk_losses(experiment: Experiment) -> list[float]:
    return [entry["train/loss"] for entry in read_metrics(disk_of(experiment.run_path, 0) / "metrics.jsonl")]


def collect(rank: int, run_dir: Path) -> None:
    with DistributedContext.from_environment(60.0, process_groups=False) as context:
        collect_run(disk_of(run_dir, rank), context)
        context.leave_meeting(heard=True)


@pytest.mark.slow
def test_run_goes_on_bitwise_when_any_disk_is_gone(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, training={"max_steps": 4})
    run_dirs = [disk_of(experiment.run_path, rank) for rank in range(WORLD_SIZE)]
    train_on_ranks(experiment, ranks_plan(), own_disks=True)
    expected = disk_losses(experiment)
    assert len(expected) == 4
    for step in ("step-00000002", "step-00000004"):
        saved = [run_dir / "checkpoints" / step for run_dir in run_dirs]
        held = Counter(name for path in saved for name in json.loads((path / HELD).read_text())["files"])
        assert held == dict.fromkeys(read_metadata(saved[0]).files, 2)
        assert len({(path / METADATA).read_bytes() for path in saved}) == 1
        for path in saved:
            files = read_metadata(path).files
            assert {file.name for file in path.glob("*.safetensors")} == set(held_files(path, files))
            assert all(file_sha256(path / name) == files[name].sha256 for name in held_files(path, files))

    # One disk is gone, and on the others what came after step 2: the losses of steps 3 and 4 must come again.
    shutil.rmtree(run_dirs[-1])
    for run_dir in run_dirs[:-1]:
        shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
        (run_dir / LATEST).write_text("step-00000002\n")
    train_on_ranks(experiment, ranks_plan(), own_disks=True)
    assert disk_losses(experiment) == expected
    on_ranks(collect, experiment.run_path)
    whole = disk_of(experiment.run_path, 0)
    assert load_model(whole).checkpoint == "step-00000004"
    with pytest.raises(CheckpointError, match=r"of the 4 files of this checkpoint are here, .* with skippipe collect"):
        load_model(run_dirs[1])
    assert [path.name for path in complete_checkpoints(run_dirs[-1])] == ["step-00000002", "step-00000004"]


@pytest.mark.slow
def test_run_goes_on_bitwise_from_a_second_place_when_more_than_one_disk_is_gone(tmp_path: Path) -> None:
    there = tmp_path / "there"
    saving = {"interval": 2, "remote_save_folder": f"file://{there}"}
    experiment = make_experiment(tmp_path, training={"max_steps": 4}, checkpoint=saving)
    train_on_ranks(experiment, ranks_plan(), own_disks=True)
    expected = disk_losses(experiment)
    assert RemoteFolder(str(there)).steps() == [2, 4]

    again = experiment.model_copy(update={"checkpoint": experiment.checkpoint.model_copy(update={"interval": 4})})
    for lost in (range(1, WORLD_SIZE), range(WORLD_SIZE)):
        # What came after step 2 was brought nowhere, and a disk that is left has a part of it.
        shutil.rmtree(there / "step-00000004")
        for rank in lost:
            shutil.rmtree(disk_of(experiment.run_path, rank))
        train_on_ranks(again, ranks_plan(), own_disks=True)
        assert disk_losses(again)[-2:] == expected[-2:]
        for rank in lost:  # the checkpoint of step 2 was fetched: none is saved there now
            steps = [path.name for path in complete_checkpoints(disk_of(again.run_path, rank))]
            assert steps == ["step-00000002", "step-00000004"]
        assert RemoteFolder(str(there)).steps() == [2, 4]


@pytest.mark.parametrize(("error", "is_left"), [(LeftOutError, True), (MinorityError, True), (StorageError, False)])
def test_what_tells_disks_apart_is_left_to_those_who_go_on(
    tmp_path: Path, error: type[SkipPipeError], *, is_left: bool
) -> None:
    with pytest.raises(error), open_run_disks(tmp_path, ALONE):
        raise error("it ends here")
    assert len([*tmp_path.iterdir()]) == is_left
