# The public API. A name that is not here may change without notice.
from .analysis.chrome_trace import save_chrome_trace as save_chrome_trace
from .analysis.critical_path import CriticalPath as CriticalPath, critical_path as critical_path
from .analysis.explain import explain as explain
from .analysis.jitter import (
    JitterSummary as JitterSummary,
    sample_iterations as sample_iterations,
    summarise as summarise,
)
from .analysis.node_loss import NodeLoss as NodeLoss, simulate_loss as simulate_loss
from .analysis.usage import Analysis as Analysis, analyse as analyse
from .baselines.paper_method import solve_paper_method as solve_paper_method
from .bounds import lower_bounds as lower_bounds
from .errors import (
    DeadlockError as DeadlockError,
    InfeasibleError as InfeasibleError,
    InputError as InputError,
    PlanError as PlanError,
    ProblemError as ProblemError,
    SkipPipeError as SkipPipeError,
)
from .options import Progress as Progress, Robustness as Robustness, SolveOptions as SolveOptions
from .plan.plan import Plan as Plan
from .plan.simulate import Timeline as Timeline, simulate as simulate
from .plan.validate import load_plan as load_plan, validate as validate
from .problem.build import LayerSplitProblem as LayerSplitProblem, build_problem as build_problem
from .problem.cluster import (
    Cluster as Cluster,
    ClusterLinks as ClusterLinks,
    Link as Link,
    Node as Node,
    NodeLink as NodeLink,
    RegionLink as RegionLink,
    load_cluster as load_cluster,
)
from .problem.costs import Costs as Costs
from .problem.problem import Problem as Problem, load_problem as load_problem, write_problem as write_problem
from .problem.rules import Rules as Rules, skip_rules as skip_rules
from .problem.stage_layout import StageLayout as StageLayout
from .problem.workload import Workload as Workload
from .solver.lost_nodes import replan_without as replan_without
from .solver.plan_request import PlanRequest as PlanRequest
from .solver.planner import (
    PlanWithBaselines as PlanWithBaselines,
    solve_request as solve_request,
    solve_with_baselines as solve_with_baselines,
)
from .solver.replan import replan as replan, without_node as without_node
from .solver.solve import (
    solve as solve,
    solve_full_pipeline as solve_full_pipeline,
    solve_network_blind as solve_network_blind,
)
