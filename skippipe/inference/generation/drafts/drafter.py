"""What drafts tokens before each check, and the draft by fixed layers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.generation.checked_texts import CheckedTexts, DraftLayers
from skippipe.inference.generation.sampling import TokenChoice


@dataclass
class DraftedTokens:
    """Tokens that stand drafted behind the texts. B rows, V vocabulary."""

    layers: DraftLayers | None = None
    """The layers that drafted them; None where no layer did."""
    chances: list[Tensor | None] = field(default_factory=list)
    """How likely each token was to be drafted, (B, V), for each drafted column; None where nothing was drawn."""

    def draft(self, texts: CheckedTexts, choice: TokenChoice) -> Tensor:
        """Draft one more token in each row with the layers; return how likely they find it, (B,)."""
        if self.layers is None:
            raise ValueError("no layers draft here")
        column = texts.length + len(self.chances)
        tokens, chances = choice.draft(texts.ids[:, :column], texts.draft(self.layers, column - 1))
        texts.ids[:, column] = tokens
        self.chances.append(chances)
        return chances.gather(1, tokens.unsqueeze(1)).squeeze(1)


class Drafter:
    """Drafts tokens for one batch. This one drafts none. B rows."""

    @property
    def num_known(self) -> int:
        """Of how many of the prompts' last columns the choices of full depth are of use."""
        return 1

    def watching(self) -> AbstractContextManager[object]:
        """Return a context for the next pass of the whole model."""
        return nullcontext()

    def propose(self, texts: CheckedTexts, choice: TokenChoice, running: Tensor, room: int) -> DraftedTokens:
        """Draft up to `room` tokens behind the texts; `running`, (B,), says which rows have not ended."""
        return DraftedTokens()

    def learn(self, proposal: DraftedTokens, stays: Sequence[Tensor], check_s: float) -> None:
        """See what a check said, in `check_s` seconds.

        `stays` has for each token that was judged, (B,), whether it stays; behind one that goes none is judged.
        """

    @property
    def kept_from(self) -> dict[str, int]:
        """How many tokens were kept from what; nothing where there is no choice."""
        return {}


class FixedDraft(Drafter):
    """Drafts the same number of tokens with the same layers before each check."""

    def __init__(self, decoder: Decoder, layers: LayerSelection, num_drafted: int = 4) -> None:
        """Raise `InputError` where there are no layers or no tokens."""
        if num_drafted < 1:
            raise InputError(f"--speculative {num_drafted}: at least one token has to be drafted before a check")
        if not layers:
            raise InputError("the draft runs no layers")
        self._layers = DraftLayers.of(layers, decoder.all_layers)
        self._num_drafted = num_drafted

    def propose(self, texts: CheckedTexts, choice: TokenChoice, running: Tensor, room: int) -> DraftedTokens:
        """Draft tokens with the layers."""
        proposal = DraftedTokens(self._layers)
        for _ in range(min(self._num_drafted, room)):
            proposal.draft(texts, choice)
        return proposal
