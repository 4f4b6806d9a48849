"""`skippipe generate`: text from a model of which a part runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from skippipe.cli.shared_options import ABSENT, DEVICE, POLICIES, PolicyCommand, node_names
from skippipe.cli.user_path import SEED, UserPath
from skippipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skippipe.inference.generation.text_generation import Continuation, TextOptions
    from skippipe.inference.model_loading import LoadedModel

FILE = UserPath()


class _Drafted(click.IntRange):
    """A number of tokens, or `auto`."""

    name = "N|auto"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


@click.command("generate", cls=PolicyCommand)
@click.argument("path", metavar="RUN_OR_DIR", type=FILE)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; several make a batch.")
@click.option("--policy", default="full", show_default=True, help=POLICIES)
@click.option("--keep", type=float, help="Share of the layers' compute; all of it where not given.")
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
    type=_Drafted(),
    help="Draft so many tokens with the policy, check them at full depth; the text is that of full depth. auto: choose "
    "their number and the layers, or lookups in the text, while decoding; with a policy, its layers alone.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of tokens and random stages.")
@click.option("--stages", "num_stages", type=click.IntRange(min=1), help="Split into so many stages, not the plan's.")
@click.option("--absent", multiple=True, metavar="NODE", help=ABSENT)
@click.option("--calibration", multiple=True, type=FILE, help="Text for calibrated policies, not the training text.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=DEVICE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    path: Path,
    prompts: tuple[str, ...],
    num_stages: int | None,
    absent: tuple[str, ...],
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a text with a model of which only a share of the layers' compute runs.

    RUN_OR_DIR is a run (its newest checkpoint) or a Hugging Face directory. One prompt streams to the terminal, several
    are computed together and printed at the end. Options of sampling are those of transformers. Start it with torchrun
    to spread a run's stages over several processes.
    """
    from skippipe.inference.distributed.session import open_model
    from skippipe.inference.generation.text_generation import generate_texts
    from skippipe.monitor.terminal import say

    chosen = _text_options(**options)
    with open_model(path, device=device, num_stages=num_stages, absent=node_names(absent)) as model:
        if model is None:
            return
        found = generate_texts(model, prompts, chosen, stream=len(prompts) == 1 and not as_json)
        if as_json:
            click.echo(json.dumps(_as_json(model, chosen, prompts, found)))
            return
        if len(prompts) > 1:
            click.echo("\n\n".join(prompt + text for prompt, text in zip(prompts, found.texts, strict=True)))
        speed = f"{found.num_tokens} tokens, {found.tokens_per_s:.1f} tokens/s"
        say(f"{model.name}, {model.checkpoint}, policy {chosen.policy}: {speed}; {found.result.summary}", err=True)
        if model.decoder.absence:
            say(model.decoder.absence, err=True)


def _as_json(
    model: "LoadedModel", options: "TextOptions", prompts: "Sequence[str]", found: "Continuation"
) -> dict[str, Any]:
    described = {"model": model.name, "checkpoint": model.checkpoint, "policy": options.policy, "keep": options.keep}
    described["absent_stages"] = sorted(model.decoder.absent_stages)
    pairs = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, found.texts, strict=True)]
    return described | {"texts": pairs, "duration_s": found.duration_s} | asdict(found.result)


def _text_options(
    policy: str,
    keep: float | None,
    max_new_tokens: int,
    num_drafted: int | Literal["auto"] | None,
    calibration: tuple[Path, ...],
    **sampling: Any,
) -> "TextOptions":
    """Return what is asked for; what the sampling refuses is said before a model is loaded."""
    from skippipe.inference.generation.sampling import Sampling
    from skippipe.inference.generation.text_generation import TextOptions
    from skippipe.inference.policies.registry import check_keep

    chosen = Sampling(**sampling)
    for name in () if chosen.do_sample else ("temperature", "top_k", "top_p"):
        if sampling[name] != getattr(Sampling, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} {sampling[name]:g}: without --do-sample the likeliest token is taken; "
                "give that too, or leave this out"
            )
    chosen.processors()
    share = 1.0 if keep is None else keep
    check_keep(policy, share)
    return TextOptions(policy, share, max_new_tokens, chosen, num_drafted, calibration)
