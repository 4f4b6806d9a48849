"""Every architecture from transformers to here and back, with tied and untied heads; see benchmarks/README.md.

    python benchmarks/architectures/run.py [--only NAME ...] [--out FOLDER]

A row takes a tiny model with random weights as `save_pretrained` writes it, imports it, exports it at once, trains two
steps, and exports it again.
"""

import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.extend(str(Path(__file__).resolve().parents[2] / "tests" / name) for name in ("", "huggingface", "model"))

import click
import torch
from pretrained_models import SHORT, logits_of, write_experiment, write_pretrained
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common.command import chosen, record
from common.table import MARKS, Columns, Result, machine
from skippipe.checkpoint.huggingface.export import export_run
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.checkpoint.huggingface.stored_tensors import INDEX_FILE
from skippipe.checkpoint.model_tensors import load_parameters
from skippipe.checkpoint.reader import latest_checkpoint
from skippipe.config.experiment_file import load_experiment
from skippipe.model.architecture import experiment_model, num_layers
from skippipe.model.architecture_traits import ARCHITECTURES
from skippipe.model.stage import build_stage
from skippipe.training.train_experiment import train_experiment

HERE = Path(__file__).resolve().parent
MOST_LOSS_DIFFERENCE = 1e-5
ROWS = {f"{name}, {head} head": (name, head == "tied") for name in ARCHITECTURES for head in ("tied", "untied")}
TEXT = torch.arange(2 * 24).reshape(2, 24) * 7919 % 257  # (B, T)

COLUMNS: Columns = {
    "architecture": lambda result: result["name"],
    "loss - transformers'": lambda result: f"{result['loss_difference']:.1e}",
    "files of the import, exported": lambda result: str(result["untouched"]),
    "files after two steps": lambda result: str(result["trained"]),
    "logits after two steps": lambda result: str(result["logits"]),
    "as promised": lambda result: MARKS[result["met"]],
}


@click.command()
@click.option("--only", multiple=True, help="Rows whose names contain this; may be repeated.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE, help="Folder of the results.")
def main(only: tuple[str, ...], out: Path) -> None:
    """Take every architecture there and back; write results.json and results.md."""

    def measured(name: str) -> Result:
        known: Result = {"name": name, "quick": False, "date": datetime.now(UTC).date().isoformat()}
        return known | machine(HERE.parents[1]) | measure(*ROWS[name])

    record(ROWS, chosen(ROWS, only), out, measured, ("Every architecture, there and back", COLUMNS))


def measure(architecture: str, tied: bool) -> Result:
    """Take one model there and back."""
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given, run, untouched, trained, again = (folder / name for name in ("given", "run", "once", "twice", "again"))
        write_pretrained(given, architecture, tie_word_embeddings=tied)
        import_model(given, run, config_path=write_experiment(folder), overrides=SHORT)
        export_run(run, untouched)
        found: Result = {"loss_difference": abs(loss_of(own_logits(run)) - loss_of(logits_of(given, TEXT)))}
        found["untouched"] = differences(untouched, given)
        train_experiment(load_experiment(run / "config.yaml"))
        export_run(run, trained)
        AutoModelForCausalLM.from_pretrained(trained).save_pretrained(again)
        found["trained"] = differences(trained, again)
        found["logits"] = "equal" if torch.equal(own_logits(run), logits_of(trained, TEXT)) else "differ"
    same = [found["untouched"], found["trained"], found["logits"]]
    met = found["loss_difference"] <= MOST_LOSS_DIFFERENCE and not any("differ" in each for each in same)
    return found | {"met": met}


@torch.no_grad()
def own_logits(run: Path) -> Tensor:
    """Return what the newest checkpoint of a run computes as one stage, (B, T, V)."""
    config, checkpoint = experiment_model(load_experiment(run / "config.yaml")), latest_checkpoint(run)
    assert checkpoint is not None
    layers = (0, num_layers(config))
    stage = build_stage(
        config, *layers, with_embedding_and_head=True, seed=9, device=torch.device("cpu"), dtype=torch.float32
    )
    load_parameters(checkpoint, config, [stage])
    stage.eval()
    return stage.logits(stage(stage.embed(TEXT)))


def loss_of(logits: Tensor) -> float:
    """Return the mean loss of the next tokens of the text."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten()))


def differences(ours: Path, theirs: Path) -> str:
    """Compare the files of a model in two folders: weights byte for byte, JSON by content."""
    names = sorted({path.name for folder in (ours, theirs) for path in folder.iterdir() if is_of_model(path)})
    differing = [name for name in names if content(ours / name) != content(theirs / name)]
    return f"{', '.join(differing)} differ" if differing else f"{len(names)} files equal"


def is_of_model(path: Path) -> bool:
    """Whether `save_pretrained` of a model writes the file; that of a tokenizer writes the others."""
    return path.suffix == ".safetensors" or path.name in ("config.json", "generation_config.json", INDEX_FILE)


def content(path: Path) -> object:
    """Return what a file says, None where there is none."""
    if not path.exists():
        return None
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


if __name__ == "__main__":
    main()
