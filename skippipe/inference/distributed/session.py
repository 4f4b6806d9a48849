"""A model for a command, in one process or over those that torchrun started."""

from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from skippipe.inference.model_loading import LoadedModel, load_model
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.context import DistributedContext


@contextmanager
def open_model(
    path: Path, *, device: str = "auto", num_stages: int | None = None, absent: Collection[str] = ()
) -> Iterator[LoadedModel | None]:
    """Yield the model of a run or a directory; `absent` are nodes of the plan that are gone.

    With one process it gets the whole model. With several, the driver (`StageAssignment.driver`) gets the model, whose
    layers the others hold. Each other process is a worker: it serves until the driver leaves this context, and then
    gets None. Where the driver failed, its workers end with its exit code. Where it is lost and a worker can take its
    place, that one gets the model (`LoadedModel.progress`). So whatever is to be seen of the answer has to be printed
    or written before the context is left.
    """
    with closing(DistributedContext.from_environment(time_limits.SERVING_MEETING_S, process_groups=False)) as context:
        if context.store is None:
            yield load_model(path, device=device, num_stages=num_stages, absent=absent)
            return
        from skippipe.inference.distributed.serving import serve_together

        with serve_together(context, path, device=device, num_stages=num_stages, absent=absent) as model:
            yield model
