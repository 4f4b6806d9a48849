"""Stages that the user names, or those that are left when nodes are gone."""

from skippipe.errors import InputError
from skippipe.inference.decoder import Decoder
from skippipe.inference.policies.base import FixedLayers, Policy, PolicyContext


def build_given(context: PolicyContext) -> Policy:
    """Return the stages of `stages:0,3,2`, in that order; routes of training, swaps included, can be asked for."""
    count = len(context.decoder.stages)
    try:
        stages = [int(part) for part in context.argument.split(",")]
    except ValueError:
        raise InputError(
            f"--policy stages:{context.argument}: expected numbers of stages such as stages:0,2,3"
        ) from None
    for stage in stages:
        if not 0 <= stage < count:
            raise InputError(f"--policy stages: there is no stage {stage}; the model has {count}, from 0 on")
    if len(set(stages)) < len(stages):
        raise InputError(f"--policy stages:{context.argument}: a stage is there twice; a stage runs once")
    return _of_stages(context.decoder, stages)


def build_without(context: PolicyContext) -> Policy:
    """Return what still runs without the nodes of `without:NODE,...`: stages that another node holds stay."""
    decoder = context.decoder
    gone = set(filter(None, context.argument.split(",")))
    known = {node for nodes in decoder.stage_nodes for node in nodes}
    if not known:
        raise InputError("--policy without: this model has no plan that says which node holds what; use stages:0,2,...")
    if not gone or gone - known:
        name = next(iter(sorted(gone - known)), "")
        raise InputError(f"--policy without: no node {name!r}; the plan has {', '.join(sorted(known))}")
    return _of_stages(decoder, [stage for stage, nodes in enumerate(decoder.stage_nodes) if set(nodes) - gone])


def _of_stages(decoder: Decoder, stages: list[int]) -> Policy:
    if stages[:1] != [0]:
        raise InputError("--policy: stage 0 holds embedding and head and has to run first; it cannot be left out")
    return FixedLayers(decoder.layers_of_stages(stages), len(stages))
