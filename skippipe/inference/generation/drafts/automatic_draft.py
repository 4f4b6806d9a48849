"""Drafts that choose themselves, again before each check: a lookup in the text, some layers, or none.

Each is worth what it is expected to bring less what its time would bring otherwise, by chances and times that are
measured while decoding. Where neither is worth its time, the whole model decodes token by token. What drafts may lose
until that is known is limited from the first one on, as in conservative bandits (Wu et al. 2016, arXiv 1602.04282):
only what is left of a small part of the time, and what they have gained, may be put at risk.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.generation.checked_texts import CheckedTexts
from skippipe.inference.generation.drafts.clock import now_s
from skippipe.inference.generation.drafts.drafter import DraftedTokens, Drafter
from skippipe.inference.generation.drafts.gain import PassTimes, Speed, most_affordable
from skippipe.inference.generation.drafts.layer_draft import LayerDraft
from skippipe.inference.generation.drafts.layer_search import LayerSearch
from skippipe.inference.generation.drafts.lookup_draft import LookupDraft
from skippipe.inference.generation.sampling import TokenChoice

MOST_DRAFTED = 15
"""Tokens before a check."""
PLAIN_EVERY = 48
"""After so many checks of drafts two tokens are decoded without, as at the beginning. The second one tells what that
takes: the first is slower, as it finds other things in the processor's caches."""
MARGIN = 0.05
"""Tokens that a draft has to gain at least: what is measured is not exact."""
SEARCH_SHARE = 0.015
"""Part of the time of decoding without drafts that the search for layers may take."""
LOST_SHARE = 0.01
"""Part of the time of decoding without drafts that drafts may lose: a token's time at least. With the search it stays
below the 3% by which an answer may be slower than without drafts."""
RISKED_PART = 1 / 3
"""Part of what drafts may still lose that a draft of several tokens may: where tokens are dear to check, the first long
one took all of it, and nothing was drafted in the rest of a text that repeats itself."""
SAVED_SHARE = 0.1
"""Part of the time saved by drafts that it may take beside that."""
STEP = 2
"""Tokens of the whole model in whose time a step of the search is expected to be done, until one took longer."""


class AutomaticDraft(Drafter):
    """Drafts with what is expected to be fastest. B rows."""

    def __init__(
        self,
        decoder: Decoder,
        lengths: Sequence[int],
        max_new_tokens: int,
        layers: LayerSelection = (),
        *,
        lookups: bool = True,
    ) -> None:
        """Prompts have these `lengths`; where there are `layers`, they are the only ones that are drafted with.

        Without `lookups`, layers alone draft.

        Raises `InputError` where other processes hold layers.
        """
        if not decoder.is_here(decoder.all_layers):
            raise InputError(
                "--speculative auto: it looks into layers, some of which lie in other processes here; "
                "say a number of tokens and a policy, or start one process without torchrun"
            )
        self._padding = [max(lengths) - length for length in lengths]
        self._max_new_tokens, self._device = max_new_tokens, decoder.device
        self._checks, self._speed = PassTimes(), Speed()
        self._lookup, self._looks_up = LookupDraft(self._checks), lookups
        self._search = LayerSearch(decoder, self._checks, min(lengths), MOST_DRAFTED, layers)
        self._used: LookupDraft | LayerDraft | None = None
        """What made the newest proposal."""
        self._running = [True] * len(lengths)
        self._since_plain = PLAIN_EVERY
        """Checks of drafts since a token without was timed."""
        self._was_plain = False
        self._searched_s = self._longest_s = self._start_s = 0.0
        self._gained_s = 0.0
        """Seconds that drafts have saved, less those that they have lost."""
        self._has_given_up = False
        self._looked_up = self._by_layers = 0

    @property
    def num_known(self) -> int:
        """Of how many of the prompts' last columns the choices of full depth are of use."""
        return self._search.window

    @property
    def kept_from(self) -> dict[str, int]:
        """How many tokens were kept from lookups and from layers."""
        return {"lookups in the text": self._looked_up, "layers": self._by_layers}

    def watching(self) -> AbstractContextManager[object]:
        """Return a context for the next pass of the whole model."""
        return self._search.watching()

    def propose(self, texts: CheckedTexts, choice: TokenChoice, running: Tensor, room: int) -> DraftedTokens:
        """Draft with what gains most, if anything does."""
        self._used, room = None, min(room, MOST_DRAFTED)
        self._start_s = now_s(self._device)
        if room == 0 or self._since_plain >= PLAIN_EVERY or self._has_given_up:
            return DraftedTokens()
        whole_s = self._checks.seconds(1)
        may_lose_s = max(1.0, LOST_SHARE * self._max_new_tokens) * whole_s + self._gained_s
        if self._checks.at_most_s(2) > whole_s + may_lose_s:
            self._has_given_up = True
            return DraftedTokens()
        may_take_s = max(self._checks.at_most_s(2), whole_s + RISKED_PART * may_lose_s)
        self._running, rate = running.tolist(), self._speed.rate(whole_s)
        self._search_on(texts, rate, whole_s)
        layers, least = self._search.found, 1 - rate * whole_s + MARGIN
        looked_up = self._look_up(texts, room, rate, may_take_s) if self._looks_up else least
        if layers is not None:
            room = most_affordable(layers.at_most_s, room, may_take_s)
            if layers.worth(self._running, room, rate) > max(looked_up, least):
                self._used = layers
                return layers.propose(texts, choice, self._running, room, rate)
        if looked_up > least:
            self._used = self._lookup
            return self._lookup.propose(texts)
        return DraftedTokens()

    def _look_up(self, texts: CheckedTexts, room: int, rate: float, may_take_s: float) -> float:
        """Return what a lookup gains that takes at most so long."""
        self._lookup.read(texts, self._padding)
        return self._lookup.worth(self._running, most_affordable(self._lookup.at_most_s, room, may_take_s), rate)

    def learn(self, proposal: DraftedTokens, stays: Sequence[Tensor], check_s: float) -> None:
        """See what stayed, and how long the check took."""
        kept = sum(bool(stayed.all()) for stayed in stays)
        was_plain, self._was_plain = self._was_plain, self._used is None
        if self._used is None:
            if was_plain:
                self._since_plain = 0
                self._checks.add(1, check_s)
        else:
            self._since_plain += 1
            self._learn_of_draft(proposal, stays, check_s, kept)
        if 1 in self._checks:
            self._speed.add(kept + 1, now_s(self._device) - self._start_s)

    def _learn_of_draft(self, proposal: DraftedTokens, stays: Sequence[Tensor], check_s: float, kept: int) -> None:
        kept_tokens = kept * sum(self._running)
        self._gained_s += (kept + 1) * self._checks.seconds(1) - (now_s(self._device) - self._start_s)
        if isinstance(self._used, LayerDraft):
            self._used.learn(self._running, stays, check_s)
            self._by_layers += kept_tokens
        elif self._used is not None:
            self._used.learn(self._running, stays)
            self._checks.add(len(proposal.chances) + 1, check_s)
            self._looked_up += kept_tokens

    def _search_on(self, texts: CheckedTexts, rate: float, whole_s: float) -> None:
        """Search for layers, where there is time for a step."""
        may_take_s = SEARCH_SHARE * self._max_new_tokens * whole_s + SAVED_SHARE * max(0.0, self._gained_s)
        if self._searched_s + max(STEP * whole_s, self._longest_s) <= may_take_s:
            self._search.go_on(texts, self._running, rate)
            done_s = now_s(self._device)
            step_s, self._start_s = done_s - self._start_s, done_s
            self._searched_s, self._longest_s = self._searched_s + step_s, max(self._longest_s, step_s)
