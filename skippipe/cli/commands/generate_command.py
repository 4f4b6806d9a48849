"""`skippipe generate`: text from a model of which a part runs."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skippipe.cli.shared_options import ABSENT, DEVICE, POLICIES, PolicyCommand, node_names

if TYPE_CHECKING:
    from skippipe.inference.generation.generation import Generated
    from skippipe.inference.generation.speculative import Speculated

FILE = click.Path(path_type=Path)


@click.command("generate", cls=PolicyCommand)
@click.argument("path", metavar="RUN_OR_DIR", type=FILE)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; several make a batch.")
@click.option("--policy", default="full", show_default=True, help=POLICIES)
@click.option("--keep", type=float, default=1.0, show_default=True, help="Share of the layers' compute.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to write, at most."
)
@click.option("--do-sample", is_flag=True, help="Draw tokens at random instead of taking the likeliest.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="With --do-sample.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, show_default=True, help="With --do-sample; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="With --do-sample.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1, tokens that stand in the text already become less likely.",
)
@click.option(
    "--speculative",
    "num_drafted",
    type=click.IntRange(min=1),
    help="Draft so many tokens with the policy, check them at full depth; the text is that of full depth.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of tokens and random stages.")
@click.option("--stages", "num_stages", type=click.IntRange(min=1), help="Split into so many stages, not the plan's.")
@click.option("--absent", multiple=True, metavar="NODE", help=ABSENT)
@click.option("--calibration", multiple=True, type=FILE, help="Text for calibrated policies, not the training text.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=DEVICE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    path: Path,
    prompts: tuple[str, ...],
    policy: str,
    keep: float,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    num_drafted: int | None,
    seed: int,
    num_stages: int | None,
    absent: tuple[str, ...],
    calibration: tuple[Path, ...],
    device: str,
    as_json: bool,
) -> None:
    """Continue a text with a model of which only a share of the layers' compute runs.

    RUN_OR_DIR is a run (its newest checkpoint) or a Hugging Face directory. One prompt streams to the terminal, several
    are computed together and printed at the end. Options of sampling are those of transformers. Start it with torchrun
    to spread a run's stages over several processes.
    """
    from skippipe.inference.distributed.session import open_model
    from skippipe.inference.generation.generation import Sampling, generate
    from skippipe.inference.generation.speculative import draft_layers, speculate_all
    from skippipe.inference.policies.base import PolicyContext
    from skippipe.inference.policies.construction import build_policy
    from skippipe.inference.text import PromptTokenizer, TextSource, streaming

    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty, seed)
    sampling.processors()
    if num_drafted is not None and sampling.changes_scores:
        raise click.UsageError("--speculative gives the likeliest tokens: leave out --do-sample and the penalty")
    with open_model(path, device=device, num_stages=num_stages, absent=node_names(absent)) as model:
        if model is None:
            return
        tokenizer, decoder = PromptTokenizer(model), model.decoder
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        text = TextSource(model)
        request = PolicyContext(
            decoder,
            keep,
            seed=seed,
            num_generated=max_new_tokens,
            calibration=lambda: text.calibration_tokens(calibration).to(decoder.device),
        )
        chosen = build_policy(policy, request).sample(0)
        draft = draft_layers(chosen, decoder) if num_drafted is not None else ()
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_id": tokenizer.eos_id}
        start_s = time.perf_counter()
        result: Generated | Speculated
        with streaming(tokenizer, ids[0] if len(ids) == 1 and not as_json else None) as on_tokens:
            if num_drafted is not None:
                result = speculate_all(decoder, draft, ids, num_drafted=num_drafted, on_tokens=on_tokens, **limits)
            else:
                result = generate(decoder, chosen, ids, sampling=sampling, on_tokens=on_tokens, **limits)
        duration_s = time.perf_counter() - start_s
    texts = [tokenizer.decode(tokens) for tokens in result.tokens]
    described = {"model": model.name, "checkpoint": model.checkpoint, "policy": policy, "keep": keep}
    described["absent_stages"] = sorted(decoder.absent_stages)
    if as_json:
        pairs = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        click.echo(json.dumps(described | {"texts": pairs, "duration_s": duration_s} | asdict(result)))
        return
    if len(prompts) > 1:
        click.echo("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
    count = sum(map(len, result.tokens))
    speed = f"{count} tokens, {count / duration_s:.1f} tokens/s"
    click.echo(f"{model.name}, {model.checkpoint}, policy {policy}: {speed}; {result.summary}", err=True)
    if decoder.absence:
        click.echo(decoder.absence, err=True)
