"""A policy from its name and a model."""

from dataclasses import replace

from skippipe.inference.policies.absence import WithoutAbsent
from skippipe.inference.policies.base import Policy, PolicyContext
from skippipe.inference.policies.registry import find_policy


def build_policy(specification: str, context: PolicyContext) -> Policy:
    """Return the policy that `NAME` or `NAME:ARGUMENT` names; raise `InputError` where it cannot be had.

    Layers that nobody can run are left out of whatever it says.
    """
    entry, argument = find_policy(specification)
    policy = entry.builder()(replace(context, argument=argument))
    decoder = context.decoder
    whole = not decoder.absent_stages and decoder.is_here(decoder.all_layers)
    return policy if whole else WithoutAbsent(policy, decoder)
