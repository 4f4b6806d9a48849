"""Hosts that have a text of their own each: a microbatch has the samples of the one on which it begins."""

from pathlib import Path

from random_plans import random_plan
from training_runs import ALONE, WORLD_SIZE, losses, make_experiment, on_ranks

from skippipe.config.experiment import Experiment
from skippipe.data.samples import Batch, SampleOrder
from skippipe.monitor.metrics import Metric
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import open_trainer, train
from skippipe.training.signals import StopSignal
from skippipe.training.startup import read_tokens, samples_of
from skippipe_scheduler.plan.plan import Plan

STEPS = 4


def experiment_of(folder: Path, rank: int, name: str = "apart") -> Experiment:
    """Return what a rank trains: the texts of its host, of which no other has one."""
    own = sorted((folder / "text").glob("*.txt"))[rank::WORLD_SIZE]
    data = {"paths": [str(path) for path in own], "same_on_all_hosts": False}
    return make_experiment(folder, name, data=data, training={"max_steps": STEPS})


def train_rank(rank: int, folder: Path, plan: Plan) -> None:
    with DistributedContext.from_environment(60.0) as context:
        train(experiment_of(folder, rank), plan, context)


class ByOrigin(SampleOrder):
    """The samples of the host on which a microbatch begins, for one process that walks the whole plan."""

    def __init__(self, folder: Path, plan: Plan, told: SampleOrder) -> None:
        self.text, self.seed, self.sequence_length = told.text, told.seed, told.sequence_length
        self._origins = [plan.rank_of[microbatch.route[0]] for microbatch in plan.microbatches]
        self._orders = {rank: self._order(folder, rank, plan.nodes[rank]) for rank in set(self._origins)}

    def _order(self, folder: Path, rank: int, node: str) -> SampleOrder:
        experiment = experiment_of(folder, rank)
        cache = read_tokens(experiment)
        return samples_of(experiment, cache, self.text, node)

    def batch(self, step: int, microbatch: int, num_microbatches: int, micro_batch_size: int) -> Batch:
        """Return what the host has on which the microbatch begins."""
        order = self._orders[self._origins[microbatch]]
        return order.batch(step, microbatch, num_microbatches, micro_batch_size)

    def validation_batch(self, index: int, micro_batch_size: int) -> Batch:
        """Return what the host has on which the microbatch begins."""
        return self._orders[self._origins[index]].validation_batch(index, micro_batch_size)


def test_each_host_trains_on_its_own_text(tmp_path: Path) -> None:
    plan = random_plan(7, num_nodes=WORLD_SIZE, num_stages=2, route_length=2, num_microbatches=4, layers_per_stage=3)
    assert len({microbatch.route[0] for microbatch in plan.microbatches}) > 1
    make_experiment(tmp_path)
    on_ranks(train_rank, tmp_path, plan)
    alone = experiment_of(tmp_path, plan.rank_of[plan.stages[0].nodes[0]], "alone")
    with open_trainer(alone, plan, ALONE) as trainer:
        trainer.order = ByOrigin(tmp_path, plan, trainer.order)
        found = [trainer.one_step(stop).metrics[Metric.TRAIN_LOSS] for stop in [StopSignal()] * STEPS]
    expected = losses(tmp_path / "apart")
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < 1e-5
