"""Random stages, as the SkipPipe paper evaluates models with stages removed (arXiv 2502.19913, evaluation)."""

import random
from dataclasses import dataclass

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.policies.base import FixedLayers, Policy, PolicyContext, kept_stages


@dataclass(frozen=True)
class RandomStages(Policy):
    """A uniform random subset of the stages that are there, in order; stage 0 and those protected always run."""

    decoder: Decoder
    count: int
    seed: int
    index: int = 0

    @property
    def num_stages(self) -> int:
        """Stages that run, stage 0 among them."""
        return self.count

    def layers_at(self, position: int, prompt_length: int) -> LayerSelection:
        """Return the layers of the stages drawn."""
        return self.decoder.layers_of_stages(self.stages)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages drawn; the same seed and number always give the same."""
        present = self.decoder.present_stages
        always = _protected(self.decoder)
        generator = random.Random(f"{self.seed}/{len(present)}/{self.count}/{self.index}")
        others = [stage for stage in present if stage not in always]
        return tuple(sorted([*always, *generator.sample(others, self.count - len(always))]))

    def sample(self, index: int) -> Policy:
        """Return the choice with this number."""
        drawn = RandomStages(self.decoder, self.count, self.seed, index)
        return FixedLayers(drawn.layers_at(0, 0), self.count)


def build(context: PolicyContext) -> Policy:
    """Return random stages, as many as come nearest to the share."""
    decoder = context.decoder
    count = min(kept_stages(context.keep, len(decoder.stages)), len(decoder.present_stages))
    always = _protected(decoder)
    if count < len(always):
        raise InputError(
            f"--keep {context.keep}: leaves {count} of {len(decoder.stages)} stages, and no route of the training left "
            f"out stages {', '.join(map(str, always))}; the smallest share is {len(always) / len(decoder.stages):.2f}"
        )
    return RandomStages(decoder, count, context.seed)


def _protected(decoder: Decoder) -> list[int]:
    return [stage for stage in decoder.present_stages if stage in decoder.protected_stages]
