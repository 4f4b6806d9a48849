"""Which node takes over a stage that has lost its last one."""

import time
from collections.abc import Collection

from skippipe.errors import InfeasibleError, SkipPipeError
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.situation import Situation


def take_over(stage: int, situation: Situation, preferred: Collection[str] = ()) -> PlanSet:
    """Return the plans of all nodes in which one that is left and one that the stage has lost have changed places.

    Only a node can move whose stage another one holds too. One that is `preferred` comes first, else the one with which
    an iteration is shortest. When the lost node comes back, it is a replica where the other one was.

    Raises `InfeasibleError` where no node can.
    """
    main = situation.plans.main
    free = [node for node in situation.members if {*situation.standing_nodes(main.stage_of[node])} - {node}]
    reason = "every node that is left holds its stage alone"
    if stage == 0 and situation.without_text.intersection(free):
        free = [node for node in free if node not in situation.without_text]
        reason = "no host that is left has the text (data.paths) to begin microbatches"
    for group in ([node for node in free if node in preferred], [node for node in free if node not in preferred]):
        found: list[tuple[float, PlanSet]] = []
        begun_s = time.monotonic()
        for node in group:
            if found and time.monotonic() - begun_s > situation.limit_s:
                break
            try:
                moved = situation.moves.swapped(situation.plans, node, main.stages[stage].nodes[0])
                left = plans_without(moved, situation.lost, time_limit_s=0.0, lost_stage="routes_around")
            except SkipPipeError as refused:
                reason = str(refused)
            else:
                found.append((left.main.predicted.iteration_s, moved))
        if found:
            return min(found, key=lambda entry: entry[0])[1]
    raise InfeasibleError(f"no node can take over stage {stage}: {reason}", stage=stage)
