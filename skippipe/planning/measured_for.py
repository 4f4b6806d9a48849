"""What the task times of an experiment are measured for, as a cluster file says it."""

from skippipe.config.experiment import Experiment
from skippipe.model.architecture import experiment_model
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe_scheduler.problem.build import stage_flop
from skippipe_scheduler.problem.cluster import MeasuredFor

DIGITS = 6
"""More than enough to tell whether a workload is the same."""


def experiment_measured_for(experiment: Experiment, num_stages: int) -> MeasuredFor:
    """Return what times of this experiment hold for, those of a stage being scaled to one of mean size."""
    workload, training = experiment_workload(experiment), experiment.training
    tflop = [float(f"{flop / 1e12:.{DIGITS}g}") for flop in stage_flop(workload, num_stages)]
    mean = f"{workload.num_layers / num_stages:.3g} layers ({experiment_model(experiment).model_type})"
    return MeasuredFor(
        about=f"{mean}, {training.micro_batch_size} x {training.sequence_length} tokens",
        dtype=training.dtype,
        forward_tflop=tflop[0],
        backward_tflop=tflop[1],
        loss_tflop=tflop[2],
    )
