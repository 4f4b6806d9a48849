"""`skippipe generate`: text from a model of which a part runs."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skippipe.cli.greedy import POLICIES

if TYPE_CHECKING:
    from skippipe.inference.generation import Generated

FILE = click.Path(path_type=Path)


@click.command("generate")
@click.argument("path", metavar="RUN_OR_DIR", type=FILE)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; several make a batch.")
@click.option("--policy", default="full", show_default=True, help=POLICIES)
@click.option("--keep", type=float, default=1.0, show_default=True, help="Share of the layers' compute.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--do-sample", is_flag=True, help="Draw tokens at random instead of taking the likeliest.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="With --do-sample.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, show_default=True, help="With --do-sample; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="With --do-sample.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of tokens and random stages.")
@click.option("--stages", "num_stages", type=click.IntRange(min=1), help="Split into so many stages, not the plan's.")
@click.option("--calibration", multiple=True, type=FILE, help="Text for calibrated policies, not the training text.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
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
    seed: int,
    num_stages: int | None,
    calibration: tuple[Path, ...],
    device: str,
    as_json: bool,
) -> None:
    """Continue a text with a model of which only a share of the layers' compute runs.

    RUN_OR_DIR is a run (its newest checkpoint) or a Hugging Face directory. One prompt streams to the terminal, several
    are computed together and printed at the end. Options of sampling are those of transformers.
    """
    from skippipe.inference.generation import Sampling, generate
    from skippipe.inference.load import load
    from skippipe.inference.policies.base import Request
    from skippipe.inference.policies.registry import build_policy
    from skippipe.inference.text import PromptTokenizer, TextSource, streaming

    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty, seed)
    sampling.processors()
    model = load(path, device=device, num_stages=num_stages)
    tokenizer = PromptTokenizer(model)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    text = TextSource(model)
    request = Request(
        model.decoder,
        keep,
        seed=seed,
        num_generated=max_new_tokens,
        calibration=lambda: text.calibration_tokens(calibration).to(model.decoder.device),
    )
    chosen = build_policy(policy, request).draw(0)
    start_s = time.perf_counter()
    with streaming(tokenizer, ids[0] if len(ids) == 1 and not as_json else None) as on_tokens:
        generated = generate(
            model.decoder,
            chosen,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_id=tokenizer.eos_id,
            on_tokens=on_tokens,
        )
    seconds = time.perf_counter() - start_s
    texts = [tokenizer.decode(tokens) for tokens in generated.tokens]
    if as_json:
        results = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        described = {"model": model.name, "checkpoint": model.checkpoint, "policy": policy, "keep": keep}
        click.echo(json.dumps(described | {"texts": results, "duration_s": seconds} | asdict(generated)))
        return
    if len(prompts) > 1:
        click.echo("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
    click.echo(f"{model.name}, {model.checkpoint}, policy {policy}: {_summary(generated, seconds)}", err=True)


def _summary(generated: "Generated", seconds: float) -> str:
    count = sum(map(len, generated.tokens))
    return (
        f"{count} tokens, {count / seconds:.1f} tokens/s; share of the layers' compute: "
        f"{generated.share_of_prompt:.1%} for the prompt, {generated.share_of_generated:.1%} after it"
    )
