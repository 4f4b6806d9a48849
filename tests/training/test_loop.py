"""The loop in one process: records, resume, full disks, losses that are not finite, W&B."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from full_disk import largest_file
from training_runs import ALONE, losses, make_experiment, small_plan, train_alone, write_inputs

from skippipe.checkpoint.reader import complete_checkpoints, read_metadata
from skippipe.cli.commands.train_command import command
from skippipe.cli.main import main
from skippipe.data.samples import SampleOrder
from skippipe.errors import CheckpointError, PlanError, SkipPipeError, StoppedError, StorageError
from skippipe.monitor.metrics_file import read_metrics
from skippipe.monitor.report.run_record import read_run_record
from skippipe.planning.sharing import choose_plan, share_plans
from skippipe.runtime.local_runner import LocalRunner
from skippipe.training.signals import StopSignal


def test_run_directory_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = make_experiment(tmp_path)
    summary = train_alone(experiment)
    assert (summary.step, summary.stopped, summary.tokens) == (6, False, 6 * 4 * 2 * 16)
    run = read_run_record(tmp_path / "run")
    assert run.experiment == experiment
    assert run.plan == small_plan()
    assert run.measured is not None
    assert len(run.measured.spans) == sum(map(len, small_plan().order.values()))
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [("val/loss" in entry) for entry in entries] == [False, False, True, False, False, True]
    assert entries[2]["val/perplexity"] == pytest.approx(math.exp(entries[2]["val/loss"]))
    assert entries[-1]["tokens"] == summary.tokens
    assert entries[-1]["perf/elapsed_s"] == pytest.approx(sum(entry["perf/iteration_s"] for entry in entries))
    assert entries[-1]["train/loss"] < entries[0]["train/loss"]
    printed = capsys.readouterr().out
    assert "step 6/6  loss" in printed
    assert small_plan().hash in printed


def test_resume_is_bitwise_the_run_that_never_stopped(tmp_path: Path) -> None:
    train_alone(make_experiment(tmp_path, "whole"))
    schedule = {"warmup_steps": 2}
    first = make_experiment(tmp_path, "parts", training={"max_steps": 6}, lr_scheduler=schedule)
    interrupted = StopAfter(steps=3)
    with interrupted:
        summary = train_alone(first)
    assert (summary.stopped, summary.stopped_by) == (True, 0)
    assert summary.step == 3
    summary = train_alone(first)
    assert (summary.first_step, summary.step) == (3, 6)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_step_costs_one_sum_over_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[int] = []
    original = LocalRunner.sum_over_ranks

    def counting(runner: LocalRunner, values: Sequence[float], own: Sequence[float] = ()) -> list[float]:
        sums.append(len(values))
        return original(runner, values, own)

    monkeypatch.setattr(LocalRunner, "sum_over_ranks", counting)
    quiet = {"checkpoint": {"interval": 0}, "evaluation": {"interval": 0}}
    counts = []
    for steps in (2, 7):
        sums.clear()
        train_alone(make_experiment(tmp_path, f"steps-{steps}", training={"max_steps": steps}, **quiet))
        counts.append(sums.count(max(sums)))  # the writer of checkpoints has sums of its own while it waits
    assert counts == [2, 7]


class StopAfter:
    """Send this process a real SIGTERM during an iteration."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        self._original = LocalRunner.train_iteration

    def __enter__(self) -> None:
        stop, original = self, self._original

        def train_iteration(runner: LocalRunner, *arguments: object) -> object:
            stop._left -= 1
            if stop._left == 0:
                signal.raise_signal(signal.SIGTERM)
            return original(runner, *arguments)  # type: ignore[arg-type]

        LocalRunner.train_iteration = train_iteration  # type: ignore[assignment,method-assign]

    def __exit__(self, *reason: object) -> None:
        LocalRunner.train_iteration = self._original  # type: ignore[method-assign]


def test_lines_after_the_checkpoint_are_not_doubled(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, training={"max_steps": 4}, checkpoint={"interval": 0})
    train_alone(experiment)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "train/loss": 1.0}\n{"step": 6, "train/lo')  # a crash after the checkpoint
    train_alone(make_experiment(tmp_path))
    assert len(losses(tmp_path / "run")) == 6


def test_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    train_alone(make_experiment(tmp_path))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    summary = train_alone(make_experiment(tmp_path))
    assert (summary.first_step, summary.step, summary.loss, summary.checkpoint) == (6, 6, None, None)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_full_disk_keeps_the_last_checkpoint_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_alone(make_experiment(tmp_path, training={"max_steps": 2}))
    more = make_experiment(tmp_path, checkpoint={"interval": 1})
    with largest_file(30_000), pytest.raises(StorageError, match="step 6: the last checkpoint could not be saved"):
        train_alone(more)
    assert "step 3: no checkpoint could be saved" in caplog.text
    assert "File too large" in caplog.text
    assert len(losses(tmp_path / "run")) == 6
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train_alone(more).first_step == 2
    assert len(losses(tmp_path / "run")) == 6


def test_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, optimizer={"lr": 1e30}, lr_scheduler={"warmup_steps": 0})
    with pytest.raises(SkipPipeError, match=r"step 2: loss .*nan.*Lower optimizer\.lr"):
        train_alone(experiment)
    assert len(losses(tmp_path / "run")) == 1


def test_bfloat16_learns_and_resumes(tmp_path: Path) -> None:
    training = {"max_steps": 4, "dtype": "bfloat16"}
    train_alone(make_experiment(tmp_path, training=training))
    summary = train_alone(make_experiment(tmp_path, training=training | {"max_steps": 8}))
    assert summary.first_step == 4
    series = losses(tmp_path / "run")
    assert series[-1] < series[0] - 0.2


def test_wandb_offline_is_one_run_over_a_resume(tmp_path: Path) -> None:
    import wandb

    offline: dict[str, Any] = {"logging": {"wandb": {"mode": "offline"}}}
    train_alone(make_experiment(tmp_path, training={"max_steps": 2}, **offline))
    train_alone(make_experiment(tmp_path, training={"max_steps": 3}, **offline))
    wandb.teardown()  # until its process ends it may still write
    run_id = (tmp_path / "run" / "wandb_id").read_text().strip()
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    # The second of two that begin within a second gets a number behind its id.
    names = [re.fullmatch(r"offline-run-\d+_\d+-([0-9a-z]+)(?:-\d+)?", folder.name) for folder in folders]
    assert [name and name[1] for name in names] == [run_id] * 2
    assert all(b"nodes/all/busy_share" in (folder / f"run-{run_id}.wandb").read_bytes() for folder in folders)
    assert read_metadata(complete_checkpoints(tmp_path / "run")[-1]).wandb_id == run_id


def test_wandb_has_a_run_of_its_own_for_a_branch(tmp_path: Path) -> None:
    import wandb

    offline: dict[str, Any] = {"logging": {"wandb": {"mode": "offline"}}}
    train_alone(make_experiment(tmp_path, training={"max_steps": 2}, **offline))
    start = complete_checkpoints(tmp_path / "run")[-1]
    branch = make_experiment(
        tmp_path, "branch", training={"max_steps": 3}, checkpoint={"resume": str(start)}, **offline
    )
    assert train_alone(branch).first_step == 2
    (tmp_path / "branch" / "wandb_id").unlink()
    train_alone(make_experiment(tmp_path, "branch", training={"max_steps": 4}, **offline))
    wandb.teardown()
    first, second = ((tmp_path / name / "wandb_id").read_text().strip() for name in ("run", "branch"))
    assert first != second
    saved = [read_metadata(complete_checkpoints(tmp_path / name)[-1]).wandb_id for name in ("run", "branch")]
    assert saved == [first, second]
    assert {folder.name.split("-")[3] for folder in (tmp_path / "branch" / "wandb").glob("offline-run-*")} == {second}


def test_wandb_disabled_leaves_nothing(tmp_path: Path) -> None:
    train_alone(make_experiment(tmp_path, training={"max_steps": 1}))
    assert not (tmp_path / "run" / "wandb").exists()
    assert not (tmp_path / "run" / "wandb_id").exists()


def test_wandb_that_cannot_write_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = make_experiment(tmp_path, training={"max_steps": 2}, logging={"wandb": {"mode": "offline"}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where the folder should be")
    assert train_alone(experiment).step == 2
    assert caplog.text.count("wandb: cannot") <= 1


def test_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    (tmp_path / "run").write_text("not a directory")
    with pytest.raises(StorageError, match=r"run: cannot be written .*choose another run_dir"):
        train_alone(experiment)


def test_plan_for_other_microbatches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the plan has 4 microbatches, training\.num_microbatches is 8"):
        train_alone(make_experiment(tmp_path, training={"num_microbatches": 8}))


def test_stop_signal_gives_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a launcher's echo of the same Ctrl-C
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_step_that_takes_too_long_is_given_up_and_the_one_before_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train_alone(make_experiment(tmp_path, "whole"))
    experiment = make_experiment(tmp_path, "parts", checkpoint={"patience_s": 0.05, "interval": 0})
    original = SampleOrder.batch

    def slow_batch(order: SampleOrder, step: int, microbatch: int, *counts: int) -> object:
        if (step, microbatch) == (4, 1):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)
        return original(order, step, microbatch, *counts)

    with monkeypatch.context() as patched:
        patched.setattr(SampleOrder, "batch", slow_batch)
        summary = train_alone(experiment)
    assert (summary.stopped, summary.step) == (True, 4)
    assert summary.checkpoint == complete_checkpoints(tmp_path / "parts")[-1]
    assert "step 5: the step was not finished 0.05 s after SIGTERM; it is given up, and step 4 saved" in caplog.text
    assert train_alone(experiment).first_step == 4
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_signal_before_the_first_step_ends_at_once() -> None:
    with StopSignal(at_once=True) as stop:
        with pytest.raises(StoppedError, match="stopped by SIGHUP before the first step") as stopped:
            signal.raise_signal(signal.SIGHUP)
        assert (stopped.value.exit_code, stop.name) == (75, "SIGHUP")
    with StopSignal(at_once=True) as stop:
        stop.defer()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_hangs_in_a_call_is_ended_by_the_signal() -> None:
    """Python runs no handlers while a library computes."""
    program = (
        "import hashlib, os, threading, skippipe.training.signals as signals\n"
        "signals.UNWIND_S = 0.2\n"
        "with signals.StopSignal(at_once=True):\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), 15)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM before the first step, in a call that does not return" in done.stderr


def test_later_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skippipe.training.signals.REPEAT_S", -1.0)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_plan_is_solved_once_and_again_when_the_cluster_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = make_experiment(tmp_path)
    plan = share_plans(experiment, None, ALONE).main
    kept = (tmp_path / "run" / "plan.json").read_bytes()
    assert choose_plan(experiment, None) == plan
    assert (tmp_path / "run" / "plan.json").read_bytes() == kept
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(cluster.read_text().replace("gbit_per_s: 20", "gbit_per_s: 2"))
    other = choose_plan(experiment, None)
    assert other.costs.transfer_s != plan.costs.transfer_s
    assert "made for other links" in caplog.text
    assert (tmp_path / "run" / "plan.json").read_bytes() == kept  # until a run begins under the other


def test_a_plan_for_other_speeds_is_followed_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = share_plans(make_experiment(tmp_path), None, ALONE).main
    assert choose_plan(make_experiment(tmp_path), None) == plan
    assert caplog.text == ""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(cluster.read_text().replace("compute_tflop_per_s: 0.05", "compute_tflop_per_s: 0.04"))
    assert choose_plan(make_experiment(tmp_path), None) == plan
    assert "made for other task times than the experiment's, and followed all the same" in caplog.text
    assert "remove it to have the run planned again" in caplog.text


def test_a_start_that_is_refused_leaves_the_plan_as_it_was(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, training={"max_steps": 1})
    train_alone(experiment, share_plans(experiment, None, ALONE).main)
    kept = (tmp_path / "run" / "plan.json").read_bytes()
    other = make_experiment(tmp_path, training={"max_steps": 2, "dtype": "bfloat16"})
    with pytest.raises(CheckpointError, match=r"training\.dtype: bfloat16"):
        train_alone(other, share_plans(other, None, ALONE).main)
    assert (tmp_path / "run" / "plan.json").read_bytes() == kept


def test_a_run_that_is_done_keeps_what_it_was_trained_with(tmp_path: Path) -> None:
    train_alone(make_experiment(tmp_path, training={"max_steps": 1}))
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert tmp_path / "run" / "trace" / "rank-0.jsonl" in files
    again = make_experiment(tmp_path, training={"max_steps": 1}, logging={"interval": 7})
    done = train_alone(again, small_plan(num_stages=2, layers_per_stage=3))
    assert (done.first_step, done.step) == (1, 1)
    for path, content in files.items():
        assert path.read_bytes() == content, path


def test_plan_is_solved_again_when_a_node_is_pinned_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = share_plans(make_experiment(tmp_path), None, ALONE).main
    node = plan.nodes[0]
    stay, leave = plan.stage_of[node], (plan.stage_of[node] + 1) % len(plan.stages)
    assert choose_plan(make_experiment(tmp_path, pipeline={"pinned": {node: stay}}), None) == plan
    moved = choose_plan(make_experiment(tmp_path, pipeline={"pinned": {node: leave}}), None)
    assert moved.stage_of[node] == leave
    assert "made for other pinned nodes" in caplog.text


def test_plan_is_solved_again_when_backwards_may_be_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert share_plans(make_experiment(tmp_path), None, ALONE).main.costs.weight_s is None
    split = choose_plan(make_experiment(tmp_path, pipeline={"split_backward": True}), None)
    assert split.costs.weight_s is not None
    assert "made for other splits of backwards" in caplog.text
    split.save(tmp_path / "run" / "plan.json")  # as a run does when it begins
    assert choose_plan(make_experiment(tmp_path, pipeline={"split_backward": True}), None) == split


def test_plan_with_chosen_layers_is_kept_until_the_model_has_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_layers = {"layers_per_stage": "auto"}
    plan = share_plans(make_experiment(tmp_path, pipeline=open_layers), None, ALONE).main
    assert choose_plan(make_experiment(tmp_path, pipeline=open_layers), None) == plan
    layers = sum(plan.layers_per_stage)
    options = make_experiment(tmp_path).model.options | {"num_hidden_layers": layers + 1}
    longer = choose_plan(make_experiment(tmp_path, pipeline=open_layers, model={"options": options}), None)
    assert sum(longer.layers_per_stage) == layers + 1
    assert "made for other layers" in caplog.text


def test_command_prints_the_configuration_and_trains(tmp_path: Path) -> None:
    arguments = write_inputs(make_experiment(tmp_path), small_plan(), tmp_path)
    shown = CliRunner().invoke(command, [*arguments, "--print-config", "training.max_steps=3"])
    assert shown.exit_code == 0
    assert "max_steps: 3" in shown.output
    assert not (tmp_path / "run").exists()
    result = CliRunner().invoke(command, [*arguments, "training.max_steps=3"])
    assert result.exit_code == 0, result.output
    assert "done after step 3 (3 in this run), saved" in result.output
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.max_stepz=3"], "did you mean 'training.max_steps'"),
        (["--plan", "nothing.json"], "nothing.json: no such file"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_inputs(make_experiment(tmp_path), small_plan(), tmp_path)[:2]
    with pytest.raises(SystemExit) as stop:
        main(["train", *given, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_plan_without_skips_is_kept_over_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = make_experiment(tmp_path, pipeline={"skip_ratio": 0.0, "max_swaps": 1})
    plan = choose_plan(experiment, None)
    assert choose_plan(experiment, None) == plan
    assert caplog.text == ""


def test_kept_plan_that_is_damaged_is_named_with_its_remedy(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    kept = tmp_path / "run" / "plan.json"
    kept.parent.mkdir()
    kept.write_bytes(small_plan().to_json().encode()[:-20])
    with pytest.raises(PlanError, match=r"plan\.json: not valid JSON.*remove it to have it planned again"):
        choose_plan(experiment, None)


def test_another_plan_than_the_checkpoints_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_alone(make_experiment(tmp_path, training={"max_steps": 1}))
    train_alone(make_experiment(tmp_path, training={"max_steps": 2}))
    assert "was written under plan" not in caplog.text
    other = small_plan(num_stages=2, layers_per_stage=3)
    train_alone(make_experiment(tmp_path, training={"max_steps": 3}), other)
    assert f"was written under plan {small_plan().hash}, the run goes on under {other.hash}" in caplog.text
