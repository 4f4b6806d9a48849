"""Stages that nobody holds: policies leave them out, commands say so."""

import json
from pathlib import Path

import pytest
from serving_ranks import make_run
from tiny_decoders import hugging_face, tiny

from skippipe.cli.main import main
from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.inference_run import stages_without
from skippipe.inference.policies.base import PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.skeleton import find_parts

NODES = (("a", "b"), ("c",), ("d",), ("e", "f"))
BOUNDS = [(0, 1), (1, 3), (3, 5), (5, 6)]


@pytest.fixture(scope="module")
def without_second() -> Decoder:
    """A model of 6 layers in 4 stages, of which stage 1, layers 1 and 2, is absent."""
    skeleton = find_parts(hugging_face(tiny("llama", num_hidden_layers=6)))
    return Decoder(skeleton, BOUNDS, NODES, absent_stages=[1])


@pytest.mark.parametrize(
    ("name", "keep", "prompt", "answer", "num_stages"),
    [
        ("full", 1.0, (0, 3, 4, 5), (0, 3, 4, 5), 3),
        ("stages:0,2,1", 1.0, (0, 3, 4), (0, 3, 4), 2),
        ("without:d", 1.0, (0, 5), (0, 5), 2),
        ("random", 0.75, (0, 3, 4, 5), (0, 3, 4, 5), 3),
        ("best", 1.0, (0, 3, 4, 5), (0, 3, 4, 5), 3),
        ("exit", 0.5, (0,), (0,), None),
        ("unified", 0.5, (0, 3, 4, 5), (0, 3, 5), None),
        ("skipdecode", 0.75, (0, 3, 4, 5), (0, 4, 5), None),
        ("ffn-skip:threshold=0.5", 0.9, (0, 3, 4, 5), (0, 3, 4, 5), None),
    ],
)
def test_policies_leave_out_what_is_absent(
    without_second: Decoder,
    name: str,
    keep: float,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    num_stages: int | None,
) -> None:
    policy = build_policy(name, PolicyContext(without_second, keep, num_generated=5)).sample(0)
    assert policy.layers_at(0, 4) == prompt
    assert policy.layers_at(8, 4) == answer
    assert policy.num_stages == num_stages


def test_shrinking_depth_is_spread_over_other_lengths_too(without_second: Decoder) -> None:
    policy = build_policy("skipdecode", PolicyContext(without_second, 0.75, num_generated=5))
    assert [policy.layers_at(position, 4) for position in (4, 5)] == [(0, 3, 4, 5)] * 2
    assert [policy.for_length(2).layers_at(position, 4) for position in (4, 5)] == [(0, 3, 4, 5), (0, 4, 5)]
    assert policy.for_length(2) == policy.for_length(2) != policy.for_length(3)


def test_random_stages_are_drawn_from_those_that_are_there(without_second: Decoder) -> None:
    policy = build_policy("random", PolicyContext(without_second, 0.5))
    drawn = {policy.sample(index).layers_at(0, 0) for index in range(40)}
    assert drawn == {(0, 3, 4), (0, 5)}
    assert policy.num_stages == 2


def test_random_stages_keep_those_that_the_training_protected(without_second: Decoder) -> None:
    whole = Decoder(without_second.skeleton, BOUNDS, NODES, protected_stages=[3])
    policy = build_policy("random", PolicyContext(whole, 0.75))
    assert {policy.sample(index).layers_at(0, 0) for index in range(40)} == {(0, 1, 2, 5), (0, 3, 4, 5)}
    alone = Decoder(without_second.skeleton, BOUNDS, NODES, absent_stages=[3], protected_stages=[3])
    drawn = build_policy("random", PolicyContext(alone, 0.5))
    assert {drawn.sample(index).layers_at(0, 0) for index in range(40)} == {(0, 1, 2), (0, 3, 4)}
    with pytest.raises(InputError, match=r"leaves 1 of 4 stages, and no .* left out stages 0, 3; .* share is 0\.50"):
        build_policy("random", PolicyContext(whole, 0.25))


def test_missing_depth_in_words(without_second: Decoder) -> None:
    expected = "stage 1 has no node left: answered at 3 of 4 stages (67% of the layers' compute)"
    assert without_second.absence == expected
    both = Decoder(without_second.skeleton, BOUNDS, absent_stages=[1, 3])
    assert both.absence == "stages 1 and 3 have no node left: answered at 2 of 4 stages (50% of the layers' compute)"
    assert Decoder(without_second.skeleton).absence == ""


def test_a_stage_is_absent_with_its_last_node() -> None:
    assert stages_without(NODES, ["a", "e"]) == frozenset()
    assert stages_without(NODES, ["c", "e", "f"]) == {1, 3}


@pytest.mark.parametrize(
    ("nodes", "absent", "expected"),
    [
        (NODES, ["g"], "--absent g: the plan has no such node; it has a, b, c, d, e, f"),
        (NODES, ["a", "b"], "stage 0 holds embedding and head, and of its nodes .a, b. none is there"),
        ((), ["a"], "there is no plan here"),
    ],
)
def test_impossible_absences_are_refused(nodes: tuple[tuple[str, ...], ...], absent: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        stages_without(nodes, absent)


def test_calibration_needs_all_stages(without_second: Decoder) -> None:
    with pytest.raises(InputError, match="give a whole rule"):
        build_policy("ffn-skip", PolicyContext(without_second, 0.9))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("absent"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_evaluation_measures_the_depth_that_is_left(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(run_dir), "--batches", "1", "--keep", "1.0", "--json", "--absent", "node-3,node-0"]
    code, table, said = run(capsys, "evaluate", *options, "--policy", "full", "stages:0,2")
    assert code == 0
    found = json.loads(table)
    assert found["absent_stages"] == [1]
    assert [row["share_computed"] for row in found["results"]] == pytest.approx([2 / 3, 2 / 3])
    assert len({row["perplexity"] for row in found["results"]}) == 1
    assert "stage 1 has no node left: answered at 2 of 3 stages (67% of the layers' compute)" in said
    assert not (run_dir / "evaluation.json").exists(), "a report would take it for the whole model"


def test_generation_answers_at_the_depth_that_is_left(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", str(run_dir), "--prompt", "line 1 of", "--max-new-tokens", "6"]
    _, missing, said = run(capsys, *asked, "--absent", "node-0", "--absent", "node-3")
    assert "stage 1 has no node left" in said
    assert missing == run(capsys, *asked, "--policy", "stages:0,2")[1]
    assert missing != run(capsys, *asked, "--absent", "node-0")[1]
    _, printed, _ = run(capsys, *asked, "--absent", "node-1", "--json")
    assert json.loads(printed)["absent_stages"] == [2]
    drafting = ["--policy", "stages:0,2", "--speculative", "2"]
    _, drafted, _ = run(capsys, *asked, "--absent", "node-0,node-3", *drafting)
    assert drafted == missing


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--absent", "node-2"], "none is there"),
        (["--absent", "node-1", "--stages", "6"], "leave --stages and --absent out"),
    ],
)
def test_mistakes(run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    code, _, message = run(capsys, "generate", str(run_dir), "--prompt", "x", *arguments)
    assert code == 2
    assert expected in message
    assert "Traceback" not in message
