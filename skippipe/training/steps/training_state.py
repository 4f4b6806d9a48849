"""What the parts of a trainer share: what it trains with, and where it stands between two steps."""

from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.checkpoint.disks.run_disks import RunDisks
from skippipe.config.experiment import Experiment
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner import Runner
from skippipe.training.measurement.memory_report import MemoryReport
from skippipe.training.optimizer import make_optimizer
from skippipe.training.steps.step_totals import FinishedStep, StepBegin


class TrainingState:
    """Runner, optimizer and memory of one process of a run, and the step at which it stands."""

    def __init__(
        self,
        experiment: Experiment,
        context: DistributedContext,
        runner: Runner,
        memory: MemoryReport,
        disks: RunDisks,
        peers: PeerFiles | None,
        *,
        outlives: bool = False,
    ) -> None:
        """`outlives`: the run is to go on without a process that is lost."""
        self.experiment, self.context, self.memory = experiment, context, memory
        self.disks = disks
        """On which disks the run directory of the present members lies."""
        self.peers = peers
        """What brings files from one of them to another; None where they share one."""
        self.node = runner.plans.main.nodes[context.rank]
        training = experiment.training
        self.tokens_per_step = training.num_microbatches * training.micro_batch_size * training.sequence_length
        self.runner = runner
        self._outlives = outlives
        self.optimizer = make_optimizer(experiment, runner, outlives=outlives)
        runner.reduce_with(self.optimizer.reduce)
        self.step = 0
        """The last step that is counted here."""
        self.first_step = 0
        """The step behind which this process began."""
        self.elapsed_s = 0.0
        """Time of all steps so far."""
        self.applied = 0
        """The last step that the weights have taken: counted a moment later, or in the next epoch."""
        self.contributed = 0
        """The last step to whose sum this process has given its part."""
        self.sums: tuple[float, ...] | None = None
        """That sum, of the last step that the weights have taken."""
        self.begun: StepBegin | None = None
        """The last step that was begun here."""
        self.finished: FinishedStep | None = None
        """The last step that is counted here."""
        self.work_is_left = False
        """Whether that one is still to be validated, reported and saved."""

    @property
    def plans(self) -> PlanSet:
        """Those of the present members."""
        return self.runner.plans

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.tokens_per_step

    def begin_after(self, step: int, elapsed_s: float) -> None:
        """Stand behind a step that others have taken."""
        self.step = self.first_step = step
        self.elapsed_s = elapsed_s

    def change_stage(self, runner: Runner) -> None:
        """Let go of the stage that this process holds, and have the one of another runner."""
        self.runner = runner
        self.optimizer.close()
        self.optimizer = make_optimizer(self.experiment, runner, outlives=self._outlives)
        runner.reduce_with(self.optimizer.reduce)
