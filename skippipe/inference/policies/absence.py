"""What is left of any policy where stages of the model are absent."""

from contextlib import AbstractContextManager

from skippipe.inference.decoder import Decoder
from skippipe.inference.policies.base import Meter, Policy
from skippipe.inference.schedule import Layers


class WithoutAbsent(Policy):
    """A policy without the layers that nobody can run; a stage that goes while the policy is in use counts too."""

    def __init__(self, policy: Policy, decoder: Decoder) -> None:
        self._policy, self._decoder = policy, decoder

    @property
    def num_stages(self) -> int | None:
        """Stages that run, for policies that choose stages."""
        if self._policy.num_stages is None:
            return None
        runs = set(self.layers_at(0, 0))
        return sum(runs.issuperset(layers) for layers in self._decoder.stages)

    def layers_at(self, position: int, prompt_length: int) -> Layers:
        """Return the layers for a position that are there."""
        layers = self._policy.layers_at(position, prompt_length)
        gone = set(self._decoder.layers_of_stages(sorted(self._decoder.absent_stages)))
        return tuple(layer for layer in layers if layer not in gone) if gone else layers

    def draw(self, index: int) -> Policy:
        """Return the choice with this number."""
        drawn = self._policy.draw(index)
        return self if drawn is self._policy else WithoutAbsent(drawn, self._decoder)

    def installed(self, decoder: Decoder) -> AbstractContextManager[Meter | None]:
        """Return the context of the policy."""
        return self._policy.installed(decoder)
