"""A whole model of which any layers can run, in any order.

Everything is computed by the model's own forward over a shortened list of layers, as in `skippipe.model.stage`, so
masks, rotary embeddings, scalings and soft caps are the model's own.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from skippipe.inference.depth_schedule import LayerSelection, Segment, check_known
from skippipe.inference.key_value_cache import RouteCache
from skippipe.model.architecture import rope_borders
from skippipe.model.chunked_loss import mean_cross_entropy
from skippipe.model.cost import TokenCost, token_cost
from skippipe.model.layer_halves import HalfLayer, half_module, index_of
from skippipe.model.skeleton import Skeleton
from skippipe.model.stage import partial_decoder, partial_model

Bounds = tuple[int, int]


class Decoder:
    """The layers of a model and what comes before and after them. B rows, T positions, D hidden size, V vocabulary.

    `load_model` makes it. Layers and stages are numbered from 0.

    Examples:
        >>> decoder = model.decoder
        >>> decoder.num_layers, decoder.stages, decoder.layers_of_stages([0, 2])
        (6, ((0, 1), (2, 3), (4, 5)), (0, 1, 4, 5))
        >>> hidden = decoder.embed(torch.tensor([[72, 105, 33]]))
        >>> hidden.shape  # (B, T, D)
        torch.Size([1, 3, 64])
        >>> decoder.head(decoder.run_layers(hidden, decoder.layers_of_stages([0, 2]))).shape  # (B, T, V)
        torch.Size([1, 3, 257])
    """

    def __init__(
        self,
        skeleton: Skeleton,
        stages: Sequence[Bounds] = (),
        stage_nodes: Sequence[Sequence[str]] = (),
        absent_stages: Collection[int] = (),
        protected_stages: Collection[int] = (),
    ) -> None:
        """`stages` are the [first, last) layers of each (default: a stage a layer), `stage_nodes` who holds them.

        The layers of `absent_stages` are never run. The training left out none of `protected_stages`, nor stage 0.
        """
        skeleton.model.eval()
        self.skeleton = skeleton
        self.num_layers = len(skeleton.layers)
        bounds = stages or [(layer, layer + 1) for layer in range(self.num_layers)]
        self.stages: tuple[tuple[int, ...], ...] = tuple(tuple(range(first, last)) for first, last in bounds)
        self.stage_nodes = tuple(tuple(nodes) for nodes in stage_nodes)
        self.protected_stages = frozenset({0, *protected_stages})
        self._absent_stages = frozenset(absent_stages)
        self.cost: TokenCost = token_cost(skeleton)
        self._parts: dict[tuple[str, LayerSelection], PreTrainedModel] = {}
        parameters = inspect.signature(skeleton.base.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.skeleton.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.skeleton.model.parameters()).device
        return device

    @property
    def layers(self) -> nn.ModuleList:
        """All layers."""
        return self.skeleton.layers

    @property
    def absent_stages(self) -> frozenset[int]:
        """Stages that nobody can run."""
        return self._absent_stages

    @property
    def present_stages(self) -> tuple[int, ...]:
        """The other stages, in order."""
        return tuple(stage for stage in range(len(self.stages)) if stage not in self.absent_stages)

    @property
    def all_layers(self) -> tuple[int, ...]:
        """The indices of all layers that can be run, in order."""
        return self.layers_of_stages(self.present_stages)

    @property
    def absence(self) -> str:
        """What is missing, in words; nothing where all stages are there."""
        gone = [str(stage) for stage in sorted(self.absent_stages)]
        if not gone:
            return ""
        who = f"stage {gone[0]} has" if len(gone) == 1 else f"stages {', '.join(gone[:-1])} and {gone[-1]} have"
        share = len(self.all_layers) / self.num_layers
        return (
            f"{who} no node left: answered at {len(self.present_stages)} of {len(self.stages)} stages "
            f"({share:.0%} of the layers' compute)"
        )

    def is_here(self, layers: LayerSelection) -> bool:
        """Whether this process holds these layers."""
        return True

    @property
    def context(self) -> int:
        """The most positions that the model can take."""
        return int(self.config.max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.skeleton.model.get_input_embeddings().num_embeddings)

    def rope_border(self, seen: int, length: int) -> int | None:
        """Return where longrope takes its other factors behind `seen` positions, in a text of `length` tokens.

        A pass that goes beyond turns all its tokens by them, earlier ones too. None: they stay the same.
        """
        return next((border for border in rope_borders(self.config) if seen <= border < length), None)

    def must_read_again(self, seen: int, length: int) -> bool:
        """Whether keys of the first `seen` positions are of no use for a text of `length` tokens.

        The rule is that of generation in transformers: the text is read once more when it passes the border.
        """
        return self.skeleton.traits.reads_again and seen > 0 and self.rope_border(seen, length) is not None

    def layers_of_stages(self, stages: Sequence[int]) -> tuple[int, ...]:
        """Return the layers of these stages, in the order in which the stages are given."""
        return tuple(layer for stage in stages for layer in self.stages[stage])

    def logits(
        self,
        input_ids: Tensor,
        route: Sequence[Segment],
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RouteCache | None = None,
        num_last: int = 0,
    ) -> Tensor:
        """Return logits of new positions along a route: (B, T) -> (B, T, V), or of the `num_last` last ones alone.

        Args:
            input_ids: Token ids of the new positions, (B, T).
            route: Which layers run for how many of the new positions; every segment serves a prefix of them.
            position_ids: Positions in the text, (B, T); those behind the cache where not given.
            attention_mask: 1 for tokens and 0 for padding, (B, positions in the cache + T); no padding where not given.
            cache: Keys and values of the positions before; those of the new ones are added. None: there are none.
            num_last: How many of the last positions to return; all where it is 0.

        Returns:
            The logits, in the dtype of the model.

        Raises:
            InputError: The route has a layer that the model does not.
        """
        check_known(route, self.num_layers)
        if len(route) == 1 and route[0].served == input_ids.shape[1] and self.is_here(route[0].layers):
            model = self._part("model", route[0].layers, lambda: self._whole(route[0].layers))
            arguments = self._arguments(input_ids, position_ids, attention_mask, cache)
            logits: Tensor = model(input_ids=input_ids, logits_to_keep=num_last, **arguments).logits
        else:
            hidden = self._walked(input_ids, route, position_ids, attention_mask, cache)
            logits = self.head(hidden[:, -num_last:])  # all where it is 0
        if cache is not None:
            cache.seen += input_ids.shape[1]
        return logits

    def loss(self, input_ids: Tensor, labels: Tensor, route: Sequence[Segment], *, first: int = 0) -> Tensor:
        """Return the mean cross entropy along a route of the labels from position `first` on, in fp32.

        No logits of the whole text are ever there: see `skippipe.model.chunked_loss`.

        Args:
            input_ids: Token ids, (B, T).
            labels: The next tokens, already shifted, (B, T).
            route: Which layers run for how many of the positions; every segment serves a prefix of them.
            first: The first position that counts.

        Raises:
            InputError: The route has a layer that the model does not.
        """
        check_known(route, self.num_layers)
        hidden = self._walked(input_ids, route)
        return mean_cross_entropy(self.head, (), hidden[:, first:], labels[:, first:])

    def _walked(
        self,
        input_ids: Tensor,
        route: Sequence[Segment],
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RouteCache | None = None,
    ) -> Tensor:
        """Return the hidden state behind a route, before the final norm: (B, T) -> (B, T, D)."""
        hidden = self.embed(input_ids, position_ids)
        for segment in route:
            part = hidden[:, : segment.served]  # (B, served, D)
            done = self.run_layers(part, segment.layers, position_ids, attention_mask, cache)
            hidden = torch.cat([done, hidden[:, segment.served :]], dim=1)  # (B, T, D)
        return hidden

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        layers: LayerSelection = (),
        cache: RouteCache | None = None,
    ) -> Tensor:
        """Return the hidden states before the first layer, or after `layers`: (B, T) -> (B, T, D)."""
        part = self._part("embedding", layers, lambda: self._some(layers, embedding=True))
        arguments = self._arguments(input_ids, position_ids, attention_mask, cache)
        hidden: Tensor = part(input_ids=input_ids, **arguments).last_hidden_state
        return hidden

    def run_layers(
        self,
        hidden: Tensor,
        layers: LayerSelection,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RouteCache | None = None,
    ) -> Tensor:
        """Run layers on a prefix of the new positions, (B, t, D) -> (B, t, D); `cache.seen` stays."""
        part = self._part("layers", layers, lambda: self._some(layers))
        arguments = self._arguments(hidden, position_ids, attention_mask, cache)
        output: Tensor = part(inputs_embeds=hidden, **arguments).last_hidden_state
        return output

    def head(self, hidden: Tensor) -> Tensor:
        """Apply final norm and head: (B, T, D) -> (B, T, V)."""
        part = self._part("head", (), lambda: partial_model(self.skeleton, ()))
        logits: Tensor = part(inputs_embeds=hidden, **self._arguments(hidden, None, None, None)).logits
        return logits

    def _whole(self, layers: LayerSelection) -> PreTrainedModel:
        model = partial_model(self.skeleton, [index_of(layer) for layer in layers], embedding=True)
        self._put_halves(getattr(model, model.base_model_prefix), layers)
        return model

    def _some(self, layers: LayerSelection, *, embedding: bool = False) -> PreTrainedModel:
        part = partial_decoder(self.skeleton, [index_of(layer) for layer in layers], embedding=embedding)
        self._put_halves(part, layers)
        return part

    def _put_halves(self, part: PreTrainedModel, layers: LayerSelection) -> None:
        """Put a half where a part of the model has a layer of which only that is to run."""
        modules: nn.ModuleList = getattr(part, self.skeleton.traits.layers)
        for at, layer in enumerate(layers):
            if isinstance(layer, HalfLayer):
                modules[at] = half_module(self.skeleton, layer)

    def _part(self, kind: str, layers: LayerSelection, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Return a part of the model, built at its first use; parts share all weights."""
        part = self._parts.get((kind, layers))
        if part is None:
            part = self._parts[kind, layers] = build()
        return part

    def _arguments(
        self, tokens: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, cache: RouteCache | None
    ) -> dict[str, Any]:
        seen, count = cache.seen if cache is not None else 0, tokens.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + count, device=tokens.device).unsqueeze(0)  # (1, T)
        arguments: dict[str, Any] = {"position_ids": position_ids[:, :count]}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask[:, : seen + count]
        if cache is not None:
            arguments |= {self._cache_name: cache, "use_cache": True}
        return arguments
