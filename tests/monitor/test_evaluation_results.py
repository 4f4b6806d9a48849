"""evaluation.json, written and read back, and those that earlier versions wrote."""

import json
from pathlib import Path

import pytest

from skippipe.errors import InputError, SkipPipeError
from skippipe.monitor.evaluation_results import DepthResult, Evaluation, TaskResult, read_evaluation, write_evaluation

OF_BEFORE = """{
 "model": "tiny",
 "checkpoint": "step-00000003",
 "tokens": 96,
 "policies": [
  "exit"
 ],
 "results": [
  {
   "policy": "exit",
   "keep": 0.5,
   "kept_stages": null,
   "kept_layers": 2.0,
   "share_computed": 0.5,
   "perplexity": 300.25,
   "perplexity_std": 0.0,
   "samples": 24
  }
 ]
}
"""
"""As the version wrote it that brought policies: without tasks, and before stages could be absent."""
TASK = TaskResult(
    task="riddles",
    policy="exit",
    keep=0.5,
    share_computed=0.6,
    metric="acc",
    value=0.25,
    standard_error=None,
    documents=4,
)


def test_a_file_of_before_is_read(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(OF_BEFORE)
    result = DepthResult(
        policy="exit",
        keep=0.5,
        kept_stages=None,
        kept_layers=2.0,
        share_computed=0.5,
        perplexity=300.25,
        perplexity_std=0.0,
        samples=24,
    )
    assert read_evaluation(path) == Evaluation(
        model="tiny", checkpoint="step-00000003", tokens=96, policies=["exit"], results=[result]
    )


def test_what_is_written_is_read_back_and_keeps_the_form_of_before(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(OF_BEFORE)
    evaluation = read_evaluation(path)
    write_evaluation(evaluation, path)
    came_later = OF_BEFORE.replace(" ]\n}\n", ' ],\n "absent_stages": [],\n "tasks": []\n}\n')
    assert path.read_text() == came_later.replace('"samples": 24\n', '"samples": 24,\n   "layers": ""\n')
    whole = evaluation.model_copy(update={"absent_stages": [2], "tasks": [TASK]})
    write_evaluation(whole, path)
    assert read_evaluation(path) == whole


@pytest.mark.parametrize(("key", "value"), [("perplexity", "low"), ("samples", None), ("share_computed", None)])
def test_a_wrong_result_is_named(tmp_path: Path, key: str, value: str | None) -> None:
    content = json.loads(OF_BEFORE)
    content["results"][0][key] = value
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"evaluation\.json: results\.0\.{key}"):
        read_evaluation(path)


def test_storage_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    evaluation = Evaluation(model="tiny", checkpoint="", tokens=0, policies=[], results=[])
    with pytest.raises(SkipPipeError, match="cannot be written"):
        write_evaluation(evaluation, tmp_path / "file" / "evaluation.json")


def test_results_of_a_policy_that_is_not_named_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(OF_BEFORE.replace('"policy": "exit"', '"policy": "exits"'))
    with pytest.raises(InputError, match=r"evaluation\.json: .*results: 'exits' is none of the policies \(exit\)"):
        read_evaluation(path)
