"""Sizes of the model, how long normal training of each is, and on what."""

from dataclasses import dataclass, replace

NUM_STAGES = 6


@dataclass(frozen=True)
class Size:
    """A Llama of bytes in six stages. A step has 20 microbatches of `micro_batch_size` x 128 tokens."""

    hidden_size: int
    intermediate_size: int
    layers_per_stage: int
    micro_batch_size: int
    steps: int
    """Of normal training."""
    dtype: str = "float32"
    prose: bool = False
    """Whether the text is prose, and not Python's own sources."""

    @property
    def ffn_share(self) -> float:
        """Part of a layer's matrices that is its feed-forward network."""
        feed_forward, attention = 3 * self.intermediate_size, 4 * self.hidden_size
        return feed_forward / (feed_forward + attention)


SIZES = {
    "2.4M": Size(128, 344, 2, 1, steps=700),  # 0.75 tokens a parameter
    "0.25M": Size(56, 152, 1, 4, steps=480),  # 20 tokens a parameter, as in all below
    "1M": Size(112, 304, 1, 8, steps=922),
    "4M": Size(224, 600, 1, 8, steps=3598, dtype="bfloat16"),
}
SIZES["0.25M-prose"] = replace(SIZES["0.25M"], prose=True)
QUICK = Size(32, 48, 2, 1, steps=4)
