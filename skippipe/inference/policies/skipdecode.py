"""SkipDecode (Del Corro et al. 2023, arXiv 2307.02628, section 3): later tokens run fewer layers.

All rows of a batch share the depth of a position, which falls linearly and never grows, so keys and values of all
earlier positions are there. The first `warm_up` layers always run; of the others the top ones do, those below are left
out. The prompt runs at the largest depth.
"""

from dataclasses import dataclass, replace

from skippipe.errors import InputError
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.policies.base import Policy, PolicyContext, check_keep


@dataclass(frozen=True)
class SkipDecode(Policy):
    """From `most` layers at the first generated position down to `fewest` at the last."""

    num_layers: int
    most: int
    fewest: int
    warm_up: int
    num_generated: int

    def layers_at(self, position: int, prompt_length: int) -> LayerSelection:
        """Return the bottom `warm_up` layers and the top ones up to the depth of the position."""
        depth = self.depth_at(position - prompt_length)
        warm_up = min(self.warm_up, depth)
        return (*range(warm_up), *range(self.num_layers - (depth - warm_up), self.num_layers))

    def for_length(self, num_generated: int) -> Policy:
        """Return the same line, drawn over so many positions."""
        return replace(self, num_generated=num_generated)

    def depth_at(self, generated: int) -> int:
        """Return the number of layers for the generated position with this number; below 0 it is the prompt's."""
        last = self.num_generated - 1
        passed = min(max(generated, 0), last) / last if last > 0 else 0.0
        return round(self.most - (self.most - self.fewest) * passed)


def build(context: PolicyContext) -> Policy:
    """Return the widest schedule whose mean depth is the share to keep, unless `max` and `min` say which."""
    check_keep(context.keep)
    count = context.decoder.num_layers
    chosen = context.options({"warm_up": 1, "max": 0, "min": 0})
    warm_up = int(chosen["warm_up"])
    lowest = min(warm_up + 1, count)
    both = 2 * context.keep * count
    most = int(chosen["max"]) or min(count, round(both - lowest))
    fewest = int(chosen["min"]) or round(both - most)
    if not 0 <= warm_up <= count or not lowest <= fewest <= most <= count:
        raise InputError(
            f"--keep {context.keep}: policy skipdecode would go from {most} to {fewest} of {count} layers with a "
            f"warm-up of {warm_up}; the smallest share is {lowest / count:.2f}"
        )
    return SkipDecode(count, most, fewest, warm_up, context.num_generated)
