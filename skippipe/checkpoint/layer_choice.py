"""A choice of the layers that run, as a file: what `skippipe evaluate --save-choice` writes."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from skippipe.errors import InputError
from skippipe.model.layer_halves import HalfLayer, LayerOrHalf, index_of
from skippipe_scheduler.files import Count, Name, PositiveCount, StrictModel, parse, read_json, write_atomically

FORMAT: Final = "skippipe.choice/1"
ComputedShare = Annotated[float, Field(gt=0, le=1)]


class LayerChoice(StrictModel):
    """Which attentions and feed-forward blocks of a model run, in the order of the model."""

    format: Literal["skippipe.choice/1"] = FORMAT
    model: Name
    """Name of the model that it was chosen for."""
    checkpoint: Name
    policy: Name
    """The policy that chose."""
    keep: ComputedShare
    """The share that was asked for."""
    share_computed: ComputedShare
    """Share of the layers' FLOP that runs."""
    perplexity: Annotated[float, Field(gt=0)] | None
    """On the text that it was measured on when it was saved; None beyond the largest number."""
    num_layers: PositiveCount
    attention: tuple[Count, ...]
    """Layers whose attention runs, from 0."""
    feed_forward: tuple[Count, ...]
    """Layers whose feed-forward block runs, from 0."""

    @model_validator(mode="after")
    def _layers_of_this_model(self) -> Self:
        for name, layers in (("attention", self.attention), ("feed_forward", self.feed_forward)):
            if any(after <= before for before, after in pairwise(layers)):
                raise ValueError(f"{name}: {list(layers)} is not in rising order")
            if layers and layers[-1] >= self.num_layers:
                raise ValueError(f"{name}: there is no layer {layers[-1]}; the model has {self.num_layers}, from 0 on")
        if not self.attention and not self.feed_forward:
            raise ValueError("attention and feed_forward: nothing runs")
        return self

    @property
    def layers(self) -> tuple[LayerOrHalf, ...]:
        """What runs, whole layers and halves."""
        attention, feed_forward = set(self.attention), set(self.feed_forward)
        found: list[LayerOrHalf] = []
        for layer in sorted(attention | feed_forward):
            if layer in attention and layer in feed_forward:
                found.append(layer)
            else:
                found.append(HalfLayer(layer, "attention" if layer in attention else "feed_forward"))
        return tuple(found)

    def require_depth(self, num_layers: int, place: Path) -> None:
        """Raise `InputError` where the choice was made for a model of another depth."""
        if num_layers != self.num_layers:
            raise InputError(
                f"{place}: chosen for a model of {self.num_layers} layers ({self.model}), this one has {num_layers}"
            )

    def whole_layers(self, place: Path) -> tuple[int, ...]:
        """Return the layers that run; raise `InputError` where of one only a half does."""
        for layer in self.layers:
            if isinstance(layer, HalfLayer):
                block = "attention" if layer.block == "attention" else "feed-forward block"
                raise InputError(
                    f"{place}: of layer {layer.layer} only the {block} runs, but whole layers are needed here; choose "
                    "them with --policy best"
                )
        return self.attention


def blocks_of(layers: tuple[LayerOrHalf, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the layers whose attention and those whose feed-forward block runs.

    Raises `InputError` where they run in another order than the model's.
    """
    halves = [layer if isinstance(layer, HalfLayer) else HalfLayer(layer, "attention") for layer in layers]
    if any(after.layer <= before.layer for before, after in pairwise(halves)):
        raise InputError("--save-choice: the layers run in another order than the model's; a choice leaves layers out")
    attention = [layer for layer in layers if not isinstance(layer, HalfLayer) or layer.block == "attention"]
    feed_forward = [layer for layer in layers if not isinstance(layer, HalfLayer) or layer.block == "feed_forward"]
    return tuple(map(index_of, attention)), tuple(map(index_of, feed_forward))


def read_choice(path: Path) -> LayerChoice:
    """Read what `write_choice` wrote; raise `InputError` where it is missing or wrong."""
    return parse(LayerChoice, read_json(path, InputError), str(path), InputError)


def write_choice(choice: LayerChoice, path: Path) -> None:
    """Write `choice` as JSON; raise `SkipPipeError` where that fails."""
    write_atomically(path, choice.model_dump_json(indent=1) + "\n")
