"""What is kept of a change of membership: one line on the terminal, one event, and the plan that began with it."""

import logging
from pathlib import Path

from skippipe.errors import SkipPipeError
from skippipe.monitor.run_events import MembershipChange
from skippipe.runtime.plans.plan_set import PlanSet

logger = logging.getLogger(__name__)


def record(change: MembershipChange, plans: PlanSet, run_dir: Path) -> None:
    """Say and write down a change, and keep the plans that began with it; a failure to write is logged."""
    logger.warning("%s", change)
    folder = run_dir / "epochs"
    try:
        folder.mkdir(exist_ok=True)
        plans.main.save(folder / f"epoch-{change.epoch:04d}.plan.json")
        if plans.joining is not None:
            plans.joining.save(folder / f"epoch-{change.epoch:04d}.joining.json")
    except (OSError, SkipPipeError) as reason:
        logger.warning("the plan of epoch %d is not kept (%s)", change.epoch, reason)
    change.append_to(run_dir)
