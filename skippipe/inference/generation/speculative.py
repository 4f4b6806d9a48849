"""Self-speculative decoding: a part of the model drafts tokens, the whole of it checks them all at once.

The draft may be an early exit (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710, 3.3), any subset of the layers
(Draft & Verify, Zhang et al. 2023, arXiv 2309.08168), or chosen anew while decoding. The answer is that of decoding at
full depth: the same tokens where the likeliest is taken, and the same distribution where tokens are drawn.

The rows of a batch stay in step: as many drafted tokens are kept in each as are right in all rows that have not ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.generation.checked_texts import CheckedTexts
from skippipe.inference.generation.drafts.clock import now_s
from skippipe.inference.generation.drafts.drafter import DraftedTokens, Drafter
from skippipe.inference.generation.generation import (
    EndOfText,
    OnTokens,
    Prompts,
    check_prompts,
    end_tokens,
    up_to_end,
)
from skippipe.inference.generation.sampling import Sampling, TokenChoice
from skippipe.inference.policies.base import Policy, fixed_layers


@dataclass(frozen=True)
class Speculated:
    """New tokens of each prompt, and how good the drafts were."""

    tokens: list[list[int]]
    drafted: int
    accepted: int
    """Drafted tokens that were kept."""
    checks: int
    """Passes of the whole model after the prompts."""
    kept_from: dict[str, int] = field(default_factory=dict)
    """How many of the kept ones are from what, where drafts choose themselves."""

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that full depth would have chosen too."""
        return self.accepted / self.drafted if self.drafted else 1.0

    @property
    def summary(self) -> str:
        """How good the drafts were, in words."""
        rate = f"{self.acceptance:.1%} of {self.drafted} drafted tokens were right, {self.checks} passes at full depth"
        origins = ", ".join(f"{count} from {origin}" for origin, count in self.kept_from.items())
        return f"{rate}; kept: {origins}" if origins else rate


@torch.inference_mode()
def speculate(
    decoder: Decoder,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_id: EndOfText = None,
    on_tokens: OnTokens | None = None,
) -> Speculated:
    """Continue prompts as one batch; `drafter` drafts tokens before each check. Other arguments as in `generate`.

    Raises `InputError` for what `check_speculation` refuses.
    """
    check_speculation(decoder, prompts, max_new_tokens)
    rounds = _Rounds(decoder, prompts, max_new_tokens, sampling or Sampling(), end_tokens(eos_id), on_tokens)
    rounds.run(drafter)
    return Speculated(rounds.answers(), rounds.drafted, rounds.accepted, rounds.checks, drafter.kept_from)


def check_speculation(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `InputError` for what `check_prompts` refuses, and where longrope takes other factors behind the prompts.

    A check that goes beyond that position turns other tokens by them than decoding token by token does.
    """
    check_prompts(decoder, prompts, max_new_tokens)
    longest = max(map(len, prompts))
    border = decoder.rope_border(longest, longest + max_new_tokens)
    if border is not None:
        raise InputError(
            f"--speculative: prompt and answer pass position {border}, where the model's longrope takes "
            "other factors; leave --speculative out, or ask for fewer new tokens"
        )


def draft_layers(policy: Policy, decoder: Decoder) -> LayerSelection:
    """Return the layers that `policy` runs after a prompt; raise `InputError` where those are not a fixed set."""
    layers = fixed_layers(policy, decoder)
    if layers is None:
        raise InputError(
            "--speculative: a draft runs the same whole layers, or halves, for every token; "
            "use policy exit, unified, best, random, file:... or stages:..."
        )
    return layers


class _Rounds:
    """Drafts and checks of one batch, B rows, until all have ended or there is no room left."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        ends: frozenset[int],
        on_tokens: OnTokens | None,
    ) -> None:
        batch = Prompts.of(prompts, max_new_tokens, decoder.device)
        self._texts = CheckedTexts(decoder, batch, max_new_tokens)
        self._choice = TokenChoice(sampling, batch.lengths, decoder.device)
        self._end, self._ends, self._on_tokens = self._texts.length + max_new_tokens, ends, on_tokens
        self._end_ids = torch.tensor(sorted(ends), device=decoder.device, dtype=torch.long)
        self._ended = torch.zeros(len(prompts), dtype=torch.bool, device=decoder.device)
        self.drafted = self.accepted = self.checks = 0

    def answers(self) -> list[list[int]]:
        """Return the new tokens of each row, up to its end."""
        rows: list[list[int]] = self._texts.text[:, self._texts.prompt_length :].tolist()
        return [up_to_end(row, self._ends) for row in rows]

    def run(self, drafter: Drafter) -> None:
        """Read the prompts, then draft and check."""
        texts = self._texts
        with drafter.watching():
            logits = texts.read(num_known=drafter.num_known)
        is_done = self._take(self._choice.choose(texts.text, logits))
        while not is_done:
            proposal = drafter.propose(texts, self._choice, ~self._ended, self._end - texts.length - 1)
            start_s = now_s(texts.ids.device)
            with drafter.watching():
                checked = texts.check(proposal.layers, len(proposal.chances))
            running = int((~self._ended).sum())
            stays, is_done = self._keep(proposal, checked)
            texts.settle()
            drafter.learn(proposal, stays, now_s(texts.ids.device) - start_s)
            self.drafted += len(proposal.chances) * running
            self.accepted += sum(map(_all, stays)) * running
            self.checks += 1

    def _keep(self, proposal: DraftedTokens, logits: Tensor) -> tuple[list[Tensor], bool]:
        """Keep drafted tokens as long as they stay in all rows, and one token of the model's own.

        Returns for each token that was judged whether it stays, (B,), and whether all is done.
        """
        texts, judged = self._texts, []
        for index, chances in enumerate(proposal.chances):
            drafted = texts.ids[:, texts.length]
            tokens, stays = self._choice.check(texts.text, logits[:, index], drafted, chances)
            stays |= self._ended
            judged.append(stays)
            is_done = self._take(tokens)
            if is_done or not _all(stays):
                return judged, is_done
        return judged, self._take(self._choice.choose(texts.text, logits[:, -1]))

    def _take(self, tokens: Tensor) -> bool:
        """Add a token to each row, (B,); return whether all is done."""
        self._texts.append(tokens)
        if self._on_tokens is not None:
            self._on_tokens(tokens)
        if self._ends:
            self._ended |= torch.isin(tokens, self._end_ids)
        return self._texts.length == self._end or (bool(self._ends) and _all(self._ended))


def _all(marks: Tensor) -> bool:
    return bool(marks.all())
