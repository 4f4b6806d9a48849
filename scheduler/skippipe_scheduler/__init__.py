"""The path scheduler: placement, routes and order for partial, reordered pipelines. Needs no torch.

    from skippipe_scheduler import SolveOptions, explain, load_problem, solve

    plan = solve(load_problem(Path("problem.json")), SolveOptions(time_limit_s=10))
    print(explain(plan))
    plan.save(Path("plan.json"))

The names are listed in `__init__.pyi`, and each is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
