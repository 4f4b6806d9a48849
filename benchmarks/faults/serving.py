"""Kill processes that serve a model at random instants; see whether the others give the whole answer.

    python benchmarks/faults/serving.py [--kills N] [--seed S]

Six processes on this machine hold three stages, two of them each. `generate`, with and without draws, and `evaluate`
run over them in turn. Once all have loaded, one of the six is killed with SIGKILL at a random instant: in half of all
cases the one that reads the prompt and prints. What the others print is compared with what one process prints.
"""

import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click

from common.command import write_whole
from common.one_machine import free_port, rank_environment
from common.small_experiment import small_experiment
from common.table import machine, rows_table

HERE = Path(__file__).parent
NUM_NODES = 6
STAGE_SIZES = (2, 2, 2)
LIMIT_S = 120.0
"""Seconds after which processes that have not ended count as hanging."""
PRELOADED = [
    "skippipe.inference.distributed.serving",
    "skippipe.inference.evaluation.perplexity",
    "skippipe.inference.generation.text_generation",
    "transformers.models.llama.modeling_llama",
]
GENERATE = ["generate", "RUN", "--prompt", "line 3 of text 4", "--max-new-tokens", "300", "--device", "cpu", "--json"]
COMMANDS = {
    "generate": GENERATE,
    "generate --do-sample": [*GENERATE, "--do-sample", "--temperature", "1.3", "--seed", "5"],
    "evaluate": ["evaluate", "RUN", "--batches", "24", "--policy", "full", "random", "--device", "cpu", "--json"],
}
TIMES = ("duration_s",)
"""What differs from one run to the next."""


@dataclass
class Outcome:
    """What came of one command over several processes, of which one may have been killed."""

    command: str
    victim: int | None
    prints: bool
    """Whether the victim was the one that prints."""
    at_s: float = 0.0
    """When it was killed, from the moment at which all had loaded."""
    duration_s: float = 0.0
    """From that moment until all had ended."""
    exit_codes: list[int | None] = field(default_factory=list)
    right: int = 0
    """How many processes have printed the right answer, the victim among them if it was done with that."""
    wrong: int = 0
    """How many have printed another one."""
    error: str = ""

    @property
    def came_too_late(self) -> bool:
        """Whether the victim had ended well before the signal came: this is to be tried again."""
        return self.victim is not None and self.exit_codes[self.victim] == 0

    @property
    def went_on(self) -> bool:
        """Whether there is the right answer, all others ended well, and nobody was left."""
        expected = [-signal.SIGKILL if rank == self.victim else 0 for rank in range(NUM_NODES)]
        return not self.error and self.right > 0 == self.wrong and self.exit_codes == expected


def make_run(folder: Path) -> Path:
    """Train a model for a step; its weights are large enough for different tokens to come out."""
    from skippipe.planning.experiment_plan import plan_experiment
    from skippipe.training.train_experiment import train_experiment

    plan = folder / "given.plan.json"
    experiment = small_experiment(
        folder,
        "served",
        NUM_NODES,
        pipeline={"stage_sizes": STAGE_SIZES, "planner": {"max_evaluations": 200}},
        model={
            "options": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
            | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259, "initializer_range": 0.2}
        },
        training={"max_steps": 1, "num_microbatches": 6},
    )
    plan_experiment(experiment).save(plan)
    train_experiment(experiment, plan)
    return experiment.run_path


def answer_of(path: Path) -> dict[str, Any] | None:
    """Return what a process printed, without times; None where that is no whole answer."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return None
    return {key: value for key, value in found.items() if key not in TIMES}


def run_command(arguments: Sequence[str], place: dict[str, str], output: Path, ready: Path) -> None:
    """Run a command as one process of several, or as the only one; `ready` appears when all have loaded."""
    import torch

    from skippipe.cli.main import main
    from skippipe.inference.distributed.serving_group import ServingGroup

    torch.set_num_threads(1)
    os.environ.update(place)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        with output.with_suffix(suffix).open("w") as stream:
            os.dup2(stream.fileno(), descriptor)
    next_epoch = ServingGroup.next_epoch

    def next_epoch_and_mark(self: ServingGroup, *given: Any, **named: Any) -> None:
        next_epoch(self, *given, **named)
        ready.touch()

    ServingGroup.next_epoch = next_epoch_and_mark  # type: ignore[method-assign]  # nothing else says that all are ready
    main(list(arguments))


def start(arguments: Sequence[str], folder: Path, world_size: int) -> list[ForkServerProcess]:
    """Start a command over some processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, processes = free_port(), []
    for rank in range(world_size):
        environment = rank_environment(rank, world_size, "127.0.0.1", port) if world_size > 1 else {}
        output = folder / str(rank)
        processes.append(context.Process(target=run_command, args=(arguments, environment, output, folder / "ready")))
        processes[-1].start()
    return processes


def attempt(folder: Path, command: list[str], expected: dict[str, Any] | None, outcome: Outcome) -> None:
    """Run a command over six processes and kill the victim."""
    processes = start(command, folder, NUM_NODES)
    deadline_s = time.monotonic() + LIMIT_S
    while not (folder / "ready").exists() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    begun_s = time.monotonic()
    if outcome.victim is not None:
        time.sleep(outcome.at_s)
        processes[outcome.victim].kill()
    for process in processes:
        process.join(max(0.1, deadline_s - time.monotonic()))
        outcome.exit_codes.append(process.exitcode)
    outcome.duration_s = time.monotonic() - begun_s
    for process in processes:
        if process.is_alive():
            outcome.error = "a process hangs"
            process.kill()
            process.join()
    printed = [answer_of(folder / f"{rank}.out") for rank in range(NUM_NODES)]
    outcome.right = sum(answer == expected for answer in printed if answer is not None)
    outcome.wrong = sum(answer != expected for answer in printed if answer is not None)


def alone(place: Path, command: Sequence[str]) -> dict[str, Any] | None:
    """Return what one process prints."""
    (process,) = start(command, place, 1)
    process.join(LIMIT_S)
    return answer_of(place / "0.out")


def summary(name: str, outcomes: Sequence[Outcome], undisturbed_s: float) -> dict[str, Any]:
    """Return what all runs of a command together show."""
    late_s = [outcome.duration_s - undisturbed_s for outcome in outcomes]
    of_printing_s = [late for late, outcome in zip(late_s, outcomes, strict=True) if outcome.prints]
    return {
        "command": name,
        "kills": len(outcomes),
        "whole and right answer": sum(outcome.went_on for outcome in outcomes),
        "kills of the one that prints": len(of_printing_s),
        "undisturbed, s": round(undisturbed_s, 2),
        "later than that, median s": _median(late_s),
        "longest s": max((round(late, 2) for late in late_s), default=None),
        "where the one that prints was killed, median s": _median(of_printing_s),
        "failed": [f"{outcome}" for outcome in outcomes if not outcome.went_on],
    }


def _median(durations_s: Sequence[float]) -> float | None:
    return round(statistics.median(durations_s), 2) if durations_s else None


@click.command()
@click.option("--kills", default=50, show_default=True, help="Of all commands together.")
@click.option("--seed", default=0, show_default=True, help="It gives the victims and the random instants.")
def main(kills: int, seed: int) -> None:
    """Run all and write serving.json and serving.md beside this file."""
    from skippipe.inference.distributed.stage_assignment import assign_stages
    from skippipe.inference.inference_run import read_inference_run

    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = make_run(folder)
        printing = assign_stages(read_inference_run(run), [None] * NUM_NODES, ()).drivers[0]
        others = [rank for rank in range(NUM_NODES) if rank != printing]
        for index, (name, words) in enumerate(COMMANDS.items()):
            command = [str(run) if word == "RUN" else word for word in words]
            expected = alone(Path(tempfile.mkdtemp(dir=folder)), command)
            calm = [Outcome(name, None, prints=False) for _ in range(3)]
            for outcome in calm:
                attempt(Path(tempfile.mkdtemp(dir=folder)), command, expected, outcome)
                report(outcome)
            undisturbed_s = statistics.median(outcome.duration_s for outcome in calm)
            generator, outcomes = random.Random(f"{name}/{seed}"), list[Outcome]()
            while len(outcomes) < len(range(index, kills, len(COMMANDS))):
                prints = generator.random() < 0.5
                victim = printing if prints else generator.choice(others)
                outcome = Outcome(name, victim, prints, generator.uniform(0.0, undisturbed_s))
                attempt(Path(tempfile.mkdtemp(dir=folder)), command, expected, outcome)
                if not outcome.came_too_late:
                    report(outcome)
                    outcomes.append(outcome)
            rows.append(summary(name, outcomes, undisturbed_s))
    result = {"rows": rows, "date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    write_whole(HERE / "serving.json", json.dumps(result, indent=1) + "\n")
    write_whole(HERE / "serving.md", page(result))


def report(outcome: Outcome) -> None:
    """Say what came of a run."""
    click.echo(f"{'yes' if outcome.went_on else 'NO '}  {outcome}")


def page(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
    title = f"# Lost processes of a served model: {NUM_NODES} processes, stages of {', '.join(map(str, STAGE_SIZES))}"
    about = "Made by `serving.py`; see [the guide](../README.md)."
    return "\n".join([title, "", about, "", *rows_table(result["rows"]), f"- {where}"]) + "\n"


if __name__ == "__main__":
    main()
