"""One stage of the model: its own layers, and on stage 0 also embedding, final norm, head and loss.

A stage runs the model's own forward over a shortened list of layers, with embedding and norm replaced by the
identity. So masks, rotary embeddings, scalings and soft caps are the model's own, whatever its architecture.
The auxiliary load-balancing loss of a mixture of experts is left out: the head does not see the routers.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from skippipe.config.lora_options import LoraOptions
from skippipe.errors import CheckpointError
from skippipe.model.architecture_traits import ArchitectureTraits
from skippipe.model.chunked_loss import mean_cross_entropy
from skippipe.model.linear.lora import add_adapters, is_adapter_name, plain_name
from skippipe.model.skeleton import Skeleton, build_skeleton, is_layer_of, materialise, shortened


class Stage(nn.Module):
    """Layers [first, last) of a decoder. B samples, T tokens, D hidden size, V vocabulary."""

    def __init__(self, skeleton: Skeleton, first: int, last: int, *, with_embedding_and_head: bool) -> None:
        super().__init__()
        self.first, self.last, self.with_embedding_and_head = first, last, with_embedding_and_head
        self.traits = skeleton.traits
        self.body = partial_decoder(skeleton, range(first, last))
        if with_embedding_and_head:
            self.embedding = partial_decoder(skeleton, (), embedding=True)
            self.head = partial_model(skeleton, ())
        self._parameters_by_name = {
            plain_name(name): parameter
            for name, parameter in skeleton.model.named_parameters()
            if _belongs(is_layer_of(name, skeleton), first, last, with_embedding_and_head)
        }

    @property
    def layers(self) -> nn.ModuleList:
        """The stage's own layers."""
        layers: nn.ModuleList = getattr(self.body, self.traits.layers)
        return layers

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the hidden state before the first layer: (B, T) -> (B, T, D)."""
        given = {"position_ids": _positions(input_ids), "attention_mask": _no_mask(input_ids)}
        hidden: Tensor = self.embedding(input_ids=input_ids, **given).last_hidden_state
        return hidden

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the stage's layers: (B, T, D) -> (B, T, D)."""
        output: Tensor = self.body(inputs_embeds=hidden, position_ids=_positions(hidden)).last_hidden_state
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply final norm and head: (B, T, D) -> (B, T, V)."""
        given = {"position_ids": _positions(hidden), "attention_mask": _no_mask(hidden)}
        logits: Tensor = self.head(inputs_embeds=hidden, **given).logits
        return logits

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy in fp32; `labels` (B, T) are the next tokens, already shifted."""
        return mean_cross_entropy(self.logits, list(self.head.parameters()), hidden, labels)

    def global_parameters(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters under the names they have in the whole Hugging Face model."""
        return dict(self._parameters_by_name)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return those of `global_parameters` that training changes: all, unless adapters are trained."""
        return {name: parameter for name, parameter in self._parameters_by_name.items() if parameter.requires_grad}

    def state_dict_global(self) -> dict[str, Tensor]:
        """Return the stage's tensors, detached, under Hugging Face names; a tied head is not listed twice."""
        return {name: parameter.detach() for name, parameter in self._parameters_by_name.items()}

    def adapters(self) -> dict[str, Tensor]:
        """Return the tensors of adapters, detached, under their names in peft; empty where all weights are trained."""
        return {name: tensor for name, tensor in self.state_dict_global().items() if is_adapter_name(name)}

    def load_global(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` (Hugging Face names) in; raise `CheckpointError` where they are not exactly the stage's."""
        copy_tensors(tensors, self._parameters_by_name)


@torch.no_grad()
def copy_tensors(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy `tensors` into `parameters` of the same names; nothing is copied where they do not match.

    Raises `CheckpointError` with the first name that is missing, of another shape, or not the model's.
    """
    for name, parameter in parameters.items():
        if name not in tensors:
            raise CheckpointError(f"{name}: missing")
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(f"{name}: shape {tuple(tensors[name].shape)}, the model has {tuple(parameter.shape)}")
    for name in tensors:
        if name not in parameters:
            raise CheckpointError(f"{name}: no such parameter here")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def build_stage(
    config: PretrainedConfig,
    first: int,
    last: int,
    *,
    with_embedding_and_head: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    lora: LoraOptions | None = None,
) -> Stage:
    """Build layers [first, last) of the model with their initial weights; nothing else takes memory.

    With `lora` they have adapters, and all other weights are frozen. Raises `ConfigError` where it does not fit them.
    """
    skeleton = build_skeleton(config, dtype)
    materialise(skeleton, range(first, last), with_embedding_and_head=with_embedding_and_head, seed=seed, device=device)
    if lora is not None and lora.enabled:
        add_adapters(skeleton, range(first, last), lora, seed)
    return Stage(skeleton, first, last, with_embedding_and_head=with_embedding_and_head)


def _belongs(layer: int | None, first: int, last: int, with_embedding_and_head: bool) -> bool:
    return with_embedding_and_head if layer is None else first <= layer < last


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)  # (1, T)


def _no_mask(tokens: Tensor) -> Tensor:
    """Return a mask for a model without layers: of four dimensions, it counts as made already, which saves making it.

    To make one, Hugging Face's models look at the positions, for which a GPU has to be waited for.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)


def partial_decoder(
    skeleton: Skeleton, layers: Sequence[int], *, embedding: bool = False, norm: bool = False
) -> PreTrainedModel:
    """Return the base model with only `layers`, in this order, sharing the skeleton's modules.

    Without embedding and final norm unless asked for; then it takes and returns hidden states.
    """
    decoder = _shallow_copy(skeleton.base)
    setattr(decoder, skeleton.traits.layers, nn.ModuleList(skeleton.layers[index] for index in layers))
    if not norm:
        setattr(decoder, skeleton.traits.final_norm, nn.Identity())
    decoder.config = shortened(skeleton.base.config, layers)
    if not embedding:
        _remove_embedding(decoder, skeleton.traits)
    return decoder


def partial_model(skeleton: Skeleton, layers: Sequence[int], *, embedding: bool = False) -> PreTrainedModel:
    """Return the whole model with only `layers`, in this order; without embedding it takes hidden states."""
    decoder = partial_decoder(skeleton, layers, embedding=embedding, norm=True)
    model = _shallow_copy(skeleton.model)
    model.config = decoder.config
    setattr(model, skeleton.model.base_model_prefix, decoder)
    return model


def _shallow_copy(module: PreTrainedModel) -> PreTrainedModel:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


def _remove_embedding(decoder: PreTrainedModel, traits: ArchitectureTraits) -> None:
    decoder.set_input_embeddings(nn.Identity())
    if traits.position_embedding is not None:
        setattr(decoder, traits.position_embedding, _NoPosition())
    if traits.embedding_dropout is not None:
        setattr(decoder, traits.embedding_dropout, nn.Identity())
    if traits.embedding_factor is not None:
        setattr(decoder, traits.embedding_factor, 1.0)


class _NoPosition(nn.Module):
    """Stands for a learned position embedding that was already added at the origin."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)
