"""Reports: one self-contained HTML page about a plan, a run, or several runs beside each other."""

from skippipe.monitor.report.reports import write_comparison_report, write_plan_report, write_run_report

__all__ = ["write_comparison_report", "write_plan_report", "write_run_report"]
