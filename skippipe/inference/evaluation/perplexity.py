"""Perplexity of a model against the share of its layers' compute that is kept."""

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from skippipe.data.samples import Batch
from skippipe.errors import InputError, NodeLostError, SkipPipeError
from skippipe.inference.decoder import Decoder
from skippipe.inference.depth_schedule import layers_run, segments, share_computed
from skippipe.inference.evaluation.choice_saving import check_choice, save_choice
from skippipe.inference.evaluation.exact_answers import ExactAnswers
from skippipe.inference.evaluation.layer_drawing import draw_layers
from skippipe.inference.evaluation.lm_eval_tasks import TaskOptions, Tasks
from skippipe.inference.evaluation.question_kinds import questions_of_all_kinds
from skippipe.inference.model_loading import LoadedModel, load_model
from skippipe.inference.policies.base import Policy, PolicyContext
from skippipe.inference.policies.construction import build_policy
from skippipe.inference.policies.registry import find_policy
from skippipe.inference.text_source import TextSource
from skippipe.monitor.evaluation_results import DepthResult, Evaluation, TaskResult, write_evaluation
from skippipe_scheduler.errors import refuse_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PerplexityOptions:
    """How to evaluate: which text, how much of it, and what of each sample is a prompt.

    Examples:
        >>> options = PerplexityOptions(num_batches=2, sequence_length=32, prompt_length=8)
        >>> evaluate(model, policies=["full"], keeps=[1.0], options=options).tokens  # 2 batches x 2 rows x 24 positions
        96
    """

    num_batches: int = 24
    """The most batches of text; a batch has the model's `training.micro_batch_size` rows."""
    repeats: int = 4
    """How often a policy that draws at random sees the text."""
    seed: int = 0
    """Seed of the policies' random choices."""
    prompt_length: int = 0
    """Positions at the start of each sample that count as prompt: decode-only policies run them in full, and their
    predictions are not measured."""
    sequence_length: int | None = None
    """Positions of a sample; the model's `training.sequence_length` where not given, but at most its context."""
    num_stages: int | None = None
    """Into how many stages `evaluate_model` cuts the model; `evaluate` takes the model as it is."""
    text: tuple[Path, ...] = ()
    """Files of text to measure on; the model's held-out text where there are none."""
    calibration: tuple[Path, ...] = ()
    """Text for policies that are calibrated; the text that the model is trained on where there is none."""
    device: str = "auto"
    """Device on which `evaluate_model` loads the model: auto, cpu or cuda."""
    questions: int = 0
    """Questions of each kind (`question_kinds.KINDS`) to answer after each perplexity, by exact match."""
    save_choice: Path | None = None
    """File for the layers that ran, of one policy at one share, for `file:CHOICE` and `export`."""
    tasks: TaskOptions | None = None
    """Tasks of lm-eval to run after each perplexity."""

    def __post_init__(self) -> None:
        refuse_text(self.text, "text")
        refuse_text(self.calibration, "calibration")
        for name, least in (("num_batches", 1), ("repeats", 1), ("prompt_length", 0), ("questions", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)}; give at least {least}")


def evaluate_model(
    path: Path, *, policies: Sequence[str], keeps: Sequence[float], options: PerplexityOptions | None = None
) -> Evaluation:
    """Evaluate a run's newest checkpoint or a Hugging Face directory in one process; see `evaluate`."""
    options = options or PerplexityOptions()
    model = load_model(path, device=options.device, num_stages=options.num_stages)
    return evaluate(model, policies=policies, keeps=keeps, options=options)


def evaluate(
    model: LoadedModel,
    *,
    policies: Sequence[str],
    keeps: Sequence[float],
    options: PerplexityOptions | None = None,
) -> Evaluation:
    """Measure the perplexity of a model under policies; a run gets evaluation.json, unless stages of it are absent.

    All policies and shares see the same batches of text. A policy that draws at random draws anew for each batch,
    `options.repeats` times over. Perplexity is the exponential of the mean loss (nats per token) over all of them.

    Args:
        model: What `load_model` returns.
        policies: `NAME` or `NAME:ARGUMENT` each; `skippipe evaluate --help` lists them.
        keeps: Shares of the layers' compute to keep, above 0 and up to 1. Every policy is measured at each; one whose
            argument decides what runs, only once.
        options: Which text and how much of it; the defaults of `PerplexityOptions` where not given.

    Returns:
        The results, by policy and then by share, in the order given.

    Raises:
        InputError: Something is wrong with text, policy, share or tasks; nothing has been measured then.
        NodeLostError: A process that served layers is gone.

    Examples:
        >>> options = PerplexityOptions(num_batches=1)
        >>> evaluation = evaluate(model, policies=["exit", "stages:0,2"], keeps=[1.0, 0.5], options=options)
        >>> for result in evaluation.results:
        ...     print(result.policy, result.kept_layers, f"{result.share_computed:.0%}")
        exit 6.0 100%
        exit 3.0 50%
        stages:0,2 4.0 67%
        >>> evaluation.results[0].perplexity < 257  # what guessing among the 257 tokens would have
        True
    """
    refuse_text(policies, "policies")
    options = options or PerplexityOptions()
    tasks = Tasks(options.tasks) if options.tasks is not None else None
    text = TextSource(model, sequence_length=options.sequence_length)
    _check_lengths(text.sequence_length, options.prompt_length, model.decoder)
    calibration = cache(lambda: text.calibration_tokens(options.calibration).to(model.decoder.device))
    context = PolicyContext(
        decoder=model.decoder,
        keep=1.0,
        seed=options.seed,
        num_generated=text.sequence_length - options.prompt_length,
        calibration=calibration,
    )
    exact = ExactAnswers(model, questions_of_all_kinds(options.questions, 0)) if options.questions else None
    built = list(_build_policies(policies, keeps, context))
    if options.save_choice is not None:
        check_choice(built, model.decoder)
    batches = text.validation_batches(options.num_batches, options.text)
    absent = frozenset(model.progress.step(lambda: sorted(model.decoder.absent_stages)))
    results: list[DepthResult] = []
    of_tasks: list[TaskResult] = []
    for name, keep, policy in built:
        measurement = _Measurement(model, options.prompt_length, text.sequence_length)
        results.append(measurement.run(batches, policy, name, keep, options.repeats))
        if exact is not None:
            of_tasks += _in_one_step(model, partial(exact.run, policy, name, keep))
        if tasks is not None:
            of_tasks += _in_one_step(model, partial(tasks.run, model, policy, name, keep))
        if model.decoder.absent_stages != absent:
            raise NodeLostError("a stage was lost while measuring; start again with --absent NODE for its node")
    tokens = sum(labels[:, options.prompt_length :].numel() for _, labels in batches)
    evaluation = Evaluation(
        model=model.name,
        checkpoint=model.checkpoint,
        tokens=tokens,
        policies=list(policies),
        results=results,
        absent_stages=sorted(absent),
        tasks=of_tasks,
    )
    if model.run_dir is not None and not absent:
        _keep(evaluation, model.run_dir / "evaluation.json")
    if options.save_choice is not None:
        save_choice(evaluation, built[0][2], model.decoder, options.save_choice)
    return evaluation


def _keep(evaluation: Evaluation, path: Path) -> None:
    """Write what is kept in a run; that may be somebody else's."""
    try:
        write_evaluation(evaluation, path)
    except SkipPipeError as reason:
        logger.warning("%s; the results are not kept in the run", reason)


class _Measurement:
    """Losses and compute of one policy over the batches."""

    def __init__(self, model: LoadedModel, prompt_length: int, sequence_length: int) -> None:
        self._decoder, self._progress, self._prompt_length = model.decoder, model.progress, prompt_length
        self._positions = range(sequence_length)
        self._losses: list[list[float]] = []
        self._shares: list[float] = []
        self._layers: list[float] = []

    def run(self, batches: Sequence[Batch], policy: Policy, name: str, keep: float | None, repeats: int) -> DepthResult:
        is_random = policy.sample(0) is not policy and policy.num_stages != len(self._decoder.present_stages)
        for repeat in range(repeats if is_random else 1):
            self._losses.append([])
            for index, batch in enumerate(batches):
                drawn = policy.sample(repeat * len(batches) + index)
                loss, share, layers = self._progress.step(partial(self._measure, drawn, batch))
                self._losses[-1].append(loss)
                self._shares.append(share)
                self._layers.append(layers)
        perplexities = [math.exp(statistics.fmean(repeat)) for repeat in self._losses]
        share = statistics.fmean(self._shares)
        return DepthResult(
            policy=name,
            keep=share if keep is None else keep,
            kept_stages=policy.num_stages,
            kept_layers=statistics.fmean(self._layers),
            share_computed=share,
            perplexity=math.exp(statistics.fmean(loss for repeat in self._losses for loss in repeat)),
            perplexity_std=statistics.pstdev(perplexities),
            samples=len(self._shares),
            layers=draw_layers(policy, self._decoder, self._positions[self._prompt_length :], self._prompt_length),
        )

    def _measure(self, policy: Policy, batch: Batch) -> tuple[float, float, float]:
        """Return the loss, the share of the layers' compute, and how many layers ran."""
        input_ids, labels = (tensor.to(self._decoder.device) for tensor in batch)  # (B, T) each
        layers_of = [policy.layers_at(position, self._prompt_length) for position in self._positions]
        with policy.installed(self._decoder) as meter, torch.inference_mode():
            if meter is not None:
                meter.begin(torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids))
            loss = self._decoder.loss(input_ids, labels, segments(layers_of), first=self._prompt_length)
        skipped_flop = meter.skipped_flop / len(input_ids) if meter is not None else 0.0
        count, cost = self._decoder.num_layers, self._decoder.cost
        share = share_computed(layers_of, count, cost, skipped_flop=skipped_flop)
        return float(loss), share, statistics.fmean(map(layers_run, layers_of))


def _in_one_step(model: LoadedModel, run: Callable[[], Iterable[TaskResult]]) -> list[TaskResult]:
    found = model.progress.step(lambda: [result.model_dump() for result in run()])
    return [TaskResult.model_validate(result) for result in found]


def _build_policies(
    names: Sequence[str], keeps: Sequence[float], context: PolicyContext
) -> Iterator[tuple[str, float | None, Policy]]:
    """Yield each policy at each share; once without a share where it decides that itself, and full depth once."""
    for name in names:
        entry, argument = find_policy(name)
        if entry.decides(argument):
            yield name, None, build_policy(name, context)
        else:
            for keep in keeps if name != "full" else [1.0]:
                yield name, keep, build_policy(name, context.with_keep(keep))


def _check_lengths(sequence_length: int, prompt_length: int, decoder: Decoder) -> None:
    if sequence_length > decoder.context:
        raise InputError(f"--sequence-length {sequence_length}: the model's context is {decoder.context} positions")
    if not 0 <= prompt_length < sequence_length:
        raise InputError(
            f"--prompt-length {prompt_length}: samples have {sequence_length} positions, and one has to be left"
        )
