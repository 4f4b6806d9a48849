"""The process that makes plans ahead: `python -m skippipe.planning.ahead_worker`.

One line of JSON comes in: the plans of a run and the losses to prepare for. A line goes out for each of them, in their
order. It ends with its standard input, so that it never outlives the process that started it.
"""

import json
import os
import sys
import threading
from typing import TextIO

from skippipe.errors import SkipPipeError
from skippipe.planning.surviving_plans import improved_plans, plans_without
from skippipe.runtime.plans.plan_set import PlanSet


def main() -> None:
    """Answer the one request of standard input."""
    request = json.loads(sys.stdin.readline() or "null")
    if request is None:
        return
    os.nice(request["niceness"])
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    plans = PlanSet.from_json(request["plans"])
    for lost in request["losses"]:
        try:
            limit_s = request["time_limit_s"]
            if lost:
                found = plans_without(plans, lost, time_limit_s=limit_s, lost_stage=request["lost_stage"]).to_json()
            else:
                free_origins = request["free_origins"]
                found = improved_plans(plans, time_limit_s=limit_s, free_origins=free_origins).to_json()
        except SkipPipeError:
            found = None  # whoever asks for it gets the error from a plan made then
        print(json.dumps({"lost": lost, "plans": found}), flush=True)


def _end_with(stream: TextIO) -> None:
    stream.read()
    os._exit(0)


if __name__ == "__main__":
    main()
