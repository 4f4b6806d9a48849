"""Small pretrained models as transformers writes them, with a byte tokenizer and an experiment on a little text."""

import sys
from pathlib import Path

import torch
from torch import Tensor
from training_runs import make_experiment
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny_models import tiny

from skippipe.config.experiment_file import save_experiment
from skippipe.data.tokenizer import ByteTokenizer, save_for_transformers

SHORT = (
    "training.max_steps=2",
    "training.num_microbatches=2",
    "training.micro_batch_size=1",
    "pipeline.num_stages=2",
    "pipeline.skip_ratio=0.0",
    "pipeline.planner.max_evaluations=20",
)


def write_pretrained(folder: Path, architecture: str = "llama", **options: object) -> PreTrainedModel:
    """Write a model whose weights are far from their initial values, so that a mix-up shows."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny(architecture, **{"vocab_size": ByteTokenizer.vocab_size, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    save_for_transformers(make_experiment(folder.parent).data, ByteTokenizer(), folder)
    return model.eval()


def write_experiment(folder: Path) -> Path:
    """Write an experiment on the text in `folder`; return its file."""
    path = folder / "experiment.yaml"
    save_experiment(make_experiment(folder), path)
    return path


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    """Return what transformers computes with the files in a folder, (B, T, V)."""
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    return logits
