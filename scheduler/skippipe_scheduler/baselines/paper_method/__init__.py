"""The method of the SkipPipe paper (arXiv 2502.19913): what our own planner is compared with, and three of its starts.

`solve_paper_method` is the whole method; the portfolio search begins at some of its `route_sets` too.
"""

from skippipe_scheduler.baselines.paper_method.method import solve_paper_method

__all__ = ["solve_paper_method"]
