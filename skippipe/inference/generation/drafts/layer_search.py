"""The search for layers to draft with, on the last tokens of the running text, step by step.

What was computed at full depth says how much attention and feed-forward block of each layer turn the hidden state
(CLaSp, arXiv 2505.24196), and how long they take (KnapSpec, arXiv 2602.20217). Those that turn it least for their time
are left out. Early exits are judged by the head on hidden states that are there already (DEL, arXiv 2504.05598). A
candidate's chance is the share of tokens that it finds as full depth does, in one pass over text that is known.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.generation.checked_texts import CheckedTexts, DraftLayers
from skippipe.inference.generation.drafts.gain import PassTimes
from skippipe.inference.generation.drafts.layer_draft import LayerDraft
from skippipe.inference.generation.drafts.layer_watch import LayerWatch
from skippipe.inference.policies.best.part_costs import BLOCKS, cost_of, half_parts, layer_parts, selection_of
from skippipe.inference.policies.best.subset_choice import one_by_one

WINDOW = 16
"""Tokens at the end of the text that candidates are judged on."""
EXITS = (1 / 6, 1 / 4, 3 / 8, 1 / 2)
"""Shares of the layers of early exits."""
SHARE, FEWER, MORE = 0.5, 0.33, 0.7
"""Shares of the parts' time that are tried: the first, then another one by whether that gains."""
EVERY = 64
"""Tokens after which the search begins again."""


class LayerSearch:
    """The best draft by layers for one batch so far. B rows."""

    def __init__(self, decoder: Decoder, checks: PassTimes, window: int, room: int, given: LayerSelection = ()) -> None:
        """Judge on at most `window` tokens, for drafts of at most `room`; `given` are the only layers, if any."""
        self.found: LayerDraft | None = None
        self.window = min(window, WINDOW)
        self._decoder, self._checks, self._room, self._given = decoder, checks, room, given
        self._prompt, self._step = LayerWatch(self.window), LayerWatch(1)
        self._unwatched = [self._prompt, self._step]
        self._running: Sequence[bool] = ()
        self._rate = 0.0
        self._steps: Iterator[None] | None = None

    def watching(self) -> AbstractContextManager[object]:
        """Return a context for the next pass of the whole model; that of the prompts and the one after are watched."""
        return self._unwatched.pop(0).installed(self._decoder) if self._unwatched else nullcontext()

    def go_on(self, texts: CheckedTexts, running: Sequence[bool], rate: float) -> None:
        """Go one step further, where tokens come at `rate` in a second."""
        self._running, self._rate = running, rate
        if self._steps is None:
            self._steps = self._given_steps(texts) if self._given else self._all_steps(texts)
        next(self._steps, None)

    def _given_steps(self, texts: CheckedTexts) -> Iterator[None]:
        self.found = self._judged(self._given, texts)
        yield

    def _all_steps(self, texts: CheckedTexts) -> Iterator[None]:
        watch, columns = self._prompt, slice(texts.prompt_length - self.window, texts.prompt_length)
        while True:
            self._take_exits(watch, texts.choices[:, columns])
            yield
            gains = self._take(self._judged(self._subset(watch, SHARE), texts))
            yield
            self._take(self._judged(self._subset(watch, FEWER if gains else MORE), texts))
            again = texts.length + EVERY
            while texts.length < again:
                yield
            columns = self._columns(texts)
            watch = LayerWatch(self.window)
            with watch.installed(self._decoder):
                texts.again(self._decoder.all_layers, columns)
            if self.found is not None:
                self._judge(self.found, texts)
            yield

    def _take_exits(self, watch: LayerWatch, choices: Tensor) -> None:
        """Judge early exits by a watched pass, whose choices at full depth are `choices`, (B, t)."""
        layers = self._decoder.all_layers
        for depth in sorted({max(1, round(share * len(layers))) for share in EXITS} - {len(layers)}):
            draft = self._draft(layers[:depth])
            self._see(draft, watch.after[depth - 1], choices)
            self._take(draft)

    def _subset(self, watch: LayerWatch, share: float) -> LayerSelection:
        """Return what is left where the parts that turn the hidden state least for their time are left out."""
        if watch.has_halves:
            parts, damage = half_parts(self._decoder, self._step.half_times_s), watch.influence_of_halves()
        else:
            parts, damage = layer_parts(self._decoder), watch.influence()
        budget = share * cost_of(parts, range(len(parts)))
        return selection_of(parts, one_by_one(parts, budget, damage))

    def _take(self, draft: LayerDraft) -> bool:
        """Take a draft that gains more than the one before; return whether it gains anything."""
        worth = draft.worth(self._running, self._room, self._rate)
        least = 1 - self._rate * self._checks.seconds(1)
        before = self.found.worth(self._running, self._room, self._rate) if self.found is not None else least
        if worth > max(before, least):
            self.found = draft
        return worth > least

    def _judged(self, layers: LayerSelection, texts: CheckedTexts) -> LayerDraft:
        draft = self._draft(layers)
        self._judge(draft, texts)
        return draft

    def _judge(self, draft: LayerDraft, texts: CheckedTexts) -> None:
        """Let a draft find the last tokens of the text."""
        columns = self._columns(texts)
        self._see(draft, texts.again(draft.selection, columns), texts.choices[:, columns])

    def _see(self, draft: LayerDraft, hidden: Tensor, choices: Tensor) -> None:
        confidences, found = self._decoder.head(hidden).float().softmax(dim=-1).max(dim=-1)  # (B, t)
        known = choices >= 0
        draft.see(confidences[known], (found == choices)[known])

    def _draft(self, layers: LayerSelection) -> LayerDraft:
        """Return a draft whose time follows from those of its parts."""
        split, times_s = DraftLayers.of(layers, self._decoder.all_layers), self._step.half_times_s
        by_block = dict(zip(BLOCKS, times_s, strict=True))
        around_s = max(self._checks.seconds(1) - sum(times_s) * len(self._decoder.all_layers), 0.0)
        own_s = sum(sum(times_s) if isinstance(layer, int) else by_block[layer.block] for layer in layers)
        return LayerDraft(split, around_s + own_s, self._checks)

    def _columns(self, texts: CheckedTexts) -> slice:
        """Return the last columns that were run at full depth."""
        return slice(texts.length - 1 - self.window, texts.length - 1)
