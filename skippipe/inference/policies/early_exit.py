"""Early exit at a fixed layer through the shared head (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710, 3.2)."""

from skippipe.inference.policies.base import FixedLayers, Policy, PolicyContext, kept_layers


def build(context: PolicyContext) -> Policy:
    """Return the first layers, as many as come nearest to the share."""
    kept = kept_layers(context.keep, context.decoder.num_layers, at_least=1, policy="exit")
    return FixedLayers(tuple(range(kept)))
