"""The plain Hugging Face model with the same initial weights as the stages: the reference, and the way out."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from skippipe.model.skeleton import build_skeleton, materialise


def build_full(
    config: PretrainedConfig, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the whole model; every parameter equals the one that `build_stage` makes for the same seed."""
    skeleton = build_skeleton(config, dtype)
    materialise(skeleton, range(config.num_hidden_layers), ends=True, seed=seed, device=device)
    return skeleton.model
