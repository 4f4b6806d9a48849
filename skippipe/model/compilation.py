"""torch.compile for a stage: its layers, one by one and alike, and the head with its loss.

Layers are compiled singly because equal ones then share one compiled piece of code, however many there are, and because
activation checkpointing wraps a layer from outside.
"""

import os
import shutil

import torch

from skippipe.errors import ConfigError
from skippipe.model.activations.activation_checkpointing import Mode, enable
from skippipe.model.stage import Stage


def check_compilable(device: torch.device, mode: Mode) -> None:
    """Raise `ConfigError` where stages cannot be compiled here: without a compiler, or with selective checkpointing."""
    if mode == "selective":
        raise ConfigError(
            "training.compile with training.activation_checkpointing: selective: a compiled layer is one operation, of "
            "which no part can be kept; use full or none, or turn compile off"
        )
    wanted = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    if shutil.which(wanted) is None:
        raise ConfigError(
            f"training.compile: torch.compile needs the C++ compiler {wanted!r}, which is not on the PATH of this "
            "machine; install it (Debian: apt-get install g++), name another in CXX, or set training.compile to false"
        )


def make_ready(stage: Stage, mode: Mode, device: torch.device, compiled_for: tuple[int, int, int] | None) -> None:
    """Let a stage run as its experiment says: with checkpointed activations, and compiled where a shape is given."""
    enable(stage, mode)
    if compiled_for is not None:
        compile_stage(stage)
        warm_up(stage, compiled_for, device)


def compile_stage(stage: Stage, backend: str = "inductor") -> None:
    """Let the stage's layers and its loss run compiled, for one shape of activations."""
    for layer in stage.layers:
        layer.compile(dynamic=False, backend=backend)
    if stage.with_embedding_and_head:
        # type: a method of this one stage is replaced, which is what compiling it alone means
        stage.loss = torch.compile(stage.loss, dynamic=False, backend=backend)  # type: ignore[method-assign]


def warm_up(stage: Stage, shape: tuple[int, int, int], device: torch.device) -> None:
    """Run everything once on zeros of `shape` (B, T, D), in training and in evaluation, so that all is compiled.

    No gradient and no state of the random generators is left behind.
    """
    dtype = next(stage.parameters()).dtype
    labels = torch.zeros(shape[:2], dtype=torch.int64, device=device)  # (B, T)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for training in (False, True):
            stage.train(training)
            with torch.set_grad_enabled(training):
                hidden = torch.zeros(shape, dtype=dtype, device=device, requires_grad=training)
                output = stage(hidden)
                loss = (
                    stage.loss(torch.zeros_like(hidden, requires_grad=training), labels)
                    if stage.with_embedding_and_head
                    else None
                )
            if training:
                torch.autograd.backward(output, torch.zeros_like(output))
                if loss is not None:
                    torch.autograd.backward(loss)
    stage.zero_grad(set_to_none=True)
