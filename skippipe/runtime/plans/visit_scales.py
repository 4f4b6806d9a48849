"""How a stage makes up in training for the microbatches that leave it out."""

from collections import Counter
from collections.abc import Mapping

from skippipe_scheduler.plan.plan import Plan


def visit_scales(plan: Plan, stage: int) -> Mapping[int, float]:
    """Return for each microbatch that visits a stage by what the stage's residual is multiplied.

    It is one over the share of the microbatches that visit the stage, among those whose routes are as long: the mean of
    what the stage adds is then that of routes that all visit it. So layer dropout is rescaled in "Don't Drop Dropout"
    (arXiv 2609.05275), by the probability that a layer is run.
    """
    of_length = Counter(len(microbatch.route) for microbatch in plan.microbatches)
    visiting = [
        microbatch for microbatch in plan.microbatches if any(plan.stage_of[node] == stage for node in microbatch.route)
    ]
    visits = Counter(len(microbatch.route) for microbatch in visiting)
    return {microbatch.id: of_length[len(microbatch.route)] / visits[len(microbatch.route)] for microbatch in visiting}
