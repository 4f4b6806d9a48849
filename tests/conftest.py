"""Makes the helper modules of tests/ importable from every test, and shares one browser."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browsing import Browser

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    """A headless browser."""
    from browsing import start_browser

    driver = start_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()
