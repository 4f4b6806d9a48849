"""Random stages, as the SkipPipe paper evaluates models with stages removed (arXiv 2502.19913, evaluation)."""

import random
from dataclasses import dataclass

from skippipe.inference.decoder import Decoder
from skippipe.inference.policies.base import FixedLayers, Policy, Request, kept_stages
from skippipe.inference.schedule import Layers


@dataclass(frozen=True)
class RandomStages(Policy):
    """A uniform random subset of the stages other than 0, in order; stage 0 always runs."""

    decoder: Decoder
    count: int
    seed: int
    index: int = 0

    @property
    def num_stages(self) -> int:
        """Stages that run, stage 0 among them."""
        return self.count

    def layers_at(self, position: int, prompt_length: int) -> Layers:
        """Return the layers of the stages drawn."""
        return self.decoder.layers_of_stages(self.stages)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages drawn; the same seed and number always give the same."""
        among, kept = len(self.decoder.stages), self.count
        generator = random.Random(f"{self.seed}/{among}/{kept}/{self.index}")
        return (0, *sorted(generator.sample(range(1, among), kept - 1)))

    def draw(self, index: int) -> Policy:
        """Return the choice with this number."""
        drawn = RandomStages(self.decoder, self.count, self.seed, index)
        return FixedLayers(drawn.layers_at(0, 0), self.count)


def build(request: Request) -> Policy:
    """Return random stages, as many as come nearest to the share."""
    count = kept_stages(request.keep, len(request.decoder.stages))
    return RandomStages(request.decoder, count, request.seed)
