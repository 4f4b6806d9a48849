"""A draft by some layers: how often its tokens stay by its confidence, and what they take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.generation.checked_texts import CheckedTexts, DraftLayers
from skippipe.inference.generation.drafts.clock import now_s
from skippipe.inference.generation.drafts.drafter import DraftedTokens
from skippipe.inference.generation.drafts.gain import Chances, PassTimes, best_length
from skippipe.inference.generation.sampling import TokenChoice

BORDERS = (0.3, 0.6, 0.8, 0.95)
"""From which likelihood that the draft found for its token on it has the next level of confidence."""
EXPECTED = (0.1, 0.4, 0.65, 0.8, 0.9)


class LayerDraft:
    """Layers, and what is known of them as a draft. It ends where its confidence is low."""

    def __init__(self, layers: DraftLayers, expected_s: float, checks: PassTimes) -> None:
        """`expected_s` are the seconds of a token, `checks` times of checks; both count beside its own first ones."""
        self.layers = layers
        self._chances = Chances(EXPECTED)
        self._all_checks, self._checks, self._steps = checks, PassTimes(), PassTimes()
        self._steps.add(1, expected_s)
        self._is_warm = False
        """Whether the layers have drafted before: the first time takes longer, and is not counted."""
        self._levels: list[list[int]] = []
        """Level of each token of the newest proposal, by column and row."""

    @property
    def selection(self) -> LayerSelection:
        """The layers, in the order in which they run."""
        return (*self.layers.shared, *self.layers.own)

    def seconds(self, num_drafted: int) -> float:
        """Return what so many drafted tokens take, with their check."""
        if num_drafted == 0:
            return self._all_checks.seconds(1)
        check_s = self._checks.seconds(num_drafted + 1) or self._all_checks.seconds(num_drafted + 1)
        return num_drafted * self._steps.seconds(1) + check_s

    def at_most_s(self, num_drafted: int) -> float:
        """Return what they may take, with their check."""
        return num_drafted * self._steps.seconds(1) + self._all_checks.at_most_s(num_drafted + 1)

    def worth(self, running: Sequence[bool], room: int, rate: float) -> float:
        """Return what is gained by as many tokens as are worth their time."""
        return best_length([self._chances.mean ** sum(running)] * room, self.seconds, rate)[1]

    def propose(
        self, texts: CheckedTexts, choice: TokenChoice, running: Sequence[bool], room: int, rate: float
    ) -> DraftedTokens:
        """Draft tokens, as long as one more is worth its time."""
        proposal, chain, rows = DraftedTokens(self.layers), 1.0, sum(running)
        self._levels = []
        while len(self._levels) < room and (not self._levels or self._is_worth_more(chain, rows, rate)):
            start_s = now_s(texts.ids.device)
            levels = levels_of(proposal.draft(texts, choice))
            if self._is_warm:
                self._steps.add(1, now_s(texts.ids.device) - start_s)
            self._levels.append(levels)
            for level, runs in zip(levels, running, strict=True):
                chain *= self._chances.of(level) if runs else 1.0
        return proposal

    def learn(self, running: Sequence[bool], stays: Sequence[Tensor], check_s: float) -> None:
        """See which tokens stayed, (B,) for each column, and how long the check took."""
        if self._is_warm:
            count = len(self._levels) + 1
            if count not in self._checks:
                self._checks.add(count, self._all_checks.seconds(count))
            self._checks.add(count, check_s)
        self._is_warm = True
        for levels, stayed in zip(self._levels, stays, strict=False):
            for level, runs, stay in zip(levels, running, stayed.tolist(), strict=True):
                if runs:
                    self._chances.add(level, stay)

    def see(self, confidences: Tensor, stays: Tensor) -> None:
        """See tokens, (N,), that the draft found in a text that is known, and which of them are full depth's."""
        for level, stay in zip(levels_of(confidences), stays.tolist(), strict=True):
            self._chances.add(level, stay)

    def _is_worth_more(self, chain: float, rows: int, rate: float) -> bool:
        count = len(self._levels)
        return chain * self._chances.mean**rows > rate * (self.seconds(count + 1) - self.seconds(count))


def levels_of(confidences: Tensor) -> list[int]:
    """Return the level of each confidence, (N,)."""
    levels: list[int] = torch.bucketize(confidences.float(), torch.tensor(BORDERS, device=confidences.device)).tolist()
    return levels
