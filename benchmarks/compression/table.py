"""Results as a page."""

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REFERENCE = "all fp32"
COLUMNS = (
    "what travels",
    "validation loss",
    "over fp32's, mean",
    "by seed",
    "activations",
    "gradients",
    "bytes of a step",
)


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page: losses of all seeds against those of fp32 under the same seed, bytes against fp32's."""
    measured = {name: result for name, result in results.items() if result}
    reference = measured.get(REFERENCE, {})
    steps = sorted({run["steps"] for result in measured.values() for run in _seeds(result).values()})
    lines = [
        "# What compressed traffic does to the loss",
        "",
        "Made by `run.py`; see [the guide](../README.md). Validation loss after "
        f"{' or '.join(map(str, steps))} steps, mean over the seeds; ratios of losses to fp32's are under the same "
        "seed. Bytes are those that all ranks send in one iteration.",
        "",
        _line(COLUMNS),
        _line(["---"] * len(COLUMNS)),
        *(_line(_cells(name, result, reference)) for name, result in measured.items()),
        "",
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, commit {_commit()}, {datetime.now(UTC):%Y-%m-%d}",
    ]
    return "\n".join(lines) + "\n"


def _cells(name: str, result: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    own, exact = _seeds(result), _seeds(reference)
    ratios = {seed: own[seed]["loss"] / exact[seed]["loss"] for seed in sorted(own) if seed in exact}
    kinds = [(f"{kind}_bytes", reference.get(f"{kind}_bytes")) for kind in ("activation", "gradient")]
    shares = [f"{result[key] / whole:.3f}" if whole else "" for key, whole in kinds]
    total = sum(result[key] for key, _ in kinds)
    whole_total = sum(whole or 0 for _, whole in kinds)
    return [
        name,
        f"{statistics.mean(run['loss'] for run in own.values()):.4f}",
        f"{statistics.mean(ratios.values()):.4f}" if ratios else "",
        ", ".join(f"{ratio:.4f} ({seed})" for seed, ratio in ratios.items()),
        *shares,
        f"{total:,} ({total / whole_total:.3f})" if whole_total else f"{total:,}",
    ]


def _seeds(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: run for key, run in result.items() if isinstance(run, dict)}


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
