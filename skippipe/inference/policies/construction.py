"""A policy from its name and a model."""

from dataclasses import replace

from skippipe.inference.policies.absence import WithoutAbsent
from skippipe.inference.policies.base import Policy, PolicyContext
from skippipe.inference.policies.registry import find_policy


def build_policy(specification: str, context: PolicyContext) -> Policy:
    """Build the policy of a name for a model; layers that nobody can run are left out of whatever it says.

    Args:
        specification: `NAME` or `NAME:ARGUMENT`; `skippipe evaluate --help` lists them.
        context: The model and the share of its layers' compute to keep; the argument is set here.

    Returns:
        The policy.

    Raises:
        InputError: Nobody has the name, the argument is wrong or missing, or the share cannot be had.

    Examples:
        >>> policy = build_policy("exit", PolicyContext(model.decoder, keep=0.5))
        >>> policy.layers_at(0, 1)
        (0, 1, 2)
    """
    entry, argument = find_policy(specification)
    policy = entry.builder()(replace(context, argument=argument))
    decoder = context.decoder
    whole = not decoder.absent_stages and decoder.is_here(decoder.all_layers)
    return policy if whole else WithoutAbsent(policy, decoder)
