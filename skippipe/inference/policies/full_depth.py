"""Every layer: the reference."""

from skippipe.inference.policies.base import FixedLayers, Policy, Request, check_keep


def build(request: Request) -> Policy:
    """Return the whole model, whatever share is asked for."""
    check_keep(request.keep)
    return FixedLayers(request.decoder.all_layers, len(request.decoder.present_stages))
