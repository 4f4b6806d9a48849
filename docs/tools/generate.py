"""Write the pages of docs/ that are made from the program itself, or check that they are as it would write them.

python docs/tools/generate.py
python docs/tools/generate.py --check
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from api_pages import api_page
from architecture_parts import architecture_page, layers_picture
from commands_page import commands_page
from keys_pages import configuration_page, files_page

DOCS = Path(__file__).parents[1]


def architecture() -> str:
    """Return docs/architecture.md, of which only a part is made."""
    return architecture_page((DOCS / "architecture.md").read_text(encoding="utf-8"))


PAGES: Final[dict[str, Callable[[], str]]] = {
    "configuration.md": configuration_page,
    "file-keys.md": files_page,
    "commands.md": commands_page,
    "architecture.md": architecture,
    "layers.svg": layers_picture,
    "api/skippipe.md": partial(api_page, "skippipe"),
    "api/skippipe_scheduler.md": partial(api_page, "skippipe_scheduler"),
}


def main(arguments: list[str]) -> int:
    """Write what differs; with `--check` only name it, and return 1 where something does."""
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if arguments != ["--check"]:
                path.write_text(text, encoding="utf-8")
    if not stale:
        print("all generated pages are up to date")
    elif arguments == ["--check"]:
        print(f"stale: {', '.join(stale)}; renew with: python docs/tools/generate.py", file=sys.stderr)
        return 1
    else:
        print(f"written: {', '.join(stale)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
