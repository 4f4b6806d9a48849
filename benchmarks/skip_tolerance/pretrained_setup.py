"""How the pretrained model is trained on and evaluated."""

from pathlib import Path
from typing import Any

from setups import CLUSTER

from skippipe.config.experiment import Experiment

KEEPS = (1.0, 0.9, 0.75, 0.6, 0.5)
POLICIES = ("random", "best", "best:gradient", "exit", "unified", "skipdecode", "ffn-skip")
"""All that take a share; the whole model is the first of `KEEPS`."""
NUM_STAGES = 8
"""Of 4 or 3 of the 30 layers; three quarters and one half of the depth are whole numbers of them."""
LAYERS_OF_TINY = 2 * NUM_STAGES


def experiment_of(work: Path, *, steps: int, quick: bool) -> Experiment:
    """Return the experiment that trains in `work`: mixed route lengths, redrawn, every 10th step at full depth."""
    (work / "cluster.yaml").write_text(CLUSTER.format(count=8, tflop_per_s=0.3, memory_gib=8))
    content: dict[str, Any] = {
        "name": "pretrained",
        "run_dir": str(work / "run"),
        "cluster": str(work / "cluster.yaml"),
        "data": {"source": "python_stdlib", "max_bytes": 200_000 if quick else 8_000_000},
        "pipeline": {
            "num_stages": NUM_STAGES,
            "route_lengths": {8: 1, 6: 1, 4: 2},
            "max_swaps": 0,
            "max_forward_jump": NUM_STAGES - 1,
            "planner": {"max_evaluations": 20 if quick else 500},
        },
        "recipe": {"redrawn_routes": 2 if quick else 8, "full_depth_interval": 10},
        "training": {
            "max_steps": steps,
            "num_microbatches": 8,
            "micro_batch_size": 2,
            "sequence_length": 32 if quick else 256,
            "dtype": "float32" if quick else "bfloat16",
            "device": "cpu",
        },
        "optimizer": {"lr": 3e-4, "fused": True},
        "lr_scheduler": {"warmup_steps": min(10, steps)},
        "checkpoint": {"interval": 20, "keep_last": 1, "asynchronous": False},
        "evaluation": {"interval": 0},
        "logging": {"interval": 1, "wandb": {"mode": "disabled"}},
    }
    return Experiment.model_validate(content)
