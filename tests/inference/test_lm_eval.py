"""Tasks of lm-eval from local files, under every policy, against likelihoods computed with the plain model."""

import json
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from training_runs import make_experiment, small_plan, train_alone
from transformers import LlamaForCausalLM

from skippipe.checkpoint.huggingface.export import export_run
from skippipe.cli.main import main
from skippipe.errors import InputError
from skippipe.inference.depth_schedule import flop_of
from skippipe.inference.model_loading import load_model
from skippipe.inference.policies.base import FixedLayers, PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.inference.policies.registry import OWN
from skippipe.inference.prompt_tokenizer import PromptTokenizer
from skippipe.model.layer_halves import index_of

pytest.importorskip("lm_eval", reason="lm-eval takes long to install and is no part of the extra `test`")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from skippipe.inference.evaluation.lm_eval_adapter import PolicyModel

QUESTIONS: list[dict[str, Any]] = [
    {"question": "line 3 of text", "choices": [" 4 has", " has 4", " 4 words"], "answer": 0},
    {"question": "has 12 words", "choices": ["\nline", " line 9 of", "x"], "answer": 1},
    {"question": "", "choices": ["line 1", "words of 1"], "answer": 1},
]
FULL = [0, 1, 2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    train_alone(make_experiment(folder), small_plan())
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in QUESTIONS))
    kinds: dict[str, dict[str, Any]] = {
        "choosing": {"output_type": "multiple_choice", "doc_to_choice": "choices"},
        "likelihood": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{choices[answer]}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}{{choices[0]}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        "writing": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n", "4"], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, kind in kinds.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "target_delimiter": "",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | kind))
    (folder / "both.yaml").write_text(
        yaml.safe_dump(
            {
                "group": "both",
                "task": ["choosing", "likelihood"],
                "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
            }
        )
    )
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def evaluate(
    capsys: pytest.CaptureFixture[str], run_dir: Path, *names: object, **options: Any
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the rows of the tasks by task, policy and metric."""
    words = {"policy": "full", "keep": "1.0", "batches": "1"} | options
    arguments = [part for key, value in words.items() for part in (f"--{key.replace('_', '-')}", *str(value).split())]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), *arguments, "--json", "--lm-eval-tasks", *map(str, names)])
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    found = json.loads(printed.out)
    assert found == json.loads((run_dir / "evaluation.json").read_text())
    return {(row["task"], row["policy"], row["metric"]): row for row in found["tasks"]}


class Plain:
    """The run's weights in a Hugging Face model whose layer list holds only the layers of some stages."""

    def __init__(self, run_dir: Path, stages: Sequence[int]) -> None:
        loaded = load_model(run_dir, device="cpu").decoder
        self.model = LlamaForCausalLM(loaded.config).eval()
        self.model.load_state_dict(loaded.skeleton.model.state_dict())
        layers, spans = self.model.model.layers, [small_plan().stages[stage].layers for stage in stages]
        self.model.model.layers = nn.ModuleList(layers[index] for span in spans for index in range(*span))

    @torch.no_grad()
    def log_likelihood(self, context: str, continuation: str) -> float:
        """Sum over the bytes of the continuation, each predicted from all before it; 256 stands before a text."""
        tokens = [*(context.encode() or [256]), *continuation.encode()]
        total = 0.0
        for end in range(len(tokens) - len(continuation.encode()), len(tokens)):
            logits = self.model(input_ids=torch.tensor([tokens[:end]]), use_cache=False).logits[0, -1]
            total += float(logits.double().log_softmax(dim=-1)[tokens[end]])
        return total

    @torch.no_grad()
    def write(self, text: str, count: int) -> str:
        tokens = list(text.encode()) or [256]
        for _ in range(count):
            tokens.append(int(self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        return bytes(token for token in tokens if token < 256).decode(errors="replace")[len(text) :]


@pytest.mark.parametrize(("policy", "stages"), [("full", FULL), ("stages:0,2", [0, 2])])
def test_results_are_those_of_the_plain_model(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path, policy: str, stages: list[int]
) -> None:
    names = [tasks / f"{name}.yaml" for name in ("choosing", "likelihood", "rolling")]
    rows = evaluate(capsys, run_dir, *names, policy=policy, batch_size=2)
    plain = Plain(run_dir, stages)
    right = sums = 0.0
    for entry in QUESTIONS:
        likely = [plain.log_likelihood(entry["question"], choice) for choice in entry["choices"]]
        right += likely.index(max(likely)) == entry["answer"]
        sums += likely[entry["answer"]]
    assert rows["choosing", policy, "acc"]["value"] == pytest.approx(right / 3)
    assert rows["likelihood", policy, "perplexity"]["value"] == pytest.approx(math.exp(-sums / 3), rel=1e-4)
    texts = [entry["question"] + entry["choices"][0] for entry in QUESTIONS]
    of_byte = sum(plain.log_likelihood("", text) for text in texts) / sum(len(text.encode()) for text in texts)
    assert rows["rolling", policy, "byte_perplexity"]["value"] == pytest.approx(math.exp(-of_byte), rel=1e-4)
    assert {row["documents"] for row in rows.values()} == {3}
    assert [row["share_computed"] for row in rows.values()] == pytest.approx([len(stages) / 3] * len(rows))


def test_what_is_written_ends_at_the_first_stop(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Plain(run_dir, FULL)
    said = [plain.write(entry["question"], 5) for entry in QUESTIONS]
    stop = said[0][3]
    expected = [text.split(stop)[0] for text in said]
    data = tasks / "said.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": entry["question"], "said": text}) + "\n"
            for entry, text in zip(QUESTIONS, expected, strict=True)
        )
    )
    task = yaml.safe_load((tasks / "writing.yaml").read_text())
    task |= {"task": "said", "doc_to_target": "{{said}}", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task["generation_kwargs"]["until"] = [stop]
    (tasks / "said.yaml").write_text(yaml.safe_dump(task))
    rows = evaluate(capsys, run_dir, tasks / "said.yaml", batch_size=2)
    assert rows["said", "full", "exact_match"]["value"] == 1.0


def test_every_policy_runs_every_kind_of_task(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path, tmp_path: Path
) -> None:
    choice = tmp_path / "choice.json"
    with pytest.raises(SystemExit):
        main(["evaluate", str(run_dir), "--policy", "best", "--keep", "0.8", "--save-choice", str(choice)])
    capsys.readouterr()
    lost = ",".join(small_plan().stages[1].nodes)
    policies = ["full", "random", "stages:0,2,1", f"without:{lost}", "best", "best:gradient", "exit", "unified"]
    policies += ["skipdecode", "ffn-skip", f"file:{choice}"]
    assert {policy.partition(":")[0] for policy in policies} == {entry.name for entry in OWN}
    chosen = {"policy": " ".join(policies), "keep": "0.8", "include_path": tasks, "num_fewshot": 1}
    rows = evaluate(capsys, run_dir, "both", "rolling", "writing", **chosen)
    assert {policy for _, policy, _ in rows} == set(policies)
    assert {task for task, _, _ in rows} == {"both", "choosing", "likelihood", "rolling", "writing"}
    for policy in policies:
        of_group = rows["both", policy, "acc"]
        assert of_group["value"] == rows["choosing", policy, "acc"]["value"]
        assert 0.5 < of_group["share_computed"] <= 1.0
        assert (rows["writing", policy, "exact_match"]["share_computed"] == 1) == (policy in ("full", "stages:0,2,1"))
    assert rows["rolling", "skipdecode", "byte_perplexity"]["share_computed"] == pytest.approx(0.8, abs=0.05)


def test_tasks_run_with_what_absent_nodes_leave(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path, tmp_path: Path
) -> None:
    words = [part for node in small_plan().stages[1].nodes for part in ("--absent", node)]
    words += ["--policy", "full", "--keep", "1.0", "--batches", "1", "--json", "--out", str(tmp_path / "found.json")]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), *words, "--lm-eval-tasks", str(tasks / "rolling.yaml")])
    assert not stop.value.code
    absent = json.loads((tmp_path / "found.json").read_text())["tasks"][0]
    capsys.readouterr()
    rows = evaluate(capsys, run_dir, tasks / "rolling.yaml", policy="stages:0,2")
    left = rows["rolling", "stages:0,2", "byte_perplexity"]
    assert (absent["metric"], absent["policy"]) == ("byte_perplexity", "full")
    assert absent["value"] == pytest.approx(left["value"])
    assert absent["share_computed"] == left["share_computed"] == pytest.approx(2 / 3)


def test_draws_go_by_document_whatever_the_batch(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path
) -> None:
    policy = build_policy("random", PolicyContext(load_model(run_dir, device="cpu").decoder, 0.67, seed=2))
    stages = [[0, index_of(policy.sample(number).layers_at(0, 0)[-1]) // 2] for number in range(3)]
    assert {drawn[1] for drawn in stages} == {1, 2}
    plain = [Plain(run_dir, drawn) for drawn in stages]
    texts = [entry["question"] + entry["choices"][0] for entry in QUESTIONS]
    likely = sum(model.log_likelihood("", text) for model, text in zip(plain, texts, strict=True))
    expected = math.exp(-likely / sum(len(text.encode()) for text in texts))
    for batch_size in (1, 3):
        options = {"policy": "random", "keep": "0.67", "seed": 2, "batch_size": batch_size}
        rows = evaluate(capsys, run_dir, tasks / "rolling.yaml", **options)
        assert rows["rolling", "random", "byte_perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    limited = evaluate(capsys, run_dir, tasks / "rolling.yaml", limit=1)
    assert limited["rolling", "full", "byte_perplexity"]["documents"] == 1


def test_long_texts_are_cut_from_the_left_or_measured_in_windows(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path
) -> None:
    model = load_model(run_dir, device="cpu")
    model.decoder.config.max_position_embeddings = 8
    adapter = PolicyModel(model.decoder, PromptTokenizer(model), FixedLayers(model.decoder.all_layers), batch_size=2)
    plain = Plain(run_dir, FULL)
    plain.model.config.max_position_embeddings = 8
    text = "line 12 of text 3 has"
    (found,) = adapter.loglikelihood([Instance("loglikelihood", {}, (text, " 36 "), 0, ("a", 0, 1))])
    assert found[0] == pytest.approx(plain.log_likelihood(text[-5:], " 36 "), abs=1e-4)
    (rolled,) = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("a", 0, 1))])
    windows = [("", text[:8]), (text[7], text[8:16]), (text[12:16], text[16:])]
    assert rolled == pytest.approx(sum(plain.log_likelihood(*window) for window in windows), abs=1e-3)
    (said,) = adapter.generate_until([Instance("generate_until", {}, (text, {"max_gen_toks": 3}), 0, ("a", 0, 1))])
    assert said == plain.write(text[-5:], 3)
    with pytest.raises(InputError, match="task a, document 0: the continuation 'line 12 of text 3 has' has 21 tokens"):
        adapter.loglikelihood([Instance("loglikelihood", {}, ("x", text), 0, ("a", 0, 1))])
    with pytest.raises(InputError, match="task a: generates 8 tokens, the model's context is 8"):
        adapter.generate_until([Instance("generate_until", {}, (text, {"max_gen_toks": 8}), 0, ("a", 0, 1))])
    with pytest.raises(InputError, match=r"'num_beams': 4.* is not supported"):
        adapter.generate_until([Instance("generate_until", {}, (text, {"num_beams": 4}), 0, ("a", 0, 1))])


def test_a_depth_is_spread_over_what_is_read_of_an_answer(run_dir: Path) -> None:
    model = load_model(run_dir, device="cpu")
    policy = build_policy("skipdecode", PolicyContext(model.decoder, 0.5))
    adapter = PolicyModel(model.decoder, PromptTokenizer(model), policy, batch_size=1)
    adapter.generate_until([Instance("generate_until", {}, ("line", {"max_gen_toks": 4}), 0, ("a", 0, 1))])
    layers_of = [policy.for_length(3).layers_at(position, 4) for position in range(4 + 3)]
    expected = flop_of(layers_of, model.decoder.num_layers, model.decoder.cost)
    assert adapter.flop["a"].share == pytest.approx(expected.share, rel=1e-9)


def test_full_depth_is_what_lm_evals_own_model_says(run_dir: Path, tmp_path: Path) -> None:
    export_run(run_dir, tmp_path / "exported")
    theirs = HFLM(str(tmp_path / "exported"), device="cpu", batch_size=2, max_length=32)
    model = load_model(run_dir, device="cpu")
    model.decoder.config.max_position_embeddings = 32
    ours = PolicyModel(model.decoder, PromptTokenizer(model), FixedLayers(model.decoder.all_layers), batch_size=2)
    texts: list[tuple[str, str]] = [(question["question"], question["choices"][0]) for question in QUESTIONS]
    texts.append(("a long text, " * 5 + " ", "and its end"))
    pairs = [Instance("loglikelihood", {}, text, 0, ("a", 0, 1)) for text in texts]
    for found, expected in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        assert found[1] == expected[1]
    whole = [Instance("loglikelihood_rolling", {}, ("".join(text),), 0, ("a", 0, 1)) for text in texts]
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-3)
    asked = {"until": ["3"], "max_gen_toks": 6, "do_sample": False}
    begun = [Instance("generate_until", {}, (text, dict(asked)), 0, ("a", 0, 1)) for text, _ in texts if text]
    assert ours.generate_until(begun) == theirs.generate_until(begun)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("arc_eazy", None, "no task or file 'arc_eazy'; did you mean 'arc_easy'?"),
        ("broken.yaml", "task: [", "broken.yaml: cannot be loaded"),
        ("lost.yaml", "data_files: {test: nowhere.jsonl}", "lost.yaml: cannot be loaded (Unable to find"),
    ],
)
def test_mistakes_end_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path, name: str, content: str | None, expected: str
) -> None:
    if content is not None:
        task = yaml.safe_load((tasks / "rolling.yaml").read_text()) if content.startswith("data_files") else {}
        changed = yaml.safe_dump(task | {"dataset_kwargs": yaml.safe_load(content)}) if task else content
        (tasks / name).write_text(changed)
        name = str(tasks / name)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run_dir), "--lm-eval-tasks", name])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert expected in printed.err
    assert "Traceback" not in printed.err
    assert "perplexity" not in printed.out


def test_table_has_a_row_for_each_metric(capsys: pytest.CaptureFixture[str], run_dir: Path, tasks: Path) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", str(run_dir), "--keep", "1.0", "0.67", "--lm-eval-tasks", str(tasks / "choosing.yaml")])
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split()[:5] for line in table[1:]] == [
        ["choosing", "random", keep, share, metric]
        for keep, share in (("1.00", "100.0%"), ("0.67", "66.7%"))
        for metric in ("acc", "acc_norm")
    ]
