"""The cluster of an experiment, its nodes on the device that the experiment asks for."""

from pathlib import Path

from skippipe.config.experiment import Experiment
from skippipe_scheduler.problem.cluster import Cluster, load_cluster


def experiment_cluster(experiment: Experiment) -> Cluster:
    """Read the experiment's cluster file; `training.device` decides for all nodes unless it is auto.

    Nothing is asked of the machine that reads it: it may be another than those that train.
    """
    cluster = load_cluster(Path(experiment.cluster))
    device = experiment.training.device
    return cluster if device == "auto" else cluster.on_device(device)
