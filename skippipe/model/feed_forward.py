"""Where the feed-forward block of a decoder layer is, and what the residual stream is before and after it."""

from torch import nn

from skippipe.errors import InputError

NAMES = ("mlp", "block_sparse_moe", "feed_forward")


def find_feed_forward(layer: nn.Module) -> str | None:
    """Return the name of the layer's feed-forward block; None where it has none apart from the rest."""
    return next((name for name in NAMES if isinstance(getattr(layer, name, None), nn.Module)), None)


def feed_forward_name(layer: nn.Module) -> str:
    """Return the name of the layer's feed-forward block; raise `InputError` where it has none to skip."""
    name = find_feed_forward(layer)
    if name is None:
        raise InputError(
            f"layers of type {type(layer).__name__} have no feed-forward block apart from the rest; "
            "choose a policy that leaves out whole layers"
        )
    return name


def residual_reader(layer: nn.Module) -> nn.Module | None:
    """Return the module whose input is the residual stream between attention and feed-forward block.

    None where the block stands beside the attention: then the stream without it is the layer's output less its own.
    """
    if getattr(layer, "use_parallel_residual", False):
        return None
    if not hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, "post_feedforward_layernorm"):
        reader: nn.Module = getattr(layer, feed_forward_name(layer))  # the norm follows the block, as in olmo2
        return reader
    for name in ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm"):
        if isinstance(found := getattr(layer, name, None), nn.Module):
            return found
    raise InputError(f"layers of type {type(layer).__name__}: the norm before the feed-forward block is not known")
