"""What a policy is: which layers run at which position, or which feed-forward blocks are skipped for which token."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection


class FlopMeter(Protocol):
    """Counts what a policy left out inside layers that ran."""

    @property
    def skipped_flop(self) -> float:
        """FLOP that were not computed since the policy was installed."""
        ...

    def begin(self, position_ids: Tensor, is_token: Tensor | None = None) -> None:
        """Announce the positions (B, T) of the next pass; `is_token` is 0 for padding, which is not counted."""
        ...


class Policy(ABC):
    """Which part of a model runs.

    A policy of one's own is a subclass with `layers_at`; where the same layers run at every position, `FixedLayers`
    is enough.

    Examples:
        >>> class HalfAfterPrompt(Policy):
        ...     def layers_at(self, position, prompt_length):
        ...         return (0, 1, 2, 3, 4, 5) if position < prompt_length else (0, 1, 2)
        >>> generated = generate(model.decoder, HalfAfterPrompt(), [[72, 105]], max_new_tokens=4)
        >>> generated.summary
        "share of the layers' compute: 100.0% for the prompt, 50.0% after it"
    """

    @property
    def num_stages(self) -> int | None:
        """Stages that run, for policies that choose stages."""
        return None

    @abstractmethod
    def layers_at(self, position: int, prompt_length: int) -> LayerSelection:
        """Return the layers for a position, in the order in which they run.

        From one position to the next, layers may only go, and the others keep their order.

        Args:
            position: The position in the text, from 0.
            prompt_length: How many of the first positions are the prompt.

        Returns:
            Indices of layers, from 0.
        """

    @property
    def layers_in_part(self) -> LayerSelection:
        """Layers of which a part may be skipped for some tokens, though they run."""
        return ()

    def sample(self, index: int) -> "Policy":
        """Return the choice with this number, where the policy draws at random; else the policy itself."""
        return self

    def for_length(self, num_generated: int) -> "Policy":
        """Return the policy for so many positions after the prompt, where its depth is spread over them."""
        return self

    def installed(self, decoder: Decoder) -> AbstractContextManager[FlopMeter | None]:
        """Return a context in which the decoder's layers follow the policy inside."""
        return nullcontext()


@dataclass(frozen=True)
class FixedLayers(Policy):
    """The same layers at every position.

    Examples:
        >>> FixedLayers((0, 1, 4, 5), stages_run=2).layers_at(7, 3)
        (0, 1, 4, 5)
    """

    layers: LayerSelection
    """Indices of layers from 0, in the order in which they run."""
    stages_run: int | None = None
    """How many stages these are, where stages were chosen."""

    def __post_init__(self) -> None:
        if not self.layers or any(isinstance(layer, int) and layer < 0 for layer in self.layers):
            raise InputError(f"layers {list(self.layers)}: give at least one, counted from 0")

    @property
    def num_stages(self) -> int | None:
        """Stages that run, where stages were chosen."""
        return self.stages_run

    def layers_at(self, position: int, prompt_length: int) -> LayerSelection:
        """Return the layers."""
        return self.layers


@dataclass(frozen=True)
class PolicyContext:
    """What a policy is built from.

    Examples:
        >>> context = PolicyContext(model.decoder, keep=0.5, argument="warm_up=2")
        >>> context.options({"warm_up": 0.0, "floor": 0.1})
        {'warm_up': 2.0, 'floor': 0.1}
    """

    decoder: Decoder
    """The model."""
    keep: float
    """Share of the layers' compute to keep."""
    argument: str = ""
    """What follows the policy's name and a colon."""
    seed: int = 0
    """Seed of the policy's random choices."""
    num_generated: int = 1
    """Positions after the prompt, over which a depth that shrinks is spread."""
    calibration: Callable[[], Tensor] | None = None
    """Returns text to measure on, (B, T + 1) tokens."""

    def with_keep(self, keep: float) -> "PolicyContext":
        """Return the same for another share."""
        return replace(self, keep=keep)

    def options(self, defaults: Mapping[str, float]) -> dict[str, float]:
        """Return the argument, `key=value,...`, over the defaults; raise `InputError` for an unknown key.

        Values are finite numbers, and whole ones where the default is an `int`; others are refused too.
        """
        values = dict(defaults)
        for part in filter(None, self.argument.split(",")):
            key, _, value = part.partition("=")
            if key not in values:
                raise InputError(f"--policy: unknown option {part!r}; there are {', '.join(f'{k}=' for k in defaults)}")
            values[key] = number = _number(value)
            if isinstance(defaults[key], int) and not number.is_integer():
                raise InputError(f"--policy: {part!r}: expected a whole number after {key}=")
            if not math.isfinite(number):
                raise InputError(f"--policy: {part!r}: expected a finite number after {key}=")
        return values

    def calibration_tokens(self) -> Tensor:
        """Return the text to measure on; raise `InputError` where there is none."""
        if self.calibration is None:
            raise InputError("--policy: this policy is calibrated on text, and there is none; give --calibration FILE")
        return self.calibration()


def _number(text: str) -> float:
    """Return the number that a text spells; nan where it spells none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def fixed_layers(policy: Policy, decoder: Decoder) -> LayerSelection | None:
    """Return the layers that run at every position after a prompt; None where those are not the same everywhere."""
    first, last = (policy.layers_at(position, 0) for position in (0, decoder.context))
    with policy.installed(decoder) as meter:
        return first if first == last and meter is None else None


def check_layers_are_here(decoder: Decoder, policy: str) -> None:
    """Raise `InputError` for a policy that looks into layers, where other processes hold some."""
    if not decoder.is_here(decoder.all_layers):
        raise InputError(
            f"--policy {policy}: it looks into layers, some of which lie in other processes here; "
            "choose another policy, or start one process without torchrun"
        )


def check_keep(keep: float) -> None:
    """Raise `InputError` for a share that is none."""
    if not 0 < keep <= 1:
        raise InputError(f"--keep {keep}: expected a share above 0 and up to 1")


def kept_stages(keep: float, num_stages: int) -> int:
    """Return how many stages a share of the depth means; raise `InputError` where no subset reaches it."""
    check_keep(keep)
    kept = round(keep * num_stages)
    if kept < 1:
        raise InputError(
            f"--keep {keep}: leaves less than one of {num_stages} stages; the smallest share is {1 / num_stages:.2f}"
        )
    return kept


def kept_layers(keep: float, num_layers: int, *, at_least: int, policy: str) -> int:
    """Return the nearest number of layers; raise `InputError` where it is below what the policy needs."""
    check_keep(keep)
    kept = round(keep * num_layers)
    if kept < at_least:
        raise InputError(
            f"--keep {keep}: policy {policy} runs at least {at_least} of {num_layers} layers; "
            f"the smallest share is {at_least / num_layers:.2f}"
        )
    return kept
