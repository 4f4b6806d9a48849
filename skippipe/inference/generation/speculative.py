"""Self-speculative decoding: a part of the model drafts tokens, the whole of it checks them all at once.

The draft may be an early exit (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710, 3.3) or any subset of the layers
(Draft & Verify, Zhang et al. 2023, arXiv 2309.08168). Layers at the bottom that both share in the same order are
computed once for a drafted token: their keys, values and outputs stay for the check. What the draft's other layers
wrote is forgotten before the check. The answer is that of greedy decoding at full depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection, Segment
from skippipe.inference.generation.generation import EndOfText, check_prompts, end_tokens, up_to_end
from skippipe.inference.key_value_cache import RouteCache
from skippipe.inference.policies.base import Policy, fixed_layers


@dataclass(frozen=True)
class Speculated:
    """New tokens of each prompt, and how good the drafts were."""

    tokens: list[list[int]]
    drafted: int
    accepted: int
    checks: int
    """Passes of the whole model after the prompt."""

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that full depth would have chosen too."""
        return self.accepted / self.drafted if self.drafted else 1.0

    @property
    def summary(self) -> str:
        """How good the drafts were, in words."""
        return f"{self.acceptance:.1%} of {self.drafted} drafted tokens were right, {self.checks} passes at full depth"


def speculate_all(
    decoder: Decoder, draft: LayerSelection, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options: Any
) -> Speculated:
    """Continue prompts one after the other, since each accepts drafts at its own pace; see `speculate`."""
    check_prompts(decoder, prompts, max_new_tokens)
    results = [speculate(decoder, draft, prompt, max_new_tokens=max_new_tokens, **options) for prompt in prompts]
    return Speculated(
        tokens=[result.tokens[0] for result in results],
        drafted=sum(result.drafted for result in results),
        accepted=sum(result.accepted for result in results),
        checks=sum(result.checks for result in results),
    )


@torch.inference_mode()
def speculate(
    decoder: Decoder,
    draft: LayerSelection,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    num_drafted: int = 4,
    eos_id: EndOfText = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Speculated:
    """Continue one prompt; `draft` are the layers that draft `num_drafted` tokens before each check.

    Raises `InputError` where prompt and answer do not fit into the context, or the draft is no part of the model.
    """
    check_prompts(decoder, [prompt], max_new_tokens)
    if num_drafted < 1:
        raise InputError(f"--speculative {num_drafted}: at least one token has to be drafted before a check")
    if decoder.must_read_again(len(prompt), len(prompt) + max_new_tokens):
        raise InputError(
            f"--speculative: prompt and answer pass position {decoder.rope_border}, where the model's longrope takes "
            "other factors; leave --speculative out, or ask for fewer new tokens"
        )
    if not draft:
        raise InputError("the draft runs no layers")
    speculation = _Speculation(decoder, draft, len(prompt) + max_new_tokens)
    ends, tokens = end_tokens(eos_id), [speculation.read(prompt)]
    drafted = accepted = checks = 0
    _tell(on_tokens, tokens)
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        room = max_new_tokens - len(tokens) - 1
        proposal = speculation.draft_after(tokens[-1], min(num_drafted, room))
        chosen = speculation.check()
        agreed = next((index for index, token in enumerate(proposal) if token != chosen[index]), len(proposal))
        new = up_to_end(chosen[: agreed + 1], ends)
        speculation.keep(agreed + 1)
        drafted, accepted, checks = drafted + len(proposal), accepted + agreed, checks + 1
        tokens += new
        _tell(on_tokens, new)
    return Speculated([tokens], drafted, accepted, checks)


def draft_layers(policy: Policy, decoder: Decoder) -> LayerSelection:
    """Return the layers that `policy` runs after a prompt; raise `InputError` where those are not a fixed set."""
    layers = fixed_layers(policy, decoder)
    if layers is None:
        raise InputError(
            "--speculative: a draft runs the same whole layers, or halves, for every token; "
            "use policy exit, unified, best, random, file:... or stages:..."
        )
    return layers


class _Speculation:
    """The cache of one text and the tokens in front of it that are not checked yet; hidden size D."""

    def __init__(self, decoder: Decoder, draft: LayerSelection, capacity: int) -> None:
        self._decoder = decoder
        layers = decoder.all_layers
        common = next((at for at, layer in enumerate(draft) if layer != layers[at]), len(draft))
        self._shared, self._draft_only, self._rest = layers[:common], draft[common:], layers[common:]
        self._cache = RouteCache(decoder.num_layers, capacity)
        self._checked = 0
        self._hidden: list[Tensor] = []
        """Output of the shared layers for each token that is not checked, (1, 1, D)."""

    def read(self, prompt: Sequence[int]) -> int:
        """Run the prompt at full depth; return the first new token."""
        ids = torch.tensor([list(prompt)], device=self._decoder.device)  # (1, P)
        route = [Segment(self._decoder.all_layers, len(prompt))]
        logits = self._decoder.logits(ids, route, cache=self._cache, num_last=1)
        self._checked = len(prompt)
        return int(logits[0, -1].argmax())

    def draft_after(self, token: int, count: int) -> list[int]:
        """Draft `count` tokens after a token that is not in the cache yet; the last one's shared layers run too."""
        drafted: list[int] = []
        for index in range(count + 1):
            hidden = self._shared_output(token)
            if index == count:
                break
            if self._draft_only:
                self._cache.seen -= 1
                hidden = self._decoder.run_layers(hidden, self._draft_only, cache=self._cache)
                self._cache.seen += 1
            token = int(self._decoder.head(hidden)[0, -1].argmax())
            drafted.append(token)
        return drafted

    def check(self) -> list[int]:
        """Return what full depth chooses after each token that is not checked."""
        self._cache.forget(self._checked, self._rest)
        self._cache.seen = self._checked
        hidden = torch.cat(self._hidden, dim=1)  # (1, t, D)
        if self._rest:
            hidden = self._decoder.run_layers(hidden, self._rest, cache=self._cache)
        chosen: list[int] = self._decoder.head(hidden)[0].argmax(dim=-1).tolist()  # (t,)
        return chosen

    def keep(self, count: int) -> None:
        """Keep the first `count` tokens that were checked; forget the others."""
        self._checked += count
        self._cache.forget(self._checked, self._decoder.all_layers)
        self._cache.seen = self._checked
        self._hidden.clear()

    def _shared_output(self, token: int) -> Tensor:
        """Run the shared layers for the next token; (1, 1, D)."""
        ids = torch.tensor([[token]], device=self._decoder.device)
        position = torch.tensor([[self._cache.seen]], device=self._decoder.device)
        hidden = self._decoder.embed(ids, position, layers=self._shared, cache=self._cache)
        self._cache.seen += 1
        self._hidden.append(hidden)
        return hidden


def _tell(on_tokens: Callable[[Tensor], None] | None, tokens: Sequence[int]) -> None:
    if on_tokens is not None:
        for token in tokens:
            on_tokens(torch.tensor([token]))
