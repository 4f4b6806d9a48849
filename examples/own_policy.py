"""Evaluate a trained run under a policy of your own, beside an early exit with as many layers.

python examples/own_policy.py RUN
"""

import sys
from pathlib import Path

from skippipe import (
    FixedLayers,
    PerplexityOptions,
    Policy,
    PolicyContext,
    PolicyEntry,
    evaluate,
    load_model,
    register_policy,
)


def build(context: PolicyContext) -> Policy:
    """Return the bottom and the top of the model without what lies between, as many layers as the share says."""
    layers = context.decoder.all_layers
    kept = max(1, round(context.keep * len(layers)))
    bottom = kept - kept // 2
    return FixedLayers((*layers[:bottom], *layers[len(layers) - kept // 2 :]))


NO_MIDDLE = PolicyEntry("no-middle", "the bottom and the top of the model", build)


def main(path: Path) -> None:
    """Print a line for each policy and share."""
    register_policy(NO_MIDDLE)
    model = load_model(path)
    options = PerplexityOptions(num_batches=4)
    evaluation = evaluate(model, policies=[NO_MIDDLE.name, "exit"], keeps=[1.0, 0.67, 0.5], options=options)
    for result in evaluation.results:
        print(f"{result.policy:<10}{result.share_computed:>5.0%} of the depth: perplexity {result.perplexity:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
