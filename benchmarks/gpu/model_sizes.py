"""How much memory a card needs for models of several sizes on several cards, by the planner's own estimates.

    python benchmarks/gpu/model_sizes.py

Prints the table of docs/gpu.md. A full pipeline with a stage for each card, bfloat16 with fp32 master copies,
micro-batches of one sample of 2,048 tokens, twice as many as cards, every layer computed again in the backward.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from setting import SIZES, make_experiment

from skippipe.planning.experiment_plan import plan_experiment
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe_scheduler.plan.plan_memory import memory_of_one_process, plan_memory

CARDS = (1, 2, 4, 8)
MODELS: Mapping[str, Mapping[str, int]] = {
    **SIZES,
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}
"""The last two have the shapes of Llama 3 8B (arXiv 2407.21783, table 3) and Llama 2 13B (arXiv 2307.09288)."""


def needed_gib(folder: Path, name: str, count: int) -> float:
    """Return the GiB of the card that needs most."""
    num_stages = max(2, count)
    experiment = make_experiment(
        folder,
        f"{name}-{count}",
        "124M",
        rehearse=False,
        num_nodes=num_stages,
        memory_gib=10_000,
        model={"options": dict(MODELS[name]) | {"vocab_size": 50304, "tie_word_embeddings": True}},
        pipeline={"num_stages": num_stages, "skip_ratio": 0, "planner": {"max_evaluations": 50}},
        training={
            "num_microbatches": 2 * count,
            "micro_batch_size": 1,
            "sequence_length": 2048,
            "activation_checkpointing": "full",
        },
    )
    plan, workload = plan_experiment(experiment), experiment_workload(experiment)
    estimates = plan_memory(plan, workload, dict.fromkeys(plan.nodes, "cuda"))
    if count == 1:
        estimates = (memory_of_one_process(plan, workload, "cuda"),)
    return max(estimate.total_bytes for estimate in estimates) / 2**30


def main() -> None:
    """Print the table."""
    print(f"| parameters | {' | '.join(f'{count} cards' if count > 1 else '1 card' for count in CARDS)} |")
    print("|---" * (len(CARDS) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            cells = [f"{needed_gib(Path(folder), name, count):.1f}" for count in CARDS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
