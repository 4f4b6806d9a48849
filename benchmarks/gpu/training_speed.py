"""One process, all stages in it, beside a plain loop over the same model: tokens a second, model FLOP utilisation.

Both hold bfloat16 weights with fp32 master copies, use the same AdamW and the same attention, clip, and take their
steps in turn. What is compared is all that surrounds the layers.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from setting import ALONE, Bar, Figures, make_experiment, plans_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from skippipe.config.experiment import Experiment
from skippipe.model.architecture import experiment_model
from skippipe.model.cost import model_cost
from skippipe.model.device import peak_tflop_per_s, torch_dtype
from skippipe.training.loop import open_trainer
from skippipe.training.measurement.utilisation import IterationFlop
from skippipe.training.optimizer.master_adamw import MasterAdamW
from skippipe.training.optimizer.settings import is_fused, parameter_groups
from skippipe.training.signals import StopSignal
from skippipe.training.trainer import Trainer

WARM_UP_STEPS, STEPS = 3, 15
RATIO_BAR, UTILISATION_BAR = Bar(at_least=0.95), Bar(at_least=35)


def experiments(folder: Path, *, rehearse: bool) -> list[Experiment]:
    """Return our side, without and with compiled layers."""
    return [
        make_experiment(
            folder,
            f"speed-{'compiled' if compiled else 'eager'}",
            "124M",
            rehearse=rehearse,
            training={"max_steps": 1000, "compile": compiled},
        )
        for compiled in (False, True)
    ]


def measure(figures: Figures, folder: Path, carried: Path | None) -> None:
    """Let both take their steps in turn, first as they are, then compiled."""
    steps = 2 if figures.rehearse else STEPS
    for experiment in experiments(folder, rehearse=figures.rehearse):
        _compare(figures, experiment, carried, steps)


def _compare(figures: Figures, experiment: Experiment, carried: Path | None, steps: int) -> None:
    how = "compiled" if experiment.training.compile else "eager"
    plans = plans_of(experiment, carried)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        trainer = stack.enter_context(open_trainer(experiment, plans, ALONE))
        plain = PlainLoop(experiment, trainer, figures.device)
        contenders: dict[str, Callable[[], object]] = {
            "plain": plain.step,
            "ours": lambda: trainer.one_step(stop),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(WARM_UP_STEPS + steps):
            for name, call in contenders.items():
                taken_s = _timed(call, figures.device)
                if number >= WARM_UP_STEPS:
                    seconds[name].append(taken_s)
        tokens = trainer.state.tokens_per_step
        cost = model_cost(
            experiment_model(experiment),
            experiment.training.micro_batch_size,
            experiment.training.sequence_length,
            torch_dtype(experiment.training.dtype),
        )
        flop = IterationFlop(cost).of(plans.main)
    ratio = statistics.median(before / own for before, own in zip(seconds["plain"], seconds["ours"], strict=True))
    figures.add(f"{how}: ours to the plain loop, tokens a second", ratio, "", RATIO_BAR)
    peak = peak_tflop_per_s(figures.device, torch_dtype(experiment.training.dtype))
    for name, taken in seconds.items():
        step_s = statistics.median(taken)
        figures.add(f"{how}: {name}", tokens / step_s, "tokens/s")
        if peak is not None:
            share = flop / step_s / 1e12 / peak
            is_bound = how == "eager" and name == "ours"
            bar = UTILISATION_BAR if is_bound else None
            figures.add(f"{how}: {name}, model FLOP utilisation", 100 * share, "%", bar)


class PlainLoop:
    """What one would write without a framework: transformers' model, gradient accumulation, clipping, AdamW."""

    def __init__(self, experiment: Experiment, trainer: Trainer, device: torch.device) -> None:
        training, options = experiment.training, experiment.optimizer
        self._training, self._order, self._device = training, trainer.order, device
        with device:
            model = AutoModelForCausalLM.from_config(experiment_model(experiment), dtype=torch_dtype(training.dtype))
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model: nn.Module = model.train()
        if training.compile:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        self._optimizer = MasterAdamW(
            parameter_groups(self._parameters, options),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            fused=is_fused(options, device),
        )
        self._step = 0

    def step(self) -> float:
        """Take one step; return its mean loss."""
        total = torch.zeros((), device=self._device)
        count, size = self._training.num_microbatches, self._training.micro_batch_size
        for microbatch in range(count):
            input_ids, labels = self._order.batch(self._step, microbatch, count, size)  # (B, T) each
            loss = self._loss(input_ids.to(self._device), labels.to(self._device)) / count
            loss.backward()
            total += loss.detach()
        if self._training.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._training.max_grad_norm)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        self._step += 1
        return float(total)

    def _loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids, use_cache=False).logits  # (B, T, V)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s
