"""How much of a model's layers generation computed, prompt and answer apart."""

from collections.abc import Sequence

from skippipe.inference.depth_schedule import Flop, LayerSelection, flop_of
from skippipe.inference.policies.base import FlopMeter
from skippipe.model.cost import TokenCost


class FlopCounter:
    """FLOP of the layers that ran and of all layers, for rows whose prompts have these lengths."""

    def __init__(self, num_layers: int, cost: TokenCost, lengths: Sequence[int], meter: FlopMeter | None) -> None:
        self._num_layers, self._cost, self._meter = num_layers, cost, meter
        self._lengths = list(lengths)
        self._steps: list[LayerSelection] = []
        self._prompt_skipped_flop = 0.0
        self.prompt = Flop()
        """FLOP of the prompts."""

    def count_prompt(self, layers_of: Sequence[LayerSelection]) -> None:
        """Count the prompts; `layers_of` has the layers of each column, padding on the left."""
        self._prompt_skipped_flop = self._meter.skipped_flop if self._meter is not None else 0.0
        self.prompt = Flop(0.0, -self._prompt_skipped_flop)
        for length in self._lengths:
            self.prompt += flop_of(layers_of[len(layers_of) - length :], self._num_layers, self._cost)

    def count_step(self, layers: LayerSelection) -> None:
        """Count one more token in each row."""
        self._steps.append(layers)

    @property
    def answer(self) -> Flop:
        """FLOP of the tokens after the prompts that passed the model again."""
        skipped = self._meter.skipped_flop - self._prompt_skipped_flop if self._meter is not None else 0.0
        rows = (flop_of(self._steps, self._num_layers, self._cost, first=length) for length in self._lengths)
        return sum(rows, Flop(0.0, -skipped))
