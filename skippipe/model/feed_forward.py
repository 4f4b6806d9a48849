"""Where the feed-forward block of a decoder layer is, and what the residual stream is before and after it."""

from torch import nn

from skippipe.errors import InputError

NAMES = ("mlp", "block_sparse_moe", "feed_forward")


def feed_forward_name(layer: nn.Module) -> str:
    """Return the name of the layer's feed-forward block; raise `InputError` where it has none to skip."""
    for name in NAMES:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise InputError(
        f"layers of type {type(layer).__name__} have no feed-forward block apart from the rest; "
        "choose a policy that leaves out whole layers"
    )
