# The public API. A name that is not here may change without notice.
from .checkpoint.huggingface.export import export_run as export_run
from .checkpoint.huggingface.import_model import import_model as import_model
from .config.experiment import Experiment as Experiment
from .config.experiment_file import load_experiment as load_experiment, load_run as load_run
from .errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DataError as DataError,
    SkipPipeError as SkipPipeError,
)
from .inference.decoder import Decoder as Decoder
from .inference.evaluation.perplexity import PerplexityOptions as PerplexityOptions, evaluate as evaluate
from .inference.generation.generation import Generated as Generated, generate as generate
from .inference.generation.sampling import Sampling as Sampling
from .inference.generation.text_generation import (
    Continuation as Continuation,
    TextOptions as TextOptions,
    generate_texts as generate_texts,
)
from .inference.model_loading import LoadedModel as LoadedModel, load_model as load_model
from .inference.policies.base import FixedLayers as FixedLayers, Policy as Policy, PolicyContext as PolicyContext
from .inference.policies.construction import build_policy as build_policy
from .inference.policies.registry import PolicyEntry as PolicyEntry, register_policy as register_policy
from .monitor.evaluation_results import Evaluation as Evaluation
from .monitor.metrics_file import read_metrics as read_metrics
from .planning.experiment_plan import plan_experiment as plan_experiment
from .training.train_experiment import train_experiment as train_experiment
from .training.trainer import TrainingSummary as TrainingSummary

__version__: str
