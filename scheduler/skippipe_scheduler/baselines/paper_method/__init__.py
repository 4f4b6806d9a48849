"""The method of the SkipPipe paper (arXiv 2502.19913): a baseline, whose route sets are also starts of the search."""

from skippipe_scheduler.baselines.paper_method.method import solve_paper_method

__all__ = ["solve_paper_method"]
