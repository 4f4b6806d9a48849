"""Activation checkpointing: what a layer keeps between its forward and its backward, and what it computes again.

| mode | kept | computed again |
|---|---|---|
| none | all that autograd saves | nothing |
| selective | results of matrix products and of attention | norms, activation functions, rotations |
| full | the layer's input | the layer |

The gradients are the same to the bit in all of them.
"""

from functools import partial
from typing import Literal, get_args

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from skippipe.errors import ConfigError
from skippipe.model.stage import Stage

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)

_aten = torch.ops.aten
KEPT = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)
"""The operations whose results are worth their memory: most of a layer's FLOP."""


def enable(stage: Stage, mode: Mode) -> None:
    """Let the stage's layers checkpoint their activations in training.

    Raises `ConfigError` where the architecture's layers cannot.
    """
    if mode == "none":
        return
    options: dict[str, object] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(KEPT))
    # transformers renamed the method; the old name warns where the new one is there.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    switch_on = next(getattr(stage.body, name) for name in names if hasattr(stage.body, name))
    try:
        switch_on(options)
    except ValueError as reason:
        raise ConfigError(f"training.activation_checkpointing: {mode}: {reason}; use none") from None
