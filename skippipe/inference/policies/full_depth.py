"""Every layer: the reference."""

from skippipe.inference.policies.base import FixedLayers, Policy, PolicyContext, check_keep


def build(request: PolicyContext) -> Policy:
    """Return the whole model, whatever share is asked for."""
    check_keep(request.keep)
    return FixedLayers(request.decoder.all_layers, len(request.decoder.present_stages))
