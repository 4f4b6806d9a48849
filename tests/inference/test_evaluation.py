"""Evaluation of a run that was really trained, against a computation of its own with the plain model."""

import json
import math
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_runs import make_experiment, small_plan, train_alone
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.layer_choice import LayerChoice, read_choice
from skippipe.checkpoint.reader import latest_checkpoint
from skippipe.cli.commands.evaluate_command import evaluation_table
from skippipe.cli.commands.validate_command import validate_file
from skippipe.cli.main import main
from skippipe.data.samples import SampleOrder
from skippipe.data.token_cache import open_cache
from skippipe.errors import InputError, SkipPipeError
from skippipe.inference.depth_schedule import Segment
from skippipe.inference.evaluation import lm_eval_tasks as tasks
from skippipe.inference.evaluation.perplexity import PerplexityOptions, evaluate_model
from skippipe.inference.evaluation.question_kinds import KINDS
from skippipe.inference.generation.text_generation import TextOptions, generate_texts
from skippipe.inference.model_loading import load_model
from skippipe.inference.text_source import TextSource
from skippipe.model.architecture import experiment_model
from skippipe.monitor.evaluation_results import DepthResult, Evaluation
from skippipe.monitor.report.figures.curves import depth_figure

BATCHES = 3
CHOICE = {
    "format": "skippipe.choice/1",
    "model": "tiny",
    "checkpoint": "step-00000006",
    "policy": "best",
    "keep": 0.7,
    "share_computed": 0.5,
    "perplexity": 100.0,
    "num_layers": 6,
    "attention": [0, 2, 5],
    "feed_forward": [0, 2, 5],
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    train_alone(make_experiment(folder), small_plan())
    return folder / "run"


def evaluate(run_dir: Path, *policies: str, keep: float, **options: Any) -> Evaluation:
    chosen = PerplexityOptions(num_batches=BATCHES, **options)
    return evaluate_model(run_dir, policies=policies, keeps=[keep], options=chosen)


def result_of(run_dir: Path, policy: str, keep: float, **options: Any) -> DepthResult:
    return evaluate(run_dir, policy, keep=keep, **options).results[0]


def plain_losses(run_dir: Path, stages: Sequence[int]) -> list[float]:
    """Return the loss of each batch in a Hugging Face model whose layer list holds only the layers of `stages`."""
    experiment = make_experiment(run_dir.parent)
    model = LlamaForCausalLM(experiment_model(experiment))
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    weights: dict[str, Tensor] = {}
    for file in checkpoint.glob("model*.safetensors"):
        weights |= load_file(file)
    model.load_state_dict(weights, strict=True)
    layers = [small_plan().stages[stage].layers for stage in stages]
    model.model.layers = nn.ModuleList(model.model.layers[index] for span in layers for index in range(*span))
    order = SampleOrder(open_cache(experiment.data, experiment.seed), seed=experiment.seed, sequence_length=16)
    losses = []
    for index in range(BATCHES):
        input_ids, labels = order.validation_batch(index, experiment.training.micro_batch_size)
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
        losses.append(float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())))
    return losses


def test_full_depth_is_the_plain_model(run_dir: Path) -> None:
    result = result_of(run_dir, "full", 1.0)
    expected = math.exp(sum(plain_losses(run_dir, [0, 1, 2])) / BATCHES)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.kept_stages, result.share_computed, result.perplexity_std) == (3, 1.0, 0.0)


def test_random_stages_average_over_what_each_batch_drew(run_dir: Path) -> None:
    result = result_of(run_dir, "random", 0.67, repeats=40)
    possible = [plain_losses(run_dir, (0, *others)) for others in combinations((1, 2), 1)]
    lowest, highest = (sum(best(column) for column in zip(*possible, strict=True)) / BATCHES for best in (min, max))
    assert lowest < math.log(result.perplexity) < highest
    expected = sum(sum(losses) for losses in possible) / (len(possible) * BATCHES)
    assert math.log(result.perplexity) == pytest.approx(expected, abs=0.25 * (highest - lowest))
    assert result.share_computed == pytest.approx(2 / 3)
    assert result.samples == 40 * BATCHES
    assert json.loads((run_dir / "evaluation.json").read_text())["results"][0]["perplexity"] == result.perplexity


def test_a_policy_that_says_itself_how_much_runs_is_measured_once(run_dir: Path) -> None:
    policies = ["skipdecode:warm_up=1,min=2,max=4", "ffn-skip:threshold=0.5,warm_up=1", "skipdecode:max=6"]
    options = PerplexityOptions(num_batches=1)
    results = evaluate_model(run_dir, policies=policies, keeps=[1.0, 0.7], options=options).results
    assert [result.policy for result in results] == [*policies[:2], policies[2], policies[2]]
    assert results[0].keep == results[0].share_computed == pytest.approx(0.5, abs=0.02)
    assert results[1].keep == results[1].share_computed < 1


def test_results_of_a_run_that_cannot_be_written_are_there_all_the_same(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink(missing_ok=True)
    (tmp_path / "run" / "evaluation.json").mkdir()
    options = PerplexityOptions(num_batches=1)
    evaluation = evaluate_model(tmp_path / "run", policies=["full"], keeps=[1.0], options=options)
    assert evaluation.results[0].perplexity > 1
    assert "evaluation.json: cannot be written" in caplog.text
    assert "the results are not kept in the run" in caplog.text


def test_same_seed_same_numbers(run_dir: Path) -> None:
    first, again, other = (result_of(run_dir, "random", 0.67, repeats=2, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_named_stages_and_lost_nodes_need_no_share(run_dir: Path) -> None:
    lost = ",".join(small_plan().stages[1].nodes)
    named, left = evaluate(run_dir, "stages:0,2", f"without:{lost}", keep=1.0).results
    assert math.log(named.perplexity) == pytest.approx(sum(plain_losses(run_dir, [0, 2])) / BATCHES, rel=1e-5)
    assert (named.keep, named.share_computed, named.kept_stages) == pytest.approx((2 / 3, 2 / 3, 2))
    assert left.perplexity == named.perplexity


def test_share_counts_attention_over_earlier_positions(run_dir: Path) -> None:
    result = result_of(run_dir, "unified", 0.5, prompt_length=8)
    parameters = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    flop = [2 * parameters + 4 * 32 * (position + 1) for position in range(16)]
    assert result.share_computed == pytest.approx((sum(flop[:8]) + 0.5 * sum(flop[8:])) / sum(flop), rel=1e-6)
    assert result.kept_layers == pytest.approx(4.5)
    assert evaluate(run_dir, "full", keep=1.0, prompt_length=8).tokens == BATCHES * 2 * 8


def test_other_text_and_other_stages(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("some words that were not trained on, again and again\n" * 4)
    result = result_of(run_dir, "exit", 0.5, text=(tmp_path / "words.txt",), num_stages=6)
    assert (result.kept_layers, result.samples) == (3, BATCHES)
    assert result_of(run_dir, "random", 0.5, num_stages=6).kept_stages == 3


def test_command_prints_one_json_object(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), "--batches", "2", "--json", "--keep", "1.0", "0.67"])
    assert not stop.value.code
    printed = json.loads(capsys.readouterr().out)
    assert [row["kept_stages"] for row in printed["results"]] == [3, 2]


def test_changes_are_relative_to_full_depth_in_any_order_where_it_was_evaluated(run_dir: Path) -> None:
    def changes(*keeps: float) -> list[str]:
        evaluation = evaluate_model(run_dir, policies=["random"], keeps=keeps, options=PerplexityOptions(num_batches=1))
        return [line.split()[-1] for line in [*evaluation_table(evaluation)][2:]]

    part, whole = changes(0.67, 1.0)
    assert whole == "+0.0%"
    assert part == changes(1.0, 0.67)[1] != whole
    assert changes(0.67) == ["-"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--keep", "0.1"], "the smallest share is 0.33"),
        (["--keep", "1.5"], "expected a share above 0"),
        (["--keep", "--batches", "1"], "expected numbers such as 1.0 0.67 0.5"),
        (["--policy", "--batches", "1"], "expected at least one word after it"),
        (["--policy", "unifed"], "did you mean 'unified'"),
        (["--prompt-length", "16"], "one has to be left"),
        (["--sequence-length", "9999"], "context is 2048"),
        (["--stages", "7"], "the model has 6 layers"),
        (["--policy", "without:nobody"], "no node 'nobody'"),
        (["--device", "toaster"], "'toaster' is not one of"),
        (["--limit", "3"], "--limit is for tasks: give --lm-eval-tasks NAME"),
    ],
)
def test_mistakes(run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in message
    assert "Traceback" not in message


def test_missing_library_of_tasks_is_named_with_the_remedy(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), "--lm-eval-tasks", "arc_easy"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("missing; pip install 'skippipe[lm-eval]'")


def test_truncated_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_alone(make_experiment(tmp_path, training={"max_steps": 1}), small_plan())
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    damaged = next(iter(checkpoint.glob("model*.safetensors")))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert damaged.name in message
    assert "Traceback" not in message


def test_run_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SkipPipeError, match="not a run directory"):
        evaluate_model(tmp_path, policies=["full"], keeps=[1.0])


def test_no_held_out_sample_is_measured_twice(run_dir: Path) -> None:
    model = load_model(run_dir, device="cpu")
    source = TextSource(model)
    available = source.order.num_samples["validation"]
    order = [source.order.validation_batch(index, 1)[0] for index in range(available)]
    for source.batch_size in (available // 2 + 1, 2, available, available + 3):
        size = min(source.batch_size, available)
        whole = available // size * size
        batches = source.validation_batches(available + 9)
        assert torch.equal(torch.cat([input_ids for input_ids, _ in batches]), torch.cat(order[:whole]))
        assert {len(input_ids) for input_ids, _ in batches} == {size}
    options = PerplexityOptions(num_batches=available)
    found = evaluate_model(run_dir, policies=["full"], keeps=[1.0], options=options)
    assert found.tokens == available // 2 * 2 * source.sequence_length


def test_exported_directory_gives_the_same_numbers_and_text(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = tmp_path / "exported", tmp_path / "words.txt"
    export_run(run_dir, folder)
    text.write_text("some words that were not trained on, again and again\n" * 8)
    of_run = evaluate_model(
        run_dir, policies=["exit"], keeps=[0.5], options=PerplexityOptions(num_batches=3, text=(text,))
    )
    options = PerplexityOptions(num_batches=6, text=(text,), sequence_length=16)
    of_folder = evaluate_model(folder, policies=["exit"], keeps=[0.5], options=options)
    assert of_folder.results[0].perplexity == pytest.approx(of_run.results[0].perplexity, rel=1e-6)
    assert not (folder / "evaluation.json").exists()
    printed = []
    for place in (run_dir, folder):
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(place), "--prompt", "line 3", "--max-new-tokens", "6"])
        assert not stop.value.code
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def saved(run_dir: Path, policy: str, path: Path) -> tuple[DepthResult, LayerChoice]:
    return result_of(run_dir, policy, 0.7, save_choice=path), read_choice(path)


def test_a_saved_choice_runs_everywhere(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "choice.json", tmp_path / "smaller"
    result, choice = saved(run_dir, "best", path)
    assert (choice.policy, choice.keep, len(choice.attention)) == ("best", 0.7, 4)
    assert choice.perplexity == result.perplexity
    assert choice.share_computed == pytest.approx(4 / 6)
    again = result_of(run_dir, f"file:{path}", 1.0)
    assert (again.perplexity, again.layers) == (result.perplexity, result.layers)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run_dir), str(folder), "--choice", str(path)])
    assert not stop.value.code
    assert validate_file(path) == "choice"
    smaller = AutoModelForCausalLM.from_pretrained(folder)
    assert smaller.config.num_hidden_layers == 4
    model = load_model(run_dir)
    tokens = torch.arange(12).unsqueeze(0)
    with torch.inference_mode():
        logits = model.decoder.logits(tokens, [Segment(choice.attention, 12)])
        torch.testing.assert_close(smaller(input_ids=tokens).logits, logits, rtol=1e-5, atol=1e-6)
    texts = [
        generate_texts(load_model(place), ["line 3"], TextOptions(policy=policy, max_new_tokens=6)).texts
        for place, policy in ((run_dir, f"file:{path}"), (folder, "full"))
    ]
    assert texts[0] == texts[1]
    drafted = generate_texts(model, ["line 3"], TextOptions(policy=f"file:{path}", max_new_tokens=6, num_drafted=2))
    assert drafted.texts == generate_texts(model, ["line 3"], TextOptions(max_new_tokens=6)).texts
    with pytest.raises(InputError, match="chosen for a model of 6 layers"):
        evaluate_model(folder, policies=[f"file:{path}"], keeps=[1.0], options=PerplexityOptions(sequence_length=16))


def test_a_choice_of_halves_is_no_smaller_model(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    result, choice = saved(run_dir, "best:halves,tries=0,width=1", path)
    path.write_text(choice.model_copy(update={"feed_forward": choice.feed_forward[1:]}).model_dump_json())
    assert result_of(run_dir, f"file:{path}", 1.0).share_computed < result.share_computed
    with pytest.raises(InputError, match="but whole layers are needed here"):
        export_run(run_dir, tmp_path / "smaller", choice=path)
    assert not (tmp_path / "smaller").exists()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"attention": [2, 1]}, "not in rising order"),
        ({"feed_forward": [6]}, "there is no layer 6"),
        ({"attention": [], "feed_forward": []}, "nothing runs"),
        ({"keep": 2.0}, "keep"),
        ({"extra": 1}, "extra"),
        ({"format": "skippipe.choice/2"}, "format"),
    ],
)
def test_a_damaged_choice_is_refused(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    path = tmp_path / "choice.json"
    path.write_text(json.dumps(CHOICE | changed))
    with pytest.raises(InputError, match=expected):
        read_choice(path)


def test_questions_are_answered_beside_the_perplexity(run_dir: Path) -> None:
    evaluation = evaluate(run_dir, "full", "exit", keep=0.5, questions=1)
    assert [(row.task, row.policy, row.documents) for row in evaluation.tasks] == [
        (kind, policy, 1) for policy in ("full", "exit") for kind in KINDS
    ]
    assert {row.share_computed for row in evaluation.tasks} == {1.0, 0.5}


def test_only_one_choice_of_layers_is_saved(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    for policies, expected in {
        ("exit", "unified"): "2 choices are evaluated here",
        ("skipdecode",): "does not run the same layers",
        ("random",): "does not run the same layers",
        ("stages:0,2,1",): "in another order",
    }.items():
        with pytest.raises(InputError, match=expected):
            evaluate(run_dir, *policies, keep=0.67, save_choice=path)
    assert not path.exists()


def test_several_policies_make_one_table_and_one_picture(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = ["full", "best", "skipdecode", "ffn-skip"]
    page, result = tmp_path / "depth.html", tmp_path / "result.json"
    arguments = [str(run_dir), "--batches", "1", "--policy", *policies, "--keep", "1.0", "0.8"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments, "--plot", str(page), "--out", str(result), "--show-layers"])
    assert not stop.value.code
    table = capsys.readouterr().out
    drawn = {tuple(line.split()[:2]): line.split()[2:] for line in table.split("layers from 0 on")[1].splitlines()[1:]}
    assert drawn["full", "1.00"] == ["######", "-"]
    assert ("full", "0.80") not in drawn  # the same once more
    assert drawn["best", "0.80"][0].count("#") in (4, 5), "it may run less than was asked for where that is better"
    assert drawn["skipdecode", "0.80"] == ["#++###", "-"]
    assert drawn["ffn-skip", "0.80"] == ["##~~~#", "-"]
    assert all(f"\n{policy} " in table for policy in policies)
    evaluation = Evaluation.model_validate_json(result.read_text())
    assert evaluation == Evaluation.model_validate_json((run_dir / "evaluation.json").read_text())
    whole = {rows[0].perplexity for rows in evaluation.by_policy().values()}
    assert len(whole) == 1, "all policies are the same model at full depth"
    lines = depth_figure({"run": evaluation}).data
    assert [line.name for line in lines] == policies
    assert [len(line.x) for line in lines] == [1, 2, 2, 2]
    assert all(policy in page.read_text() for policy in policies)
