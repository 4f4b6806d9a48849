"""The decorators of all compiled functions.

Compiling takes up to a minute, once per installation (measured: 47 s of one core of a busy Intel Xeon). Before that
has happened, a search that has less time than that runs the same functions as plain Python, some hundred times slower.
"""

import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

logger = logging.getLogger(__name__)
_WORTH_COMPILING_S = 15.0
"""Seconds of a time limit from which the kernel is compiled first. Chosen: with less, Python has a plan sooner."""
_SLOWNESS = 350.0
"""How much longer plain Python takes. Measured on the benchmark's instances: a step of the search 190 to 380 times, one
on the loads 70 to 290 times; chosen near the slow end, so that a search in Python begins at few places."""
_OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
"""`_nrt`: without counts of references, which take more time than the work where many arrays are handed on. Arrays then
cannot be made or copied inside; those that come in are held by the caller.
"""
_NO_WRAPPERS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_njit: Any = numba.njit  # its stubs do not know these options
_unliteral: Any = numba.types.unliteral
numba_config: Any = importlib.import_module("numba.core.config")  # nor these settings

Function = TypeVar("Function", bound=Callable[..., Any])


def prepare(limit_s: float | None) -> None:
    """Decide whether the kernel is compiled: if it was before, or a search has time for it.

    `limit_s` None says that time does not matter. What is decided holds for the whole process: once the kernel is
    imported, this does nothing.
    """
    if "skippipe_scheduler.search.kernel.anneal" in sys.modules:
        return
    compiled_before = any(cache_folder().rglob("anneal.anneal-*.nbi"))
    if limit_s is not None and limit_s < _WORTH_COMPILING_S and not compiled_before:
        numba_config.DISABLE_JIT = 1
    elif not compiled_before:
        logger.info("compiling the search, once for each installation: 20 s to a minute")


def slowness() -> float:
    """Return how much longer everything takes than in compiled code."""
    return _SLOWNESS if numba_config.DISABLE_JIT else 1.0


def compiled(function: Function) -> Function:
    """Compile a function that Python calls; it releases the interpreter lock while it runs.

    The result is kept where the user's cache can be written.
    """
    usual = numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(cache_folder())
    try:
        return cast(Function, _ignoring_literals(_njit(cache=_can_keep(), **_OPTIONS)(function)))
    finally:
        numba_config.CACHE_DIR = usual


def called(function: Function) -> Function:
    """Compile a function that only compiled ones call."""
    return cast(Function, _ignoring_literals(_njit(**_OPTIONS, **_NO_WRAPPERS)(function)))


def inlined(function: Function) -> Function:
    """Compile a small function into those that call it."""
    return cast(Function, _ignoring_literals(_njit(**_OPTIONS, **_NO_WRAPPERS, forceinline=True)(function)))


def _ignoring_literals(dispatcher: Any) -> Any:
    """Let one machine code serve all calls: numba would compile a function once more for each literal it is given."""
    if numba_config.DISABLE_JIT:
        return dispatcher
    template = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template([_unliteral(arg) for arg in args], kws)
    return dispatcher


def _can_keep() -> bool:
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(cache_folder(), os.W_OK)


def cache_folder() -> Path:
    """Return where the machine code of these sources is kept.

    Numba only looks at the file of a function itself; here a change in any of them makes a new folder. So does another
    place: numba finds code by the path of its source, and what was compiled for another copy would seem to be here.
    """
    here = Path(__file__).resolve().parent
    sources = str(here).encode() + b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "skippipe" / f"kernel-{hashlib.sha256(sources).hexdigest()[:16]}"
