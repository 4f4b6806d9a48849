"""Makes the helper modules of tests/ importable from every test, judges examples alike, and shares one browser."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from skippipe.cli.main import FULL_COLLECTION_INTERVAL

if TYPE_CHECKING:
    from browsing import Browser

sys.path.insert(0, str(Path(__file__).parent))
# For the workers and all that they start, which fill the cores already: with two threads each, the tests of models take
# 1.3 times as long (measured with 3 workers on 2 cores).
os.environ["OMP_NUM_THREADS"] = "1"
gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION_INTERVAL)  # as in the processes of the commands
settings.register_profile("tests", deadline=None)  # a whole test has a timeout; one example may meet a busy machine
settings.load_profile("tests")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    """A headless browser."""
    from browsing import start_browser

    driver = start_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()
