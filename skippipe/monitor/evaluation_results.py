"""evaluation.json: what `skippipe evaluate` writes and reports read."""

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from skippipe.errors import InputError
from skippipe_scheduler.files import parse, read_json, write_atomically

ALWAYS, AT_TIMES, IN_PART, ATTENTION, FEED_FORWARD, NEVER_RUN = "#", "+", "~", "a", "f", "."
"""A layer that runs, runs at some positions or in some draws, lacks its feed-forward block for some tokens, runs with
its attention or its feed-forward block alone, or never runs."""


class DepthResult(BaseModel):
    """Perplexity under one policy at one share of the depth."""

    model_config = ConfigDict(frozen=True)

    policy: str
    keep: float
    """The share that was asked for; what the policy came to, where it decides that itself."""
    kept_stages: int | None
    """None where the policy does not choose stages."""
    kept_layers: float
    """Layers that ran, mean over the positions."""
    share_computed: float
    """Share of the layers' FLOP that was really computed."""
    perplexity: float
    perplexity_std: float
    """Standard deviation over the repeats, which differ in the random choices of stages alone."""
    samples: int
    """Batches evaluated over all repeats, each with a choice of stages of its own."""
    layers: str = ""
    """One character a layer, of the positions after the prompt: `#` runs, `+` at some of them or in some draws, `~`
    without its feed-forward block for some tokens, `a` or `f` with its attention or its feed-forward block alone, `.`
    never. Empty in files that were written before it came."""


class TaskResult(BaseModel):
    """One metric of one task, of lm-eval or a kind of questions, under one policy at one share of the depth."""

    model_config = ConfigDict(frozen=True)

    task: str
    policy: str
    keep: float
    """The share that was asked for; what the policy came to, where it decides that itself."""
    share_computed: float
    """Share of the layers' FLOP that was really computed for the task's requests."""
    metric: str
    """As lm-eval names it, with the filter of the answers behind a comma where there is one."""
    value: float
    standard_error: float | None
    documents: int


class Evaluation(BaseModel):
    """A model's results under some policies. Fields with a default came later: files of before lack them.

    Examples:
        >>> options = PerplexityOptions(num_batches=1)
        >>> evaluation = evaluate(model, policies=["exit"], keeps=[0.5, 1.0], options=options)
        >>> [result.kept_layers for result in evaluation.by_policy()["exit"]]
        [6.0, 3.0]
    """

    model_config = ConfigDict(frozen=True)

    model: str
    """Name of the run, or of the directory that the model came from."""
    checkpoint: str
    """Name of the checkpoint."""
    tokens: int
    """Tokens of the text whose prediction was measured."""
    policies: list[str]
    """The policies as they were asked for."""
    results: list[DepthResult]
    """Perplexity, layers and compute of each policy at each share of the depth."""
    absent_stages: list[int] = []
    """Stages that no node held."""
    tasks: list[TaskResult] = []
    """Results of questions and of lm-eval's tasks, where such were asked for."""

    @model_validator(mode="after")
    def _results_of_these_policies(self) -> Self:
        unknown = sorted({result.policy for result in self.results} - set(self.policies))
        if unknown:
            raise ValueError(f"results: {unknown[0]!r} is none of the policies ({', '.join(self.policies)})")
        return self

    def by_policy(self) -> dict[str, list[DepthResult]]:
        """Return the results of each policy, the deepest first."""
        found: dict[str, list[DepthResult]] = {policy: [] for policy in self.policies}
        for result in sorted(self.results, key=lambda result: -result.share_computed):
            found[result.policy].append(result)
        return found


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote; raise `InputError` where it is missing or wrong."""
    return parse(Evaluation, read_json(path, InputError), str(path), InputError)


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write `evaluation` as JSON; raise `SkipPipeError` where that fails."""
    write_atomically(path, json.dumps(evaluation.model_dump(), indent=1) + "\n")
