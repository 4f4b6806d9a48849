"""Speed of generation beside transformers' `generate`, in one command; see benchmarks/README.md.

    python benchmarks/generation/run.py [--only NAME ...] [--model DIR] [--quick]

All contenders of a row generate the same number of tokens from the same prompts with the same weights, in turn.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from common.command import chosen, folder_of_results, record
from common.table import MARKS, Columns, Result, machine
from skippipe.inference.decoder import Decoder
from skippipe.inference.generation.generation import Generated, generate
from skippipe.inference.policies.base import PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.model.architecture import build_config
from skippipe.model.skeleton import find_parts

HERE = Path(__file__).resolve().parent
SIZES = {"hidden_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 1408}
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Row:
    """A policy at a share, and how much faster than what it has to be.

    There is no bar where the prompt runs deeper than the share, as in unified and skipdecode, nor for skipped blocks.
    """

    batch_size: int
    policy: str
    keep: float
    against: str
    bar: float | None


ROWS = {
    f"{policy} {keep:.0%}, batch {batch_size}": Row(batch_size, policy, keep, against, bar)
    for batch_size in (1, 8)
    for policy, keep, against, bar in [
        ("full", 1.0, "transformers", 1.0),
        ("exit", 0.5, "our full depth", 1.8),
        ("unified", 0.5, "our full depth", None),
        ("skipdecode", 0.5, "our full depth", None),
        ("ffn-skip", 0.75, "our full depth", None),
    ]
}
COLUMNS: Columns = {
    "row": lambda result: result["name"],
    "against": lambda result: result["against"],
    "bar": lambda result: "" if result["bar"] is None else f"{result['bar']:.2f}",
    "ratio of tokens/s": lambda result: f"{result['ratio']:.2f} ({result['lowest']:.2f} to {result['highest']:.2f})",
    "computed": lambda result: f"{result['share_of_prompt']:.0%} / {result['share_of_generated']:.0%}",
    "met": lambda result: MARKS[result["met"]],
    "tokens/s": lambda result: f"{result['tokens_per_s']:.1f}",
    "model": lambda result: result["model"],
}


@click.command()
@click.option("--only", multiple=True, help="Rows whose names contain this; may be repeated.")
@click.option("--model", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Other weights.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--quick", is_flag=True, help="A few tokens; the bars then mean nothing.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of results.md and results.json.")
def main(only: tuple[str, ...], folder: Path | None, threads: int, quick: bool, out: Path | None) -> None:
    """Measure the rows of the table; write it and print it. Rows that are not measured stay as they were."""
    torch.set_num_threads(threads)
    names = chosen(ROWS, only)
    model = load(folder, quick)
    title = "Results of the benchmark of generation"
    place = folder_of_results(out, quick or folder is not None, HERE)
    record(ROWS, names, place, lambda name: measure(name, model, folder, quick), (title, COLUMNS))


def load(folder: Path | None, quick: bool) -> PreTrainedModel:
    """Return the model: Llama layers with random weights, or the given one."""
    torch.manual_seed(0)
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    sizes = SIZES | {"vocab_size": 8192} | ({"hidden_size": 64, "intermediate_size": 128} if quick else {})
    return AutoModelForCausalLM.from_config(build_config("llama", sizes)).eval()


def measure(name: str, model: PreTrainedModel, folder: Path | None, quick: bool) -> Result:
    """Run the row's contenders in turn; return the median of the ratios of their times."""
    row, tokens, repeats = ROWS[name], 4 if quick else 48, 2 if quick else 7
    decoder = Decoder(find_parts(model))
    prompts = torch.randint(0, model.config.vocab_size, (row.batch_size, PROMPT_TOKENS))
    own = ours(decoder, prompts.tolist(), row.policy, row.keep, tokens)
    reference = (
        theirs(model, prompts, tokens)
        if row.against == "transformers"
        else ours(decoder, prompts.tolist(), "full", 1.0, tokens)
    )
    made = own()
    if row.against == "transformers" and made.tokens != reference().tokens:
        raise ValueError("both must generate the same tokens")
    times_s = [(seconds(reference), seconds(own)) for _ in range(repeats + 1)][1:]
    ratios = [reference_s / own_s for reference_s, own_s in times_s]
    return {
        "name": name,
        "quick": quick,
        "against": row.against,
        "bar": row.bar,
        "met": None if row.bar is None else median(ratios) >= row.bar,
        "share_of_prompt": made.share_of_prompt,
        "share_of_generated": made.share_of_generated,
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "ratios": ratios,
        "tokens_per_s": tokens * row.batch_size / median(own_s for _, own_s in times_s),
        "model": folder.name if folder else "Llama, 16 layers of width 512" if not quick else "tiny Llama",
        "date": datetime.now(UTC).date().isoformat(),
        **machine(HERE.parents[1]),
    }


def ours(
    decoder: Decoder, prompts: Sequence[Sequence[int]], policy: str, keep: float, tokens: int
) -> Callable[[], Generated]:
    """Return a call that generates under a policy."""
    text = torch.randint(0, decoder.config.vocab_size, (2, 129))
    chosen_policy = build_policy(policy, PolicyContext(decoder, keep, num_generated=tokens, calibration=lambda: text))
    return lambda: generate(decoder, chosen_policy, prompts, max_new_tokens=tokens)


def theirs(model: PreTrainedModel, prompts: torch.Tensor, tokens: int) -> Callable[[], Generated]:
    """Return a call of transformers' own generation."""
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0)
    mask = torch.ones_like(prompts)

    def call() -> Generated:
        made = model.generate(prompts, attention_mask=mask, generation_config=settings)
        return Generated(made[:, prompts.shape[1] :].tolist(), 1.0, 1.0)

    return call


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
