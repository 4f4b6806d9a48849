"""Generation at full, three quarters and half depth beside transformers' own, with a growing and a static cache."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from setting import Bar, Figures, model_options
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from generation.run import seconds
from skippipe.config.experiment import Experiment
from skippipe.inference.decoder import Decoder
from skippipe.inference.generation.drafts.drafter import FixedDraft
from skippipe.inference.generation.generation import generate
from skippipe.inference.generation.speculative import draft_layers, speculate
from skippipe.inference.policies.base import PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.architecture import build_config
from skippipe.model.skeleton import find_parts

BATCH_SIZES = (1, 8, 64)
DEPTHS = (1.0, 0.75, 0.5)
FULL_BAR, HALF_BAR = Bar(at_least=1.0), Bar(at_least=1.8)
PROMPT_TOKENS = 64

Call = Callable[[], object]


def experiments(folder: Path, *, rehearse: bool) -> list[Experiment]:
    """Return none: nothing is trained."""
    return []


def measure(figures: Figures, folder: Path, carried: Path | None) -> None:
    """Let all contenders of a batch size generate in turn, from the same prompts with the same weights."""
    torch.manual_seed(0)
    config = build_config("llama", model_options("124M", rehearse=figures.rehearse))
    dtype = torch.float32 if figures.rehearse else torch.bfloat16
    with figures.device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tokens, repeats = (4, 1) if figures.rehearse else (128, 5)
    for batch_size in BATCH_SIZES:
        prompts = torch.randint(0, model.config.vocab_size, (batch_size, PROMPT_TOKENS))
        _race(figures, _contenders(model, prompts, tokens, figures.device), batch_size, tokens, repeats)
    _draft(figures, model, tokens)


def _contenders(model: PreTrainedModel, prompts: torch.Tensor, tokens: int, device: torch.device) -> dict[str, Call]:
    decoder = Decoder(find_parts(model))
    calls: dict[str, Call] = {
        f"ours, {depth:.0%} depth": _ours(decoder, prompts.tolist(), depth, tokens) for depth in DEPTHS
    }
    on_device = prompts.to(device)
    for name, cache in (("transformers", None), ("transformers, static cache", "static")):
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0, cache_implementation=cache
        )
        calls[name] = _theirs(model, on_device, settings)
    return calls


def _ours(decoder: Decoder, prompts: Sequence[Sequence[int]], depth: float, tokens: int) -> Call:
    policy = build_policy("full" if depth == 1 else "exit", PolicyContext(decoder, depth, num_generated=tokens))
    return lambda: generate(decoder, policy, prompts, max_new_tokens=tokens)


def _theirs(model: PreTrainedModel, prompts: torch.Tensor, settings: GenerationConfig) -> Call:
    mask = torch.ones_like(prompts)
    return lambda: model.generate(prompts, attention_mask=mask, generation_config=settings)


def _race(figures: Figures, calls: dict[str, Call], batch_size: int, tokens: int, repeats: int) -> None:
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):  # the first warms up
        for name, call in calls.items():
            taken_s = seconds(_finished(call, figures.device))
            if number:
                times_s[name].append(taken_s)
    for name, taken in times_s.items():
        figures.add(f"batch {batch_size}: {name}", tokens * batch_size / statistics.median(taken), "tokens/s")

    def ratio(own: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(times_s[own], times_s[other], strict=True))

    full, half = ratio("ours, 100% depth", "transformers"), ratio("ours, 50% depth", "ours, 100% depth")
    figures.add(f"batch {batch_size}: ours to transformers, full depth", full, "", FULL_BAR)
    figures.add(f"batch {batch_size}: half to full depth, ours", half, "", HALF_BAR)


def _draft(figures: Figures, model: PreTrainedModel, tokens: int) -> None:
    """Let half the depth draft; weights are random, so what counts is the time of a pass, not what is accepted."""
    decoder = Decoder(find_parts(model))
    prompts = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS)).tolist()
    layers = draft_layers(build_policy("exit", PolicyContext(decoder, 0.5, num_generated=tokens)), decoder)
    draft = FixedDraft(decoder, layers)
    made = speculate(decoder, draft, prompts, max_new_tokens=tokens)
    taken_s = seconds(_finished(lambda: speculate(decoder, draft, prompts, max_new_tokens=tokens), figures.device))
    figures.add(f"batch 1: drafts at half depth, {made.acceptance:.0%} accepted", tokens / taken_s, "tokens/s")


def _finished(call: Call, device: torch.device) -> Call:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
