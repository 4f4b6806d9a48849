"""Load a trained run, measure it at several depths, and let it write at full and at half depth.

python examples/generate_half_depth.py RUN [PROMPT]
"""

import sys
from pathlib import Path

from skippipe import PerplexityOptions, TextOptions, evaluate, generate_texts, load_model


def main(run: Path, prompt: str) -> None:
    """Print perplexities by depth, then two continuations of the prompt."""
    model = load_model(run)

    evaluation = evaluate(model, policies=["exit"], keeps=[1.0, 0.75, 0.5], options=PerplexityOptions(num_batches=8))
    for result in evaluation.results:
        print(f"{result.kept_layers:g} layers, {result.share_computed:.0%} of the FLOP: {result.perplexity:.2f}")

    for keep in (1.0, 0.5):
        written = generate_texts(model, [prompt], TextOptions(policy="exit", keep=keep, max_new_tokens=24))
        print(f"at {keep:.0%} of the depth: {prompt}{written.texts[0]!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "def read(")
