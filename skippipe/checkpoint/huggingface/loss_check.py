"""Whether a model that was read computes, cut into stages, what it computes in transformers."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from skippipe.errors import InputError
from skippipe.model.architecture import LONGEST_CONTEXT, num_layers
from skippipe.model.skeleton import build_skeleton
from skippipe.model.stage import Stage

TEXT_TOKENS = 32
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}
HALF_TOLERANCE = 1e-2
"""Of losses in bfloat16 and float16."""


@torch.inference_mode()
def check_same_loss(config: PretrainedConfig, model: PreTrainedModel, where: Path) -> None:
    """Raise `InputError`, beginning with `where`, where the stages of `config` give another loss than `model`.

    The stages get the weights of `model` without a copy. The text is a few tokens from all over the vocabulary.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(TEXT_TOKENS, int(getattr(config, LONGEST_CONTEXT)))
    ids = (torch.arange(length + 1) * 7919 % vocabulary).unsqueeze(0)  # (1, T + 1)
    text, labels = ids[:, :-1], ids[:, 1:]
    stage = _whole_stage(config, model)
    ours = stage.loss(stage(stage.embed(text)), labels)
    logits: Tensor = model.eval()(input_ids=text, use_cache=False).logits.float()  # (1, T, V)
    theirs = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE) * max(1.0, float(theirs.abs()))
    if not torch.allclose(ours, theirs, rtol=0.0, atol=tolerance, equal_nan=True):
        raise InputError(
            f"{where}: cut into stages, the model has loss {float(ours):.5f} on a short text, {float(theirs):.5f} in "
            "transformers; it cannot be trained here as it is configured"
        )


def _whole_stage(config: PretrainedConfig, model: PreTrainedModel) -> Stage:
    """Return all layers of `config` as one stage with the weights of `model`."""
    skeleton = build_skeleton(config, model.dtype)
    for module in skeleton.model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            skeleton.model._init_weights(module)
    skeleton.model.load_state_dict(model.state_dict(), assign=True)
    skeleton.model.eval()
    return Stage(skeleton, 0, num_layers(config), with_embedding_and_head=True)
