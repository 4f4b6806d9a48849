"""A start in a run directory in which one file is damaged: it goes on from the newest sound checkpoint, or is refused.

Whatever it is, one line says it, no sound checkpoint changes, and what is damaged is still there afterwards. The one of
checkpoints alone, without a start, is test_soundness.py.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from training_runs import MODEL_OPTIONS, make_experiment

from skippipe.checkpoint.reader import LATEST
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_experiment
from skippipe.errors import InputError
from skippipe.monitor.metrics_file import read_metrics
from skippipe.training import run_owner
from skippipe.training.run_owner import Owner
from skippipe.training.train_experiment import train_experiment
from skippipe_scheduler.plan.validate import load_plan

NEWEST: Final = "checkpoints/step-00000003"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_at_a_key(path: Path) -> None:
    """Cut so that what is left of a YAML file is one."""
    path.write_text(path.read_text().partition("\noptimizer:")[0] + "\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0 if path.suffix != ".safetensors" else 2 * len(content) // 3] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    """Put another file of the run in its place: of a checkpoint's, the one of the checkpoint before."""
    if path.parent.name == Path(NEWEST).name:
        shutil.copy(path.parent.with_name("step-00000002") / path.name, path)
    else:
        shutil.copy(run_of(path) / ("plan.json" if path.name == "metrics.jsonl" else "metrics.jsonl"), path)


def gone(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_file(path: Path) -> None:
    gone(path)
    path.write_text("")


def run_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "run")


class Row(NamedTuple):
    """What is damaged, and how a start must take it."""

    file: str
    damages: tuple[Callable[[Path], None], ...]
    says: str
    """What exactly one line says, or the error; "" where nothing is worth a word."""
    first_step: int | None = 3
    """Steps that are not done again; None where the start is refused."""


ROWS: Final = [
    Row("config.yaml", (cut, cut_at_a_key), r"config\.yaml: cut short: .* bring it back from a copy", None),
    Row("config.yaml", (empty, exchange, gone, a_folder), "config.yaml: ", None),
    Row("plan.json", (cut, empty, flip, exchange), r"plan\.json: .* Bring it back from a copy, or remove it", None),
    Row("plan.json", (gone,), "was written under plan .*, the run goes on under"),
    Row("metrics.jsonl", (cut, flip, exchange), r"steps before are .* is kept as damaged-metrics\.jsonl"),
    Row("metrics.jsonl", (empty, gone), "3 of the 3 steps before are missing or damaged"),
    Row("tokenizer/tokenizer.json", (cut, flip, gone), r"run trains with \(tokenizer\.json"),
    Row(
        "tokenizer/tokenizer_config.json",
        (empty, exchange, a_folder),
        r"trains with \(tokenizer_config\.json .* is kept as former-tokenizer",
    ),
    Row("tokenizer", (gone,), "tokenizer: missing; written again"),
    Row("tokenizer", (a_file,), "tokenizer: a file, where a run keeps a folder", None),
    Row("owner.json", (cut, empty), r"owner\.json is damaged; waiting at most"),
    Row(LATEST, (cut, empty, flip, exchange), "latest: .* is no name of a checkpoint"),
    Row(LATEST, (gone,), r"with other settings, the run goes on with training\.max_steps 4 \(before: 3\)$"),
    *(
        Row(f"{NEWEST}/{name}", damages, f"step-00000003 is damaged: {name}: .*; continuing from step-00000002", 2)
        for name, damages in {
            "metadata.json": (cut, flip, gone),
            "model-stage-0.safetensors": (empty, exchange, a_folder),
            "optimizer-stage-1.safetensors": (flip, gone),
        }.items()
    ),
    Row(NEWEST, (gone,), "step-00000003 was saved and is gone; continuing from step-00000002", 2),
    Row(NEWEST, (a_file,), "step-00000003 is damaged: .*; continuing from step-00000002", 2),
    Row("checkpoints", (gone,), "step-00000003 was saved and is gone; there is no other. Nothing was changed", None),
    Row("checkpoints", (a_file,), "checkpoints: a file, where a run keeps a folder", None),
    Row("trace/rank-0.jsonl", (cut,), ""),
    Row("memory.json", (gone,), ""),
    *(
        Row(name, (a_folder,), f"{name}: a folder, where a run keeps a file; move it away", None)
        for name in ("plan.json", "metrics.jsonl", "owner.json", LATEST, "trace/rank-0.jsonl", "memory.json")
    ),
]
KINDS: Final = [(row, damage) for row in ROWS for damage in row.damages]


def experiment_of(folder: Path, max_steps: int) -> Experiment:
    return make_experiment(
        folder,
        model={
            "options": MODEL_OPTIONS
            | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
            | {"num_key_value_heads": 1}
        },
        data={"tokenizer": "bpe:300"},
        pipeline={"num_stages": 2, "skip_ratio": 0.0, "planner": {"time_limit_s": 0.1}},
        training={"max_steps": max_steps, "num_microbatches": 2, "micro_batch_size": 1, "sequence_length": 8},
        lr_scheduler={"warmup_steps": 1, "min_lr_ratio": 1.0},  # a longer run is the same run
        checkpoint={"interval": 1, "keep_last": 9},
        evaluation={"interval": 0},
    )


def losses(run_dir: Path) -> dict[int, float]:
    return {entry["step"]: entry["train/loss"] for entry in read_metrics(run_dir / "metrics.jsonl")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """A run of three steps with three checkpoints, and the losses of one that went on to the fourth undisturbed."""
    folder = tmp_path_factory.mktemp("damage")
    train_experiment(experiment_of(folder, 3))
    shutil.copytree(folder / "run", folder / "undisturbed" / "run")
    start(folder / "undisturbed" / "run")
    return folder / "run", losses(folder / "undisturbed" / "run")


def start(run_dir: Path) -> int:
    """Start the run again, with a fourth step; return how many steps were done before."""
    overrides = ["training.max_steps=4", f"run_dir={run_dir}"]
    return train_experiment(load_experiment(run_dir / "config.yaml", overrides)).first_step


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("row", "damage"), KINDS, ids=[f"{row.file.rpartition('/')[2]}-{damage.__name__}" for row, damage in KINDS]
)
def test_a_start_goes_on_from_the_newest_sound_one_or_is_refused(
    trained: tuple[Path, dict[int, float]],
    tmp_path: Path,
    row: Row,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(run_owner, "WATCH_S", 0.0)
    run_dir = Path(shutil.copytree(trained[0], tmp_path / "run"))
    if row.file == "owner.json":
        (run_dir / row.file).write_text(an_owner_that_is_gone())
    damage(run_dir / row.file)
    before = contents(run_dir)

    if row.first_step is None:
        with pytest.raises(InputError, match=row.says) as refused:
            start(run_dir)
        assert refused.value.exit_code == 2
        assert contents(run_dir) == before
        return

    assert start(run_dir) == row.first_step
    if row.says:
        said = len([record for record in caplog.records if re.search(row.says, record.getMessage())])
        plans = [load_plan(folder / "plan.json").hash for folder in (run_dir, trained[0])]
        found_again = row.file == "plan.json" and plans[0] == plans[1]  # a search of so short a time may do that
        assert said == (0 if found_again else 1)
    after = contents(run_dir)
    sound = [Path("checkpoints") / f"step-{step:08d}" for step in range(1, row.first_step + 1)]
    assert all(after[path] == content for path, content in before.items() if path.parent in sound)
    assert row.file in WRITTEN_ANEW or before.get(Path(row.file), b"") in after.values()
    kept = losses(run_dir)
    expected = trained[1] if not row.file.startswith("metrics") else {step: trained[1][step] for step in kept}
    assert kept == expected


WRITTEN_ANEW: Final = {"owner.json", LATEST, "memory.json", "trace/rank-0.jsonl"}
"""Files that every start or save replaces."""


def an_owner_that_is_gone() -> str:
    gone_process: dict[str, Any] = Owner.here().model_dump() | {"process": 1, "started_s": 1.0}
    return Owner.model_validate(gone_process).model_dump_json()
