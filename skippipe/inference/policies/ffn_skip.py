"""FFN-SkipLLM (Jaiswal et al. 2024, arXiv 2404.03865, section 3): attention always runs, FFNs are skipped.

In the middle of the model the blocks hardly turn the residual stream. Once the cosine of the stream before and after a
block reaches a threshold, the token skips the blocks of the next layers. The first and last layers and the first
tokens of a text skip nothing. Region, number of layers and threshold are calibrated for the share to keep: what the
blocks of each candidate turn at full depth decides between them, and the threshold is then found by running the model.
"""

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, Segment
from skippipe.inference.ffn_skipping import NEVER, FfnRule, FfnSkipping, skipping
from skippipe.inference.policies.base import Policy, PolicyContext, check_keep, check_layers_are_here

MOST_WARM_UP = 8
"""Tokens that skip nothing at the start of a long text; a sixteenth of a short one."""
TRIES = 6
"""Runs of the model that look for the threshold."""
HALVINGS = 24
"""Steps of the search for a threshold that needs no run."""
TOLERANCE = 0.005
"""A share this near to what was asked for ends the search."""


@dataclass(frozen=True)
class FfnSkip(Policy):
    """All layers, their feed-forward blocks skipped by a rule."""

    layers: LayerSelection
    rule: FfnRule

    def layers_at(self, position: int, prompt_length: int) -> LayerSelection:
        """Return all layers."""
        return self.layers

    @property
    def layers_in_part(self) -> LayerSelection:
        """The layers of the region behind its first, whose blocks a token may skip."""
        return () if self.rule.threshold == NEVER else tuple(range(self.rule.first + 1, self.rule.last))

    def installed(self, decoder: Decoder) -> AbstractContextManager[FfnSkipping]:
        """Return a context in which the rule is at work."""
        return skipping(decoder, self.rule)


def build(context: PolicyContext) -> Policy:
    """Return the policy calibrated for the share, or with the rule that the argument spells out."""
    check_keep(context.keep)
    decoder = context.decoder
    check_layers_are_here(decoder, "ffn-skip")
    for layer in decoder.layers:
        decoder.skeleton.traits.feed_forward_name(layer)
    unset = -2.0
    warm_up = max(1, min(MOST_WARM_UP, context.num_generated // 16))
    chosen = context.options(
        {"warm_up": warm_up, "first": 1, "last": decoder.num_layers - 1, "span": 1, "threshold": unset}
    )
    rule = FfnRule(
        int(chosen["first"]), int(chosen["last"]), int(chosen["warm_up"]), chosen["threshold"], int(chosen["span"])
    )
    if not 0 <= rule.first < rule.last <= decoder.num_layers or rule.span < 1 or rule.warm_up < 0:
        raise InputError(f"--policy ffn-skip: {context.argument}: no region or span within {decoder.num_layers} layers")
    if chosen["threshold"] != unset:
        return FfnSkip(decoder.all_layers, rule)
    if context.keep == 1.0:
        rule = replace(rule, threshold=NEVER)
    elif decoder.absent_stages:
        raise InputError("--policy ffn-skip: it is calibrated with all stages there; give a whole rule, threshold= too")
    else:
        rule = _Calibration(decoder, context.calibration_tokens()[:, :-1], rule.warm_up).rule(context.keep)
    return FfnSkip(decoder.all_layers, rule)


class _Calibration:
    """Cosines of every block at full depth, and runs of the model under a rule. B rows, T positions, L layers."""

    def __init__(self, decoder: Decoder, tokens: Tensor, warm_up: int) -> None:
        self._decoder, self._tokens, self._warm_up = decoder, tokens, warm_up
        count = decoder.num_layers
        flop = sum(decoder.cost.layer_flop(position + 1) for position in range(tokens.shape[1]))
        self._whole_flop = count * flop * len(tokens)
        cosines = self._run(FfnRule(0, count, 0, NEVER, 1)).cosines or {}
        self._cosines = torch.stack([cosines[layer] for layer in range(count)])[:, :, warm_up:]  # (L, B, T - warm-up)

    def rule(self, keep: float) -> FfnRule:
        """Return the rule for a share; raise `InputError` where no rule reaches it."""
        smallest = self._reached(
            FfnRule(1, self._decoder.num_layers - 1, self._warm_up, -1.0, self._decoder.num_layers)
        )
        if smallest > keep + TOLERANCE:
            raise InputError(
                f"--keep {keep}: policy ffn-skip leaves out feed-forward blocks between the first and the last layer "
                f"alone, which keeps at least {smallest:.2f} of this model's compute"
            )
        to_skip = (1 - keep) * self._whole_flop / self._decoder.cost.ffn_flop
        _, rule = min((self._candidate(*place, to_skip) for place in self._places(to_skip)), key=_badness)
        return self._refined(rule, keep)

    def _places(self, to_skip: float) -> list[tuple[int, int, int]]:
        """Return the regions and spans that can reach the share, even if at the lowest threshold alone."""
        count, tokens = self._decoder.num_layers, self._cosines[0].numel()
        cold = sorted({1, count // 8, count // 4, count // 3} - {0})
        found = []
        for first, cold_end in itertools.product(cold, cold):
            width = count - cold_end - first
            for span in sorted({1, 2, 4, 8, 16, width - 1}):
                if 1 <= span < width and (width - -(-width // (span + 1))) * tokens >= to_skip:
                    found.append((first, count - cold_end, span))
        return found or [(1, count - 1, count)]

    def _candidate(self, first: int, last: int, span: int, to_skip: float) -> tuple[float, FfnRule]:
        """Return what the skipped blocks turn at full depth on average, and the rule that skips as many as it takes."""
        threshold = self._threshold(first, last, span, to_skip)
        skipped, turned = self._imagine(first, last, span, threshold)
        return turned / max(skipped, 1), FfnRule(first, last, self._warm_up, threshold, span)

    def _threshold(self, first: int, last: int, span: int, to_skip: float) -> float:
        """Return the highest threshold that skips so many blocks, -1 where none does."""
        low, high = -1.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            skipped, _ = self._imagine(first, last, span, middle)
            low, high = (middle, high) if skipped >= to_skip else (low, middle)
        return low

    def _imagine(self, first: int, last: int, span: int, threshold: float) -> tuple[int, float]:
        """Return how many blocks would be skipped if skipping changed no cosine, and the sum of 1 - cosine of these."""
        left = torch.zeros_like(self._cosines[0], dtype=torch.long)
        skipped, turned = 0, 0.0
        for layer in range(first, last):
            skips = left > 0
            skipped += int(skips.sum())
            turned += float(((1 - self._cosines[layer]) * skips).sum())
            starts = ~skips & (self._cosines[layer] >= threshold)
            left = torch.where(starts, span, (left - 1).clamp(min=0))
        return skipped, turned

    def _refined(self, rule: FfnRule, keep: float) -> FfnRule:
        """Return the rule with the threshold whose share, really computed, comes nearest to what is asked for.

        Skipping changes the cosines above, so what is imagined misses; the next try aims as much further as it missed.
        """
        to_skip = aim = (1 - keep) * self._whole_flop / self._decoder.cost.ffn_flop
        found: list[tuple[float, FfnRule]] = []
        for _ in range(TRIES):
            share = self._reached(rule)
            found.append((abs(share - keep), rule))
            if found[-1][0] <= TOLERANCE:
                break
            aim *= (1 - keep) / max(1 - share, 0.1 * (1 - keep))
            aim = min(max(aim, 0.2 * to_skip), 5 * to_skip)
            rule = replace(rule, threshold=self._threshold(rule.first, rule.last, rule.span, aim))
        return min(found, key=_badness)[1]

    def _reached(self, rule: FfnRule) -> float:
        return 1 - self._run(rule).skipped_flop / self._whole_flop

    @torch.inference_mode()
    def _run(self, rule: FfnRule) -> FfnSkipping:
        route = [Segment(self._decoder.all_layers, self._tokens.shape[1])]
        with skipping(self._decoder, rule) as state:
            state.cosines = {}
            state.begin(torch.arange(self._tokens.shape[1], device=self._tokens.device).expand_as(self._tokens))
            self._decoder.logits(self._tokens, route, num_last=1)
        return state


def _badness(candidate: tuple[float, FfnRule]) -> float:
    return candidate[0]
