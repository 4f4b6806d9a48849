"""What `skippipe_scheduler` exports, and that importing it costs nothing."""

import inspect
import subprocess
import sys

import skippipe_scheduler

PUBLIC = {
    *("Analysis", "Cluster", "ClusterLinks", "Costs", "CriticalPath", "DeadlockError", "InfeasibleError"),
    *("InputError", "JitterSummary", "Link", "Node", "NodeLink", "NodeLoss", "Plan", "PlanError", "Problem"),
    *("ProblemError", "Progress", "RegionLink", "Robustness", "Rules", "SkipPipeError", "SolveOptions", "Timeline"),
    *("Workload", "analyse", "build_problem", "critical_path", "explain", "load_cluster", "load_plan"),
    *("load_problem", "lower_bounds", "replan", "sample_iterations", "save_chrome_trace", "simulate"),
    *("simulate_loss", "solve", "solve_full_pipeline", "solve_network_blind", "solve_paper_method", "summarise"),
    *("validate", "without_node", "write_problem"),
}
"""A name that goes or is renamed breaks the programs of users: that is a line in the CHANGELOG."""


def test_the_public_names_are_these() -> None:
    assert set(skippipe_scheduler.__all__) == PUBLIC


def test_every_public_name_is_documented() -> None:
    silent = [name for name in PUBLIC if not inspect.getdoc(getattr(skippipe_scheduler, name))]
    assert silent == []


def test_an_import_loads_neither_solver_nor_kernel() -> None:
    program = "import sys, skippipe_scheduler; print({'ortools', 'numba', 'torch', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
