"""Reports: one self-contained HTML page about a plan, a run, several runs, or models with part of their depth."""

from skippipe.monitor.report.reports import (
    write_comparison_report,
    write_depth_comparison,
    write_plan_report,
    write_run_report,
    write_runs_report,
)

__all__ = [
    "write_comparison_report",
    "write_depth_comparison",
    "write_plan_report",
    "write_run_report",
    "write_runs_report",
]
