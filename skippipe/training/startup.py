"""What is checked before a run begins: devices, formats, versions and settings, on all ranks, with the remedy."""

import importlib.metadata
import json
import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from skippipe import __version__
from skippipe.config.experiment import Experiment
from skippipe.data.samples import RunText, SampleOrder, num_tokens, text_together
from skippipe.data.token_cache import TokenCache, open_cache
from skippipe.errors import ConfigError, DataError, InputError
from skippipe.model.architecture import experiment_model
from skippipe.model.device import (
    check_dtype,
    choose_device,
    device_identity,
    device_name,
    peak_tflop_per_s,
    torch_dtype,
)
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.cluster import Device, load_cluster

logger = logging.getLogger(__name__)
AGREED = (
    "seed",
    "model",
    "pipeline",
    "recipe",
    "training",
    "lora",
    "optimizer",
    "lr_scheduler",
    "checkpoint",
    "evaluation",
    "comm",
    "recovery",
    "emulation",
)
"""Sections of an experiment that every rank must have alike."""
OWN = ("training.device", "training.threads", "model.directory")
"""Keys among them that may differ from rank to rank."""
BESIDE_TRAINING = ("checkpoint.", "recovery.", "emulation.")
"""Of them, what has no part in what is trained."""
SHOWN_CHARACTERS = 80
"""How much of one setting a message shows."""


class Hardware(NamedTuple):
    """What the run computes on."""

    devices: str
    """In words, such as "7 x NVIDIA H100 80GB HBM3"."""
    peak_tflop_per_s: float | None
    """Sum over all devices, each once; None where one of them is not known."""
    device_types: tuple[Device, ...]
    """What each rank computes on."""


def check_start(experiment: Experiment, plan: Plan, context: DistributedContext) -> Hardware:
    """Check that every rank can do what the experiment asks for, and that all ranks ask for the same.

    All ranks call this together. Raises `ConfigError`, on every rank, naming the first that cannot and the remedy.
    """
    reports = all_gather_json(context, Topic.START, lambda: _report(experiment, context), check=_check_agreement)
    counts = Counter(report["device"] for report in reports)
    devices = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
    return Hardware(devices, _peak(experiment, plan, reports), tuple(report["type"] for report in reports))


def open_samples(experiment: Experiment, plan: Plan, context: DistributedContext) -> SampleOrder:
    """Return the samples of the experiment's text, once all ranks that begin microbatches have read it.

    The others hear of it what they need. All ranks call this together. Raises on every rank what `open_cache` raises on
    any, and `DataError` where ranks have different tokens that should be the same, or different tokenizers.
    """
    is_reader = context.world_size == 1 or plan.nodes[context.rank] in plan.stages[0].nodes
    limit_s = time_limits.TOKENISING_S
    cache = on_all_ranks(context, Topic.TOKENS, lambda: read_tokens(experiment) if is_reader else None, limit_s=limit_s)
    facts = None
    if cache is not None:
        splits = num_tokens(cache)
        facts = {"fingerprint": cache.fingerprint, "tokens": sum(splits.values()), "splits": splits}
        facts |= {"tokenizer": cache.tokenizer.digest, "is_same": experiment.data.same_on_all_hosts}
    told = all_gather_json(context, Topic.SAME_TOKENS, lambda: facts, check=_check_tokens)
    texts = {
        node: RunText(report["fingerprint"], report["splits"])
        for node, report in zip(plan.nodes, told, strict=False)
        if report is not None
    }
    first = next(report for report in told if report is not None)
    text = next(iter(texts.values())) if first["is_same"] else text_together(texts)
    return samples_of(experiment, cache, text, plan.nodes[context.rank])


def samples_of(experiment: Experiment, cache: TokenCache | None, text: RunText, node: str) -> SampleOrder:
    """Return the samples of a node's cache; where it has none so far, of one that it reads when it needs it.

    Raises `DataError` where the cache is not what the run's text says of that node.
    """

    def read() -> TokenCache:
        found = read_tokens(experiment)
        text.check(found, node)
        return found

    if cache is not None:
        text.check(cache, node)
    length = experiment.training.sequence_length
    return SampleOrder(cache or read, seed=experiment.seed, sequence_length=length, text=text)


def read_tokens(experiment: Experiment) -> TokenCache:
    """Return the tokens of the experiment's text on this host; raises as `open_cache` does."""
    return open_cache(experiment.data, experiment.seed, experiment_model(experiment).vocab_size)


def _check_tokens(reports: Sequence[dict[str, Any] | None]) -> None:
    known = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    first_rank, first = known[0]
    for rank, report in known:
        if report["is_same"] != first["is_same"]:
            raise DataError(f"data.same_on_all_hosts: ranks {first_rank} and {rank} differ; set it alike on all")
        if report["tokenizer"] != first["tokenizer"]:
            raise DataError(f"data: rank {rank} has another tokenizer than rank {first_rank}; give every host the same")
        if first["is_same"] and report != first:
            raise DataError(
                f"data: rank {rank} has {report['tokens']:,} tokens ({report['fingerprint']}), rank {first_rank} has "
                f"{first['tokens']:,} ({first['fingerprint']}); give every host the same corpus, or let each have its "
                "own with data.same_on_all_hosts=false"
            )


def check_torch(version: str, requirement: Requirement) -> None:
    """Raise `ConfigError` where torch's `version` is not one that the package was made for."""
    if not requirement.specifier.contains(Version(version).base_version):
        raise ConfigError(
            f"torch {version} is installed, skippipe is made for torch{requirement.specifier}: "
            f"pip install 'torch{requirement.specifier}'"
        )


def torch_requirement() -> Requirement:
    """Return which versions of torch the installed package asks for."""
    entries = map(Requirement, importlib.metadata.requires("skippipe") or ())
    return next(entry for entry in entries if entry.name == "torch")


def _report(experiment: Experiment, context: DistributedContext) -> dict[str, Any]:
    """Return what this rank has and what it was asked for."""
    check_torch(torch.__version__, torch_requirement())
    training = experiment.training
    dtype = torch_dtype(training.dtype)
    device = choose_device(training.device, context.local_rank)
    slow = check_dtype(device, dtype, "training.dtype")
    if slow:
        logger.warning("%s", slow)
    return installed_versions() | {
        "device": device_name(device) if device.type == "cuda" else device.type,
        "type": device.type,
        "identity": f"{platform.node()}/{device_identity(device)}",
        "peak": peak_tflop_per_s(device, dtype),
        "settings": agreed_settings(experiment),
    }


def installed_versions() -> dict[str, str]:
    """Return the versions that must be equal on all ranks, by package."""
    return {"skippipe": __version__, "torch": Version(torch.__version__).base_version}


def agreed_settings(experiment: Experiment) -> dict[str, Any]:
    """Return the keys that must be equal on all ranks, in dotted form."""
    return dict(_flat(experiment.model_dump(mode="json", include=set(AGREED)), ""))


def trained_settings(experiment: Experiment) -> dict[str, Any]:
    """Return what a checkpoint says that it was trained with: settings in dotted form, and versions."""
    agreed = agreed_settings(experiment).items()
    return installed_versions() | {key: value for key, value in agreed if not key.startswith(BESIDE_TRAINING)}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words which settings are not those of `before`; "" where none is.

    What another version of SkipPipe does not know is no change.
    """
    keys = [key for key in now if key in before]
    if before.get("skippipe") == now.get("skippipe"):
        keys = [*now, *(key for key in before if key not in now)]
    return ", ".join(
        f"{key} {_shown(now.get(key))} (before: {_shown(before.get(key))})"
        for key in keys
        if now.get(key) != before.get(key)
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _flat(content: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            entries += _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in OWN:
            entries.append((f"{prefix}{key}", value))
    return entries


def _check_agreement(reports: Sequence[dict[str, Any]]) -> None:
    first = reports[0]
    for rank, report in enumerate(reports[1:], start=1):
        check_same_versions(report, f"rank {rank}", first, "rank 0")
        check_same_settings(report["settings"], f"on rank {rank}", first["settings"], "on rank 0")


def check_same_versions(own: Mapping[str, Any], who: str, others: Mapping[str, Any], other: str) -> None:
    """Raise `ConfigError` naming the first package of which two processes have different versions."""
    for package in installed_versions():
        if own[package] != others[package]:
            raise ConfigError(
                f"{who} has {package} {own[package]}, {other} has {others[package]}; install the same on every host"
            )


def check_same_settings(own: Mapping[str, Any], here: str, others: Mapping[str, Any], there: str) -> None:
    """Raise `ConfigError` naming the first of the agreed settings that is not alike `here` and `there`."""
    for key in sorted(own.keys() | others.keys()):
        if own.get(key) != others.get(key):
            raise ConfigError(
                f"{key} is {own.get(key)!r} {here} and {others.get(key)!r} {there}; "
                "start every rank with the same experiment and overrides"
            )


def _peak(experiment: Experiment, plan: Plan, reports: Sequence[dict[str, Any]]) -> float | None:
    """Return the sum of the devices' peaks: as the cluster file says, else by data sheet, a shared device once."""
    stated: dict[str, float | None] = {}
    with suppress(InputError):  # a plan is enough to train
        stated = {node.name: node.peak_tflop_per_s for node in load_cluster(Path(experiment.cluster)).members()}
    total = 0.0
    counted: set[str] = set()
    for node, report in zip(plan.nodes, reports, strict=False):
        peak = stated.get(node) if len(reports) > 1 else None
        if peak is None:
            if report["identity"] in counted:
                continue
            counted.add(report["identity"])
            peak = report["peak"]
        if peak is None:
            return None
        total += peak
    return total
