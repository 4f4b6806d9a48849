"""What a microbatch keeps in a stage and what a task takes besides: asked of autograd itself, on fake tensors.

A stage of one and one of two equal layers run forward and backward; the difference is what one layer keeps. Shapes,
dtype, attention and activation checkpointing are the run's. Parameters and their gradients are not counted, a task's
temporary gradients are.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from skippipe.config.lora_options import LoraOptions
from skippipe.model.activations.activation_checkpointing import Mode, enable
from skippipe.model.activations.live_memory import LiveMemory
from skippipe.model.architecture import config_to_json
from skippipe.model.linear.lora import add_adapters
from skippipe.model.skeleton import Skeleton, build_skeleton, shortened
from skippipe.model.stage import Stage


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes for one microbatch; layers are averaged over the kinds that the model has."""

    layer_bytes: int
    """What each layer keeps between forward and backward."""
    stage_bytes: int
    """What a stage keeps besides, whatever its layers: the received input, the output, rotations and masks."""
    embedding_and_head_bytes: int
    """What an origin keeps more: the samples, what the embedding saves."""
    working_bytes: int
    """What a forward or backward takes at its peak, over what is kept."""
    embedding_and_head_working_bytes: int
    """The same for an origin, where embedding, head and loss take part."""


@dataclass(frozen=True)
class _Trace:
    kept_bytes: int
    working_bytes: int


@dataclass(frozen=True)
class ActivationCase:
    """What the activation memory of a microbatch depends on."""

    config: PretrainedConfig
    micro_batch_size: int
    sequence_length: int
    dtype: torch.dtype
    mode: Mode
    lora: LoraOptions = field(default_factory=LoraOptions)

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and tokens of each, (B, T)."""
        return self.micro_batch_size, self.sequence_length

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others."""
        return config_to_json(self.config), self.shape, self.dtype, self.mode, self.lora.model_dump_json()


_measured: dict[tuple[object, ...], ActivationMemory] = {}


def activation_memory(case: ActivationCase) -> ActivationMemory:
    """Return the activation memory; it takes half a second, nothing where the same was asked or told before."""
    if case.key not in _measured:
        tell_activation_memory(case, _measure(case))
    return _measured[case.key]


def tell_activation_memory(case: ActivationCase, memory: ActivationMemory) -> None:
    """Answer with `memory` from now on: another process has measured it."""
    _measured[case.key] = memory


def _measure(case: ActivationCase) -> ActivationMemory:
    skeleton = build_skeleton(case.config, case.dtype)
    kinds = Counter(_kind(skeleton, index) for index in range(len(skeleton.layers)))
    first = {_kind(skeleton, index): index for index in reversed(range(len(skeleton.layers)))}
    one_of_each = tuple(sorted(first.values()))
    traces = {kind: _StageTrace(case, skeleton, tuple(sorted((*one_of_each, index)))) for kind, index in first.items()}
    short = _StageTrace(case, skeleton, one_of_each)
    body, origin = short.body(), short.origin()
    longer = {kind: trace.body() for kind, trace in traces.items()}
    layer_bytes = {kind: trace.kept_bytes - body.kept_bytes for kind, trace in longer.items()}
    working_bytes = max(trace.working_bytes for trace in longer.values())
    return ActivationMemory(
        layer_bytes=round(sum(count * layer_bytes[kind] for kind, count in kinds.items()) / kinds.total()),
        stage_bytes=max(0, body.kept_bytes - sum(layer_bytes.values())),
        embedding_and_head_bytes=max(0, origin.kept_bytes - body.kept_bytes),
        working_bytes=working_bytes,
        embedding_and_head_working_bytes=max(working_bytes, origin.working_bytes, short.loss_bytes()),
    )


class _StageTrace:
    """A stage of the given layers on fake tensors; tasks as `StageCompute` runs them."""

    def __init__(self, case: ActivationCase, whole: Skeleton, layers: tuple[int, ...]) -> None:
        config = whole.model.config
        skeleton = build_skeleton(shortened(config, layers), case.dtype)
        if case.lora.enabled:
            add_adapters(skeleton, range(len(layers)), case.lora, seed=0)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            _give_fake_weights(skeleton.model)
        self._stage = Stage(skeleton, 0, len(layers), with_embedding_and_head=True).train()
        enable(self._stage, case.mode)
        self._shape = case.shape
        self._hidden_shape = (*case.shape, config.hidden_size)
        self._dtype = case.dtype

    def body(self) -> _Trace:
        """Forward of a received hidden state (B, T, D), and backward."""
        with self._counting() as live:
            received = torch.empty(self._hidden_shape, dtype=self._dtype)
            hidden = received.detach().requires_grad_()
            output = self._stage(hidden)
            kept_bytes = live.live_bytes
            torch.autograd.backward(output, torch.empty_like(output))
            return _Trace(kept_bytes, live.peak_bytes - kept_bytes)

    def origin(self) -> _Trace:
        """Forward of samples (B, T) with the embedding, and backward."""
        with self._counting() as live:
            input_ids, labels = (torch.zeros(self._shape, dtype=torch.int64) for _ in range(2))
            output = self._stage(self._stage.embed(input_ids))
            kept_bytes = live.live_bytes
            torch.autograd.backward(output, torch.empty_like(output))
            del labels
            return _Trace(kept_bytes, live.peak_bytes - kept_bytes)

    def loss_bytes(self) -> int:
        """Peak of the loss of a received hidden state (B, T, D), with its backward."""
        with self._counting() as live:
            hidden = torch.empty(self._hidden_shape, dtype=self._dtype).requires_grad_()
            loss = self._stage.loss(hidden, torch.zeros(self._shape, dtype=torch.int64)) / 1
            loss.backward()
            return live.peak_bytes

    @contextmanager
    def _counting(self) -> Iterator[LiveMemory]:
        with _unpacked(), self._fake, LiveMemory() as live:
            yield live


def _kind(skeleton: Skeleton, index: int) -> tuple[object, ...]:
    """Return what distinguishes a layer from others: its attention and its parameters' shapes."""
    types = getattr(skeleton.model.config, "layer_types", None)
    shapes = tuple(parameter.shape for parameter in skeleton.layers[index].parameters())
    return types[index] if types else "", shapes


def forget_gradient(parameter: Tensor) -> None:
    """Drop a gradient as soon as it is made, as if it had been added to one that is there already."""
    parameter.grad = None


def _give_fake_weights(model: PreTrainedModel) -> None:
    """Put fake tensors in the place of all parameters and buffers; a parameter that is tied stays one."""
    parameters: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in parameters:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fake = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    if fake.requires_grad:
                        fake.register_post_accumulate_grad_hook(forget_gradient)
                    parameters[parameter] = fake
                module._parameters[name] = parameters[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _unpacked() -> Iterator[None]:
    """Let transformers know, without looking at positions, that a sample is one text: it then needs no causal mask."""
    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    if original is not None:
        setattr(masking_utils, name, lambda *_: None)
    try:
        yield
    finally:
        if original is not None:
            setattr(masking_utils, name, original)
