"""The documentation site, and the pages that are made from the program."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_up_to_date() -> None:
    """Renew them with: python docs/tools/generate.py."""
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "tools" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
