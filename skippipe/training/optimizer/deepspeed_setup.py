"""DeepSpeed made ready before ranks meet: is it there, does it fit, and its operator for the CPU compiled once a host.

A compilation takes minutes, longer than ranks wait for each other. And where one was killed, torch waits forever for
the file that it left; here such a file is taken away.
"""

import logging
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock

from skippipe.config.experiment import Experiment
from skippipe.errors import ConfigError
from skippipe.runtime.ranks import time_limits

logger = logging.getLogger(__name__)

OLDEST = (0, 19, 7)
"""The first version with all that is used: sums instead of means, reduction apart from the step."""
OPERATOR = "cpu_adam"


def prepare(experiment: Experiment) -> float:
    """Make DeepSpeed ready in this process, where the experiment uses it; call it before ranks meet.

    Returns for how many seconds more than usual other hosts may keep ranks waiting, because they compile.
    Raises `ConfigError` with the remedy where it is not installed, too old, or lacks a compiler.
    """
    options = experiment.optimizer
    if not options.traits.is_deepspeed:
        return 0.0
    check_version(options.backend)
    from skippipe.model.device import choose_device

    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ.setdefault("DS_ACCELERATOR", choose_device(experiment.training.device, local_rank).type)
    import deepspeed

    # It would be compiled at the start, for minutes, and only serves ranks on one host; without it gloo is used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not options.offload:
        return 0.0
    build_operator()
    return time_limits.DEEPSPEED_BUILD_S


def check_version(backend: str) -> None:
    """Raise `ConfigError` where DeepSpeed is not installed or too old."""
    wanted = ".".join(map(str, OLDEST))
    remedy = "pip install 'skippipe[deepspeed]', or choose optimizer.backend=zero_redundancy, which needs torch alone"
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError(f"optimizer.backend: {backend} needs DeepSpeed, which is not installed; {remedy}") from None
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit()) < OLDEST:
        raise ConfigError(f"optimizer.backend: {backend} needs DeepSpeed {wanted} or newer, found {found}; {remedy}")


def build_operator() -> None:
    """Compile DeepSpeed's AdamW for the CPU unless that was done before; one process of a host compiles, others wait.

    Raises `ConfigError` where there is no compiler or the compilation fails.
    """
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    if not installed_ops.get(OPERATOR):  # else it came with the installation
        check_compiler()
    folder = Path(_get_build_directory(OPERATOR, False))
    with FileLock(folder.with_name(f"skippipe-{OPERATOR}.lock")):
        remove_abandoned(folder / "lock")
        if not installed_ops.get(OPERATOR) and not (folder / f"{OPERATOR}.so").exists():
            logger.warning("DeepSpeed's %s is compiled in %s, once for this host; it takes minutes", OPERATOR, folder)
        try:
            CPUAdamBuilder().load(verbose=False)
        except Exception as reason:
            raise ConfigError(
                f"optimizer.offload: DeepSpeed's {OPERATOR} cannot be compiled in {folder} "
                f"({str(reason).splitlines()[0]}); `ds_report` shows what is missing; or set optimizer.offload=false"
            ) from None


def check_compiler() -> None:
    """Raise `ConfigError` where a program that compiles DeepSpeed's operators is not on the PATH."""
    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"optimizer.offload: DeepSpeed compiles {OPERATOR} at its first use, for which {program} is not on the "
                "PATH; install g++ and ninja (pip puts ninja beside python: activate the environment), or set "
                "optimizer.offload=false"
            )


def remove_abandoned(lock: Path) -> None:
    """Remove the file by which torch locks a compilation, where no process here has it open.

    Call it only where no other SkipPipe process can be compiling.
    """
    import psutil

    def holds(process: psutil.Process) -> bool:
        try:
            return any(Path(file.path) == lock for file in process.open_files())
        except psutil.Error:
            return False

    if lock.exists() and not any(holds(process) for process in psutil.process_iter()):
        logger.warning("%s: left by a compilation that was killed; removed", lock)
        lock.unlink(missing_ok=True)
