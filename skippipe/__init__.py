"""Train language models over slow and uneven networks, with a route of its own for every microbatch.

    from skippipe import load_experiment, train_experiment

    train_experiment(load_experiment(Path("experiment.yaml")))

The names are listed in `__init__.pyi`, and each is imported when it is first used.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
