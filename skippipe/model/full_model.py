"""The plain Hugging Face model with the same initial weights as the stages: the reference, and the way out."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from skippipe.errors import CheckpointError
from skippipe.model.skeleton import build_skeleton, materialise
from skippipe.model.stage import Stage, copy_tensors


def build_full(
    config: PretrainedConfig, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the whole model; every parameter equals the one that `build_stage` makes for the same seed."""
    skeleton = build_skeleton(config, dtype)
    materialise(skeleton, range(config.num_hidden_layers), with_embedding_and_head=True, seed=seed, device=device)
    return skeleton.model


def stages_to_full(
    config: PretrainedConfig, stages: Iterable[Stage], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the whole model on the CPU with a copy of the weights of `stages`, in any order.

    Raises `CheckpointError` where two stages hold the same parameter or one is held by none.
    """
    tensors: dict[str, Tensor] = {}
    for stage in stages:
        for name, tensor in stage.state_dict_global().items():
            if name in tensors:
                raise CheckpointError(f"{name}: held by two stages")
            tensors[name] = tensor
    model = build_full(config, 0, torch.device("cpu"), dtype)
    copy_tensors(tensors, dict(model.named_parameters()))
    return model
