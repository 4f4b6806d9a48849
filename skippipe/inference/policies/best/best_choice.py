"""The parts that matter most on a calibration text.

`best` chooses among the layers, `best:stages` among the stages, `best:halves` among the attentions and feed-forward
blocks of all layers, weighed by FLOP or, with `time`, by measured time. The candidates are the choices of other
policies, those of a dynamic programme on the hidden state (`nearest_subsets`), and what is left without the parts that
do the least damage alone. The one with the least perplexity on the text wins, after some swaps of parts, so it is at
least as good there as any of them; with `cosine` the one whose last hidden state is nearest to the whole model's.
`best:influence` and `best:gradient` judge stages one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from skippipe.errors import InputError, did_you_mean
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.policies.base import (
    FixedLayers,
    Policy,
    PolicyContext,
    check_layers_are_here,
    kept_layers,
    kept_stages,
)
from skippipe.inference.policies.best.nearest_subsets import nearest_subsets
from skippipe.inference.policies.best.part_costs import (
    Part,
    Subset,
    cost_of,
    half_flops,
    half_parts,
    half_times,
    layer_parts,
    selection_of,
    stage_parts,
    subset_of,
)
from skippipe.inference.policies.best.stage_scores import METHODS, best_stages, block_influence
from skippipe.inference.policies.best.subset_choice import choose, cosine_score, damages, loss_score, one_by_one
from skippipe.inference.policies.unified import unified_layers

PROGRAMME_TOKENS = 256
"""Tokens of the first calibration sample, on which the dynamic programme runs and parts are left out one by one."""
FINALISTS = 4
"""Subsets of the dynamic programme that are scored."""
UNITS = ("layers", "halves", "stages")
WORDS = (*UNITS, "cosine", "time", *METHODS)


@dataclass(frozen=True)
class BestOptions:
    """What follows `best:`."""

    words: frozenset[str]
    tries: int
    """Swaps that are tried."""
    width: int
    """Subsets of one cost that the dynamic programme follows."""

    @property
    def unit(self) -> str:
        """What is left out or runs."""
        return next((unit for unit in UNITS if unit in self.words), UNITS[0])


def build(context: PolicyContext) -> Policy:
    """Return the parts with the best score; at most as many as come nearest to the share."""
    options, decoder = _options(context), context.decoder
    method = next((method for method in METHODS if method in options.words), None)
    if method is not None:
        return best_stages(context, method)
    by_stages = options.unit == "stages"
    if by_stages:
        kept = kept_stages(context.keep, len(decoder.stages))
    else:
        kept = kept_layers(context.keep, decoder.num_layers, at_least=1, policy="best")
    if kept >= len(decoder.present_stages if by_stages else decoder.all_layers):
        return FixedLayers(decoder.all_layers, len(decoder.present_stages))
    layers = _chosen(context, options, kept)
    return FixedLayers(layers, kept if by_stages else None)


def _chosen(context: PolicyContext, options: BestOptions, kept: int) -> LayerSelection:
    decoder, tokens = context.decoder, context.calibration_tokens()
    length = tokens.shape[1] - 1
    if options.unit == "halves":
        check_layers_are_here(decoder, "best:halves")
        costs = half_times(decoder, length) if "time" in options.words else half_flops(decoder, length)
        parts, budget = half_parts(decoder, costs), kept * sum(costs)
    else:
        parts, budget = stage_parts(decoder) if options.unit == "stages" else layer_parts(decoder), float(kept)
    score_on = cosine_score if "cosine" in options.words else loss_score
    short = tokens[:1, : PROGRAMME_TOKENS + 1]
    nearest = nearest_subsets(decoder, short[:, :-1], parts, budget, width=options.width)
    damage = damages(parts, score_on(decoder, short))
    known = [subset for subset in _known(context, tokens, parts) if cost_of(parts, subset) <= budget * (1 + 1e-9)]
    candidates = [*known, one_by_one(parts, budget, damage), *nearest[:FINALISTS]]
    score = score_on(decoder, tokens)
    subset = choose(candidates, parts, budget, score, damage=damage, tries=options.tries)
    return selection_of(parts, subset)


def _known(context: PolicyContext, tokens: Tensor, parts: Sequence[Part]) -> Iterator[Subset]:
    """Yield the choices of other policies that are made of these parts: `unified`, and those one by one."""
    decoder = context.decoder
    count, there = decoder.num_layers, set(decoder.all_layers)
    selections = []
    if round(context.keep * len(decoder.stages)) >= 1:  # a share of a few layers may be less than any stage
        selections.append(best_stages(context, "influence").layers_at(0, 0))
    if (spread := int(count * context.keep + 1e-9)) > 1:
        selections.append(tuple(layer for layer in unified_layers(count, spread) if layer in there))
    influence = block_influence(decoder, tokens[:, :-1], [(layer,) for layer in decoder.all_layers])
    turning = sorted(range(len(influence)), key=lambda at: -influence[at])
    kept = kept_layers(context.keep, count, at_least=1, policy="best")
    selections.append(tuple(decoder.all_layers[at] for at in sorted(turning[:kept])))
    for selection in selections:
        subset = subset_of(parts, selection)
        if subset is not None:
            yield subset


def _options(context: PolicyContext) -> BestOptions:
    """Return what follows the colon; raise `InputError` for what is not known or does not go together."""
    given = [part for part in context.argument.split(",") if part]
    words = {part for part in given if "=" not in part}
    for word in sorted(words):
        if word not in WORDS:
            raise InputError(
                f"--policy best:{word}: unknown{did_you_mean(word, WORDS)}; there are best:layers, best:halves, "
                "best:stages, best:cosine and best:halves,time, best:influence and best:gradient"
            )
    if len(words.intersection(UNITS)) > 1 or (words.intersection(METHODS) and len(given) > 1):
        raise InputError(f"--policy best:{context.argument}: say one of layers, halves, stages, influence and gradient")
    if "time" in words and "halves" not in words:
        raise InputError(f"--policy best:{context.argument}: whole layers take equal time; time is for halves")
    numbers = replace(context, argument=",".join(part for part in given if "=" in part))
    chosen = numbers.options({"tries": 24, "width": 2})
    if chosen["tries"] < 0 or chosen["width"] < 1:
        raise InputError(f"--policy best:{context.argument}: expected tries from 0 and a width from 1")
    return BestOptions(frozenset(words), int(chosen["tries"]), int(chosen["width"]))
