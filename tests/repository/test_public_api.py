"""What `skippipe` and `skippipe_scheduler` export, and that importing them costs nothing."""

import inspect
import subprocess
import sys

import pytest

import skippipe
import skippipe_scheduler

SKIPPIPE = {
    *("CheckpointError", "ConfigError", "Continuation", "DataError", "Decoder", "Evaluation", "Experiment"),
    *("FixedLayers", "Generated", "LoadedModel", "PerplexityOptions", "Policy", "PolicyContext", "PolicyEntry"),
    *("Sampling", "SkipPipeError", "TextOptions", "TrainingSummary", "build_policy", "evaluate", "export_run"),
    *("generate", "generate_texts", "import_model", "load_experiment", "load_model", "load_run", "plan_experiment"),
    *("read_metrics", "register_policy", "train_experiment"),
}
SCHEDULER = {
    *("Analysis", "Cluster", "ClusterLinks", "Costs", "CriticalPath", "DeadlockError", "InfeasibleError"),
    *("InputError", "JitterSummary", "LayerSplitProblem", "Link", "Node", "NodeLink", "NodeLoss", "Plan", "PlanError"),
    *("PlanRequest", "PlanWithBaselines", "Problem", "ProblemError", "Progress", "RegionLink", "Robustness", "Rules"),
    *("SkipPipeError", "SolveOptions", "StageLayout", "Timeline", "Workload", "analyse", "build_problem"),
    *(
        "critical_path",
        "explain",
        "load_cluster",
        "load_plan",
        "load_problem",
        "lower_bounds",
        "replan",
        "replan_without",
    ),
    *("sample_iterations", "save_chrome_trace", "simulate", "simulate_loss", "skip_rules", "solve"),
    *("solve_full_pipeline", "solve_network_blind", "solve_paper_method", "solve_request", "solve_with_baselines"),
    *("summarise", "validate", "without_node", "write_problem"),
}
"""A name that goes or is renamed breaks the programs of users: that is a line in the CHANGELOG."""


@pytest.mark.parametrize(("package", "names"), [(skippipe, SKIPPIPE), (skippipe_scheduler, SCHEDULER)])
def test_the_public_names_are_these_and_documented(package: object, names: set[str]) -> None:
    assert set(package.__all__) == names  # type: ignore[attr-defined]  # a module's own
    assert [name for name in names if not inspect.getdoc(getattr(package, name))] == []


def test_imports_load_nothing_heavy() -> None:
    program = (
        "import sys, skippipe, skippipe_scheduler; print({'ortools', 'numba', 'torch', 'pydantic'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
