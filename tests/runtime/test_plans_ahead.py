"""Plans for losses that have not happened: made by a process that ends with the one that wants them."""

import json
import subprocess
import sys

from random_plans import random_plan

from skippipe.planning.plans_ahead import WORKER, PlansAhead
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe_scheduler.plan.validate import validate

MAIN = random_plan(3, num_nodes=6, num_stages=4, num_microbatches=4)
PLANS = PlanSet(MAIN)
ALONE = {stage.nodes[0] for stage in MAIN.stages if len(stage.nodes) == 1}


def test_plans_for_single_losses_are_ready_without_a_search() -> None:
    with PlansAhead(PLANS, [[], *([node] for node in MAIN.nodes)], time_limit_s=0.0, niceness=0) as ahead:
        assert ahead.ready(MAIN.nodes) is None
        assert ahead.wait(60.0)
        whole = ahead.ready(())
        assert whole is not None
        assert whole.main.stages == MAIN.stages
        assert ALONE
        for node in set(MAIN.nodes) - ALONE:
            found = ahead.ready({node})
            assert found is not None
            validate(found.main)
            assert found.main.nodes == tuple(name for name in MAIN.nodes if name != node)
        assert all(ahead.ready({node}) is None for node in ALONE), "nobody else holds its stage"


def test_closing_ends_the_process_at_once() -> None:
    ahead = PlansAhead(PLANS, time_limit_s=600.0)
    process = ahead._process
    ahead.close()
    assert process.returncode is not None
    assert ahead.wait(0.0)


def test_the_process_ends_with_its_standard_input() -> None:
    request = {
        "plans": PLANS.to_json(),
        "losses": [[MAIN.stages[0].nodes[0]]],
        "time_limit_s": 600.0,
        "lost_stage": "stop",
        "niceness": 0,
        "free_origins": False,
    }
    done = subprocess.run(
        [sys.executable, "-m", WORKER], input=json.dumps(request) + "\n", text=True, timeout=60.0, check=True
    )
    assert done.returncode == 0
