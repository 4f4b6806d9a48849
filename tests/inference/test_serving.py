"""A run served by several processes: the same answers as one process, with nodes absent and nodes that go."""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import serving_ranks
from serving_ranks import DRIVER, EVERYTHING, PROMPTS, answer, command_on_ranks, continued, on_ranks

from skippipe.checkpoint.reader import require_checkpoint
from skippipe.cli.main import main
from skippipe.inference.distributed.stage_assignment import assign_stages
from skippipe.inference.inference_run import read_inference_run
from skippipe.inference.model_loading import load_model


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving_ranks.make_run(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize(
    ("world_size", "absent", "questions"),
    [
        (4, (), EVERYTHING),
        (3, ("node-1",), ("random", "stages:0,2,1", "best", "skipdecode", "speculative exit", "evaluation")),
        (2, (), ("full", "stages:0,2,1", "speculative exit")),
    ],
    ids=["the plan's nodes", "one absent", "two ranks"],
)
def test_answers_are_those_of_one_process_to_the_bit(
    run_dir: Path, tmp_path: Path, world_size: int, absent: tuple[str, ...], questions: Sequence[str]
) -> None:
    found, codes, logs = on_ranks(tmp_path, run_dir, questions, world_size, absent=absent)
    assert codes == [0] * world_size, logs
    alone = load_model(run_dir, device="cpu", absent=absent)
    for question in questions:
        assert found[question] == answer(alone, question), question


def serving_rank(run_dir: Path, stage: int) -> int:
    return assign_stages(read_inference_run(run_dir), [None] * 4, ()).holders()[stage]


def test_a_lost_node_is_replaced_by_its_replica_and_the_next_one_missed(run_dir: Path, tmp_path: Path) -> None:
    """A pass makes a token, and each loss costs one more, in which the text is read again."""
    serving = serving_rank(run_dir, 1)
    faults = {serving: (4, signal.SIGKILL), 1: (8, signal.SIGKILL)}
    found, codes, logs = on_ranks(tmp_path, run_dir, ["continue 12"], 4, faults=faults)
    assert sorted(code or 0 for code in codes) == [-9, -9, 0, 0]
    whole = continued(load_model(run_dir, device="cpu"), PROMPTS[0], 12)
    rest = continued(load_model(run_dir, device="cpu", absent=["node-1"]), [*PROMPTS[0], *whole["tokens"][:6]], 6)
    reply = found["continue 12"]
    assert reply["tokens"] == whole["tokens"][:6] + rest["tokens"]
    assert reply["tokens"] != whole["tokens"]
    assert reply["share"] == pytest.approx((5 + 6 * 2 / 3) / 11, abs=0.01)
    assert reply["absence"] == rest["absence"]
    told = logs[DRIVER].splitlines()
    assert told[0].endswith(f"node-{serving} was lost (connection closed); a replica takes its place")
    assert told[2].endswith("node-1 was lost (connection closed) and stage 2 with it")
    assert [line for line in told if "the text so far is read again" in line] == [told[1], told[3]]


def test_a_node_that_falls_silent_is_given_up(run_dir: Path, tmp_path: Path) -> None:
    faults = {1: (3, signal.SIGSTOP)}
    found, codes, logs = on_ranks(tmp_path, run_dir, ["continue 6"], 4, faults=faults)
    assert codes[DRIVER] == 0, logs
    whole = continued(load_model(run_dir, device="cpu"), PROMPTS[0], 2)["tokens"]
    rest = continued(load_model(run_dir, device="cpu", absent=["node-1"]), [*PROMPTS[0], *whole], 4)
    assert found["continue 6"]["tokens"] == whole + rest["tokens"]
    assert "node-1 was lost (no sign of life) and stage 2 with it" in logs[DRIVER]


def test_the_one_that_prints_is_replaced_by_the_next_with_stage_0(run_dir: Path, tmp_path: Path) -> None:
    """Rank 0 dies while it samples, then rank 2 in the evaluation, and the rest of it is done by rank 4."""
    questions = ("sampled", "continue 4", "evaluation")
    before_evaluation = serving_ranks.NEW + 4
    faults = {0: (4, signal.SIGKILL), 2: (before_evaluation + 1, signal.SIGKILL)}
    found, codes, logs = on_ranks(tmp_path, run_dir, questions, 5, num_stages=2, faults=faults)
    assert codes == [-9, 0, -9, 0, 0], logs
    alone = load_model(run_dir, device="cpu", num_stages=2)
    assert {question: answer(alone, question) for question in questions} == found
    assert logs[2].endswith("rank 0 was lost (connection closed); rank 2 takes its place and prints the whole answer\n")
    assert logs[4].endswith("rank 2 was lost (connection closed); rank 4 takes its place and prints the whole answer\n")
    assert logs[1] + logs[3] == ""


def test_a_measurement_goes_on_with_a_replica_and_ends_without_one(run_dir: Path, tmp_path: Path) -> None:
    faults = {serving_rank(run_dir, 1): (2, signal.SIGKILL)}
    found, codes, logs = on_ranks(tmp_path, run_dir, ["evaluation"], 4, faults=faults)
    assert codes[DRIVER] == 0, logs
    assert found["evaluation"] == answer(load_model(run_dir, device="cpu"), "evaluation")
    _, codes, logs = on_ranks(tmp_path, run_dir, ["evaluation"], 4, faults={1: (2, signal.SIGKILL)})
    assert (codes[DRIVER], codes[1]) == (1, -9)
    assert logs[DRIVER].splitlines()[-1].endswith("and stage 2 with it; start again with --absent node-1")


def test_command_says_at_what_depth_it_answered(run_dir: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(run_dir), "--prompt", "line 1 of", "--max-new-tokens", "5", "--absent", "node-1"]
    codes, printed = command_on_ranks(tmp_path, arguments, 4)
    assert codes == [0] * 4, printed
    assert printed[DRIVER].startswith("line 1 of")
    assert printed[DRIVER].endswith(
        "stage 2 has no node left: answered at 2 of 3 stages (67% of the layers' compute)\n"
    )
    assert "".join(printed[rank] for rank in (0, 1, 3)) == ""


def test_evaluation_prints_the_table_of_one_process(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(run_dir), "--batches", "1", "--policy", "full", "exit", "--keep", "1.0", "0.5"]
    with pytest.raises(SystemExit):
        main(arguments)
    codes, printed = command_on_ranks(tmp_path, arguments, 2)
    assert codes == [0, 0], printed
    assert printed == [capsys.readouterr().out, ""]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--policy", "ffn-skip", "--keep", "0.9"],
            "--policy ffn-skip: it looks into layers, some of which lie",
        ),
        (["--speculative", "auto"], "--speculative auto: it looks into layers, some of which lie"),
        (["--absent", "node-2"], "stage 0 holds embedding and head, and of its nodes (node-2) none is there"),
    ],
)
def test_refusals_are_said_once(run_dir: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    codes, printed = command_on_ranks(tmp_path, ["generate", str(run_dir), "--prompt", "x", *arguments], 2)
    assert codes == [2, 2], printed
    assert printed[0].startswith(f"[rank 0] skippipe: error: {expected}")
    assert len(printed[0].splitlines()) == 1
    assert printed[1] == ""


def test_a_directory_without_stages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    codes, printed = command_on_ranks(tmp_path, ["evaluate", str(tmp_path)], 2)
    assert codes == [2, 2], printed
    assert "several processes serve runs alone" in printed[0]
    assert printed[1] == ""


def test_a_damaged_part_is_found_by_one_of_them_and_said_once(run_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run_dir, damaged)
    file = require_checkpoint(damaged) / "model-stage-2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    codes, printed = command_on_ranks(tmp_path, ["evaluate", str(damaged), "--batches", "1"], 4)
    assert codes == [2] * 4, printed
    assert f"error: {file.parent} is damaged: {file.name}: its content is not what was saved" in printed[0]
    assert "".join(printed[1:]) == ""
