"""Optimizer back-ends behind one small interface."""

from skippipe.training.optimizer.adamw import AdamW
from skippipe.training.optimizer.choice import make_optimizer
from skippipe.training.optimizer.interface import OptimizerBackend
from skippipe.training.optimizer.settings import learning_rate_factor

__all__ = ["AdamW", "OptimizerBackend", "learning_rate_factor", "make_optimizer"]
