"""Prompts as text, continued by a loaded model under a policy."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import LayerSelection
from skippipe.inference.generation.drafts.automatic_draft import AutomaticDraft
from skippipe.inference.generation.drafts.drafter import Drafter, FixedDraft
from skippipe.inference.generation.generation import Generated, check_prompts, generate, positions_after_prompt
from skippipe.inference.generation.sampling import Sampling
from skippipe.inference.generation.speculative import Speculated, check_speculation, draft_layers, speculate
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.policies.base import PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.inference.policies.registry import check_keep
from skippipe.inference.prompt_tokenizer import PromptTokenizer, streaming
from skippipe.inference.text_source import TextSource
from skippipe_scheduler.errors import refuse_text


@dataclass(frozen=True)
class TextOptions:
    """How prompts are continued.

    Examples:
        >>> options = TextOptions(policy="exit", keep=0.5, max_new_tokens=6, num_drafted=3)
        >>> drafted = generate_texts(model, ["import "], options)
        >>> greedy = generate_texts(model, ["import "], TextOptions(max_new_tokens=6))
        >>> drafted.texts == greedy.texts  # drafts are checked at full depth
        True
    """

    policy: str = "full"
    """Which part of the model runs: `NAME` or `NAME:ARGUMENT`."""
    keep: float = 1.0
    """Share of the layers' compute."""
    max_new_tokens: int = 64
    """The most new tokens of each prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    """Its seed is that of random stages too."""
    num_drafted: int | Literal["auto"] | None = None
    """Tokens that the policy drafts before each check at full depth; None where nothing is drafted.

    `"auto"`: their number is chosen while decoding, and so is what drafts: lookups in the text, or layers, those of the
    policy where that is not `full`.
    """
    calibration: tuple[Path, ...] = ()
    """Text for policies that are calibrated; the text that the model is trained on where there is none."""

    def __post_init__(self) -> None:
        refuse_text(self.calibration, "calibration")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens}; give at least 1")
        drafted = self.num_drafted
        if drafted not in (None, "auto") and not (isinstance(drafted, int) and drafted >= 1):
            raise InputError(f"num_drafted: {drafted!r}; give a number of at least 1, 'auto' or None")


@dataclass(frozen=True)
class Continuation:
    """What follows the prompts.

    Examples:
        >>> continuation = generate_texts(model, ["import ", "def "], TextOptions(max_new_tokens=4))
        >>> len(continuation.texts), continuation.num_tokens
        (2, 8)
    """

    texts: list[str]
    """In the order of the prompts, without them."""
    result: Generated | Speculated
    """The same as tokens, and what it took."""
    duration_s: float
    """Wall-clock seconds of the generation, without loading and calibration."""
    known_of_each: int = 0
    """How many tokens of each prompt another process had generated before this one took its place."""

    @property
    def num_tokens(self) -> int:
        """New tokens of all prompts together."""
        return sum(map(len, self.result.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Tokens that were generated here, in a second."""
        return sum(max(0, len(tokens) - self.known_of_each) for tokens in self.result.tokens) / self.duration_s


def generate_texts(
    model: LoadedModel, prompts: Sequence[str], options: TextOptions, *, stream: bool = False
) -> Continuation:
    """Continue prompts as one batch, with a part of the model.

    Args:
        model: What `load_model` returns.
        prompts: The texts to continue.
        options: Which part of the model runs, and how the text is chosen.
        stream: Print the only prompt and its text to standard output, as they come.

    Returns:
        What follows each prompt, and how much of the model made it.

    Raises:
        InputError: The policy, share or draft cannot be had, a prompt is empty, or prompt and answer do not fit into
            the model's context.

    Examples:
        >>> options = TextOptions(policy="exit", keep=0.5, max_new_tokens=8)
        >>> continuation = generate_texts(model, ["import "], options)
        >>> continuation.num_tokens, round(continuation.result.share_of_generated, 2)
        (8, 0.5)
    """
    refuse_text(prompts, "prompts")
    check_keep(options.policy, options.keep)
    tokenizer, decoder = PromptTokenizer(model), model.decoder
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    text = TextSource(model)
    context = PolicyContext(
        decoder,
        options.keep,
        seed=options.sampling.seed,
        num_generated=positions_after_prompt(options.max_new_tokens),
        calibration=lambda: text.calibration_tokens(options.calibration).to(decoder.device),
    )
    policy = build_policy(options.policy, context).sample(0)
    layers = draft_layers(policy, decoder) if options.num_drafted is not None else ()
    limits: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "eos_id": tokenizer.end_ids}
    # What may be refused is, before anything is printed.
    check = check_prompts if options.num_drafted is None else check_speculation
    check(decoder, ids, options.max_new_tokens)
    drafter = _drafter(decoder, layers, ids, options) if options.num_drafted is not None else None
    start_s = time.perf_counter()
    result: Generated | Speculated
    with streaming(tokenizer, ids[0] if stream else None) as on_tokens:
        limits |= {"sampling": options.sampling, "on_tokens": on_tokens}
        if drafter is not None:
            result = speculate(decoder, drafter, ids, **limits)
        else:
            result = generate(decoder, policy, ids, progress=model.progress, **limits)
    duration_s = time.perf_counter() - start_s
    texts = [tokenizer.continuation(prompt, tokens) for prompt, tokens in zip(ids, result.tokens, strict=True)]
    return Continuation(texts, result, duration_s, model.progress.num_known)


def _drafter(
    decoder: Decoder, layers: LayerSelection, prompts: Sequence[Sequence[int]], options: TextOptions
) -> Drafter:
    if isinstance(options.num_drafted, int):
        return FixedDraft(decoder, layers, options.num_drafted)
    given = layers if layers != decoder.all_layers else ()
    return AutomaticDraft(decoder, [len(prompt) for prompt in prompts], options.max_new_tokens, given)
