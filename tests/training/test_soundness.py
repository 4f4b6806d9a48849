"""Damaged checkpoints: found before anything is loaded, passed over in favour of a sound one, never overwritten."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore
from training_runs import make_experiment, small_plan, train_alone

from skippipe.checkpoint.reader import complete_checkpoints
from skippipe.checkpoint.soundness import newest_sound_checkpoint, require_sound_checkpoint
from skippipe.config.experiment import Experiment
from skippipe.errors import CheckpointError
from skippipe.monitor.metrics_file import read_metrics
from skippipe.runtime.ranks.context import DistributedContext

MODEL, OPTIMIZER, METADATA = "model-stage-1.safetensors", "optimizer-stage-2.safetensors", "metadata.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of which the checkpoints of steps 1 to 3 are kept."""
    folder = tmp_path_factory.mktemp("sound")
    train_alone(make_experiment(folder, training={"max_steps": 3}, checkpoint={"interval": 1, "keep_last": 3}))
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy")) / "run"


def resumed(run_dir: Path, **sections: Any) -> Experiment:
    return make_experiment(run_dir.parent, **({"training": {"max_steps": 4}} | sections))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2 * len(content) // 3] ^= 1
    path.write_bytes(content)


def flip_the_beginning(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 0x10
    path.write_bytes(content)


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def exchange(path: Path) -> None:
    """Put the file of the checkpoint before in its place."""
    before = int(path.parent.name.removeprefix("step-")) - 1 or 2
    shutil.copy(checkpoint(path.parents[2], before) / path.name, path)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"}")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [cut, empty, flip, flip_the_beginning, blank, exchange, replace_by_a_folder, Path.unlink]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, METADATA])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_newest_damaged_checkpoint_is_passed_over_and_named(
    run_dir: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint(run_dir, 3) / name)
    chosen, damaged = newest_sound_checkpoint(run_dir)
    assert chosen == checkpoint(run_dir, 2)
    assert list(damaged) == [checkpoint(run_dir, 3)]
    assert damaged[checkpoint(run_dir, 3)].startswith(f"{name}: ")
    for step in (1, 2):
        lengthen(checkpoint(run_dir, step) / name)
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged: .*none of the 3 checkpoints can be read"):
        newest_sound_checkpoint(run_dir)


def test_every_value_of_the_metadata_is_covered_by_its_own_hash(run_dir: Path) -> None:
    path = checkpoint(run_dir, 3) / METADATA
    content = json.loads(path.read_text())
    for key in content.keys() - {"sha256", "format"}:
        other = {"step": 2, "seed": 99, "tokens": 1, "elapsed_s": 0.5, "dtype": "bfloat16", "wandb_id": "x"}.get(
            key, {}
        )
        path.write_text(json.dumps(content | {key: other}))
        assert checkpoint(run_dir, 3) in newest_sound_checkpoint(run_dir)[1], key


def test_metadata_of_earlier_versions_is_read(run_dir: Path) -> None:
    path = checkpoint(run_dir, 3) / METADATA
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert newest_sound_checkpoint(run_dir) == (checkpoint(run_dir, 3), {})


def test_directories_under_each_others_names_are_damaged(run_dir: Path) -> None:
    shutil.rmtree(checkpoint(run_dir, 3))
    checkpoint(run_dir, 2).rename(checkpoint(run_dir, 3))
    chosen, damaged = newest_sound_checkpoint(run_dir)
    assert chosen == checkpoint(run_dir, 1)
    assert "it is of step 2, not 3" in damaged[checkpoint(run_dir, 3)]


def test_run_goes_on_from_the_sound_one_and_keeps_the_damaged_one(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(checkpoint(run_dir, 3) / MODEL)
    damaged = (checkpoint(run_dir, 3) / MODEL).read_bytes()
    summary = train_alone(resumed(run_dir, checkpoint={"interval": 1, "keep_last": 1}))
    assert (summary.first_step, summary.step) == (2, 4)
    lines = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"{checkpoint(run_dir, 3)} is damaged: {MODEL}: its content is not what was saved")
    assert "continuing from step-00000002" in lines[0]
    assert (run_dir / "checkpoints" / "damaged-step-00000003" / MODEL).read_bytes() == damaged
    assert complete_checkpoints(run_dir) == [checkpoint(run_dir, 4)]


def test_a_checkpoint_of_the_run_is_resumed_by_its_name(run_dir: Path) -> None:
    shutil.rmtree(checkpoint(run_dir, 3))
    assert train_alone(resumed(run_dir, checkpoint={"resume": "step-00000002"})).first_step == 2
    missing = resumed(run_dir, checkpoint={"resume": "step-00000009"})
    with pytest.raises(CheckpointError, match=f"{checkpoint(run_dir, 9)}: no such checkpoint directory"):
        train_alone(missing)


def test_without_a_sound_checkpoint_the_run_is_refused_and_left_as_it_is(run_dir: Path) -> None:
    for step in (1, 2, 3):
        blank(checkpoint(run_dir, step) / METADATA)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="Nothing was changed: bring one back from a copy, or move"):
        train_alone(resumed(run_dir, optimizer={"lr": 1e-3}))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 3


def test_folder_that_is_none_is_refused(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be read \(Not a directory\)"):
        newest_sound_checkpoint(run_dir)


def test_weights_are_read_from_the_newest_whose_weights_are_sound(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(checkpoint(run_dir, 3) / OPTIMIZER)
    assert require_sound_checkpoint(run_dir) == checkpoint(run_dir, 3)
    assert caplog.text == ""
    flip(checkpoint(run_dir, 3) / MODEL)
    assert require_sound_checkpoint(run_dir) == checkpoint(run_dir, 2)
    assert f"{checkpoint(run_dir, 3)} is damaged: {MODEL}: its content" in caplog.text
    assert "reading step-00000002" in caplog.text


def test_another_number_format_is_refused(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_bytes()
    training = {"max_steps": 4, "dtype": "bfloat16"}
    with pytest.raises(CheckpointError, match=r"training\.dtype: bfloat16, but .* was trained in float32; continue"):
        train_alone(resumed(run_dir, training=training), small_plan())
    assert (run_dir / "config.yaml").read_bytes() == config


def test_ranks_share_the_hashing_and_agree(run_dir: Path) -> None:
    flip(checkpoint(run_dir, 3) / OPTIMIZER)
    flip(checkpoint(run_dir, 2) / MODEL)
    store = HashStore()
    contexts = [DistributedContext(rank, 3, 0, 30.0, store) for rank in range(3)]
    with ThreadPoolExecutor(3) as ranks:
        answers = list(ranks.map(lambda context: newest_sound_checkpoint(run_dir, context), contexts))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == checkpoint(run_dir, 1)
    assert [damage.partition(":")[0] for damage in answers[0][1].values()] == [OPTIMIZER, MODEL]
