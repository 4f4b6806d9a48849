"""One row in this process; its figures are printed as they come, each time all of them as one line of JSON.

python row.py NAME --folder FOLDER --seconds S [--carried FOLDER] [--rehearse]
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from rows import ROWS
from setting import Figures


def main() -> None:
    """Measure the row that is named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=[*ROWS])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--carried", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    ROWS[given.name].measure(Figures(given.rehearse, given.seconds), given.folder / given.name, given.carried)


if __name__ == "__main__":
    main()
