"""What is left of any policy where stages of the model are absent."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.policies.base import FlopMeter, Policy
from skippipe.model.layer_halves import index_of


@dataclass(frozen=True)
class WithoutAbsent(Policy):
    """A policy without the layers that nobody can run; a stage that goes while the policy is in use counts too."""

    policy: Policy
    decoder: Decoder

    @property
    def num_stages(self) -> int | None:
        """Stages that run, for policies that choose stages."""
        if self.policy.num_stages is None:
            return None
        runs = set(self.layers_at(0, 0))
        return sum(runs.issuperset(layers) for layers in self.decoder.stages)

    @property
    def layers_in_part(self) -> LayerSelection:
        """Layers of which a part may be skipped for some tokens."""
        return self.policy.layers_in_part

    def layers_at(self, position: int, prompt_length: int) -> LayerSelection:
        """Return the layers for a position that are there."""
        layers = self.policy.layers_at(position, prompt_length)
        gone = set(self.decoder.layers_of_stages(sorted(self.decoder.absent_stages)))
        return tuple(layer for layer in layers if index_of(layer) not in gone) if gone else layers

    def sample(self, index: int) -> Policy:
        """Return the choice with this number."""
        drawn = self.policy.sample(index)
        return self if drawn is self.policy else WithoutAbsent(drawn, self.decoder)

    def for_length(self, num_generated: int) -> Policy:
        """Return the policy for so many positions after the prompt."""
        return WithoutAbsent(self.policy.for_length(num_generated), self.decoder)

    def installed(self, decoder: Decoder) -> AbstractContextManager[FlopMeter | None]:
        """Return the context of the policy."""
        return self.policy.installed(decoder)
