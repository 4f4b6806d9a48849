"""A small plan with and without skipping, and a run."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from random_plans import with_relays
from small_runs import ROUTES, STAGES, make_plan, write_run

from skippipe_scheduler.plan.plan import Plan


@pytest.fixture(scope="session")
def plan() -> Plan:
    return make_plan(STAGES, ROUTES)


@pytest.fixture(scope="session")
def full_plan() -> Plan:
    """The same nodes without skipping."""
    origins, lasts = STAGES[0] * 2, STAGES[3] * 2
    routes = tuple((origin, "nyc-1", "ams-1", last) for origin, last in zip(origins, lasts, strict=True))
    return make_plan(STAGES, routes)


@pytest.fixture(scope="session")
def relaying_plan(plan: Plan, full_plan: Plan) -> Plan:
    """The plan with skipping on the links of the full one: every microbatch has one relay."""
    kept = [{plan.stage_of[node] for node in microbatch.route} for microbatch in plan.microbatches]
    return with_relays(full_plan, kept, plan.rules)


@pytest.fixture
def run_dir(tmp_path: Path, plan: Plan) -> Path:
    return write_run(tmp_path / "skip", plan, "skip")


@pytest.fixture
def own_wandb() -> Iterator[None]:
    """Neither a process of wandb's nor settings from another test, nor for the next one."""
    import wandb

    with suppress(SystemExit):
        wandb.teardown()
    yield
    with suppress(SystemExit):
        wandb.teardown()
