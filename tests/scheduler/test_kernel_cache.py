"""How functions are compiled, where that is kept, and what happens where it cannot be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.errors import NumbaError

from skippipe_scheduler.search.kernel.arrays import Floats
from skippipe_scheduler.search.kernel.jit import cache_folder, called, compiled

SCHEDULER = Path(__file__).parents[2] / "scheduler"
PROGRAM = """
import sys; sys.path[:0] = sys.argv[1:]
from small_problems import make_problem
from skippipe_scheduler.solver.solve import SolveOptions, solve
from skippipe_scheduler.search.kernel.jit import slowness
print(solve(make_problem(1, [1, 1], 2, 2), SolveOptions(time_limit_s=1.0)).predicted.iteration_s > 0, slowness())
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_short_search_without_compiled_code_does_not_wait_for_it(tmp_path: Path, writable: bool) -> None:
    cache = tmp_path / "cache"
    if not writable:
        cache.write_text("not a folder")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.split() == ["True", "350.0"]


def test_code_compiled_for_another_copy_of_the_sources_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled_here = cache_folder() / "kernel" / "anneal.anneal-1.py311.nbi"
    compiled_here.parent.mkdir(parents=True)
    compiled_here.touch()
    copy = shutil.copytree(SCHEDULER, tmp_path / "copy")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(copy), str(Path(__file__).parent)],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.split() == ["True", "350.0"]


def test_compiled_functions_do_not_count_references() -> None:
    @compiled
    def first(values: Floats) -> float:
        return float(values[0])

    @compiled
    def first_of_copy(values: Floats) -> float:
        return float(values.copy()[0])

    assert first(np.ones(1)) == 1.0
    with pytest.raises(NumbaError, match="NRT required"):
        first_of_copy(np.ones(1))


def test_a_function_is_compiled_once_whatever_literals_it_is_given() -> None:
    @called
    def plus_one(value: int) -> int:
        return value + 1

    @compiled
    def sum_of_three(values: Floats) -> int:
        return plus_one(1) + plus_one(2) + plus_one(values.shape[0])

    callee: Any = plus_one
    assert sum_of_three(np.ones(3)) == 9
    assert len(callee.signatures) == 1
