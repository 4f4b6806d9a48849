"""Tasks of EleutherAI's lm-eval (arXiv 2405.14782), run under a policy: what the parts left out cost in answers."""

import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from skippipe.errors import InputError, did_you_mean
from skippipe.inference.depth_schedule import Flop
from skippipe.inference.model_loading import LoadedModel
from skippipe.inference.policies.base import Policy
from skippipe.inference.prompt_tokenizer import PromptTokenizer
from skippipe.monitor.evaluation_results import TaskResult

RESAMPLINGS = 1000
"""For the standard errors of metrics that have no formula."""
SEED = 1234
"""Of the examples, that of lm-eval's own runs."""
NO_FILTER = "none"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how; names as in lm-eval."""

    names: tuple[str, ...]
    """Tasks, groups and tags that lm-eval knows or that `include_path` holds, and YAML files."""
    include_path: Path | None = None
    limit: int | None = None
    """Documents of each task, all where None."""
    num_fewshot: int | None = None
    """Examples before each document; what the task says where None."""
    batch_size: int = 16


class Tasks:
    """Tasks, loaded once and run under one policy after the other."""

    def __init__(self, options: TaskOptions) -> None:
        """Raises `InputError` where lm-eval is missing, a task is unknown, or its data cannot be read."""
        if find_spec("lm_eval") is None:
            raise InputError("--lm-eval-tasks: the package lm-eval is missing; pip install 'skippipe[lm-eval]'")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork this process to estimate errors
        self._options = options
        with redirect_stdout(sys.stderr):
            self._loaded = _loaded(options)

    def run(self, model: LoadedModel, policy: Policy, name: str, keep: float | None) -> Iterator[TaskResult]:
        """Run all tasks under a policy and yield their metrics; raise `InputError` for a task that asks too much."""
        from lm_eval.evaluator import evaluate

        from skippipe.inference.evaluation.lm_eval_adapter import PolicyModel

        options = self._options
        adapter = PolicyModel(model.decoder, PromptTokenizer(model), policy, batch_size=options.batch_size)
        self._choose_examples()
        with redirect_stdout(sys.stderr):
            found = evaluate(adapter, self._loaded, limit=options.limit, log_samples=False, bootstrap_iters=RESAMPLINGS)
        for task, metrics in (found["results"] | found.get("groups", {})).items():
            share = _flop_of(task, adapter.flop, found["group_subtasks"]).share
            for metric, value, error in _metrics(metrics):
                kept = share if keep is None else keep
                yield TaskResult(
                    task=task,
                    policy=name,
                    keep=kept,
                    share_computed=share,
                    metric=metric,
                    value=value,
                    standard_error=error,
                    documents=metrics["sample_len"],
                )

    def _choose_examples(self) -> None:
        """Make all tasks ask the same under every policy; a task that wants no examples gets none."""
        random.seed(SEED)
        np.random.seed(SEED)
        for task in self._loaded["tasks"].values():
            wanted, asked = task.get_config("num_fewshot"), self._options.num_fewshot
            task.set_config(key="num_fewshot", value=(wanted if asked is None or wanted == 0 else asked) or 0)
            task.set_fewshot_seed(seed=SEED)


def _loaded(options: TaskOptions) -> Any:
    """Return the tasks and groups as lm-eval holds them.

    Its own tasks are thousands of files, which are read only where a name is neither a file nor below `include_path`.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include_path, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in options.names):
        manager = TaskManager(include_path=options.include_path)
    for name in options.names:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise InputError(f"--lm-eval-tasks: no task or file {name!r}{did_you_mean(name, manager.all_tasks)}")
    try:
        loaded: Any = manager.load(list(options.names))
    except Exception as reason:  # readers of data sets raise errors of many kinds
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise InputError(f"--lm-eval-tasks {' '.join(options.names)}: cannot be loaded ({first_line})") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"--lm-eval-tasks: {name} runs code that the model writes, or shows pictures; leave it out"
            )
    return loaded


def _flop_of(task: str, flop: Mapping[str, Flop], children: Mapping[str, list[str]]) -> Flop:
    """Return the FLOP of a task, or of all tasks of a group."""
    return sum((_flop_of(child, flop, children) for child in children.get(task, ())), flop.get(task, Flop()))


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Yield name, value and standard error of each metric from lm-eval's keys, `metric,filter`."""
    for key, value in found.items():
        metric, _, answers = key.partition(",")
        if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{answers}")
        known = isinstance(error, float) and math.isfinite(error)
        yield metric if answers == NO_FILTER else key, float(value), error if known else None
