"""Build the documentation as a site, under build/site: python docs/tools/build_site.py.

The site is a view of the repository. Pages link to each other as files of the repository do, so that they read well on
a code host: `../benchmarks/README.md` from docs/, `docs/planning.md` from the README. Here they are copied to
build/docs with all that they link to outside of docs/, the links follow, and the site generator does the rest.
"""

import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT = Path(__file__).parents[2]
COPIES = ROOT / "build" / "docs"
RENAMED: Final = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that have another name on the site."""
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?=[)#])")
"""The target of a link or picture, without what follows `#`; addresses with a scheme have a colon."""
FENCED = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def copy_pages() -> None:
    """Copy all pages and what they link to, from page to page; a link that leads nowhere stays as it is."""
    shutil.rmtree(COPIES, ignore_errors=True)
    sources = [path for path in (ROOT / "docs").rglob("*") if path.is_file() and path.suffix != ".py"]
    waiting = [*RENAMED, *(path.relative_to(ROOT).as_posix() for path in sources)]
    copied = set(waiting)
    while waiting:
        path = waiting.pop()
        place = COPIES / _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not path.endswith(".md"):
            shutil.copyfile(ROOT / path, place)
            continue
        text, linked = _moved(path)
        place.write_text(text, encoding="utf-8")
        waiting += linked - copied
        copied |= linked


def _moved(page: str) -> tuple[str, set[str]]:
    """Return a page with its links as they are on the site, and the files of the repository that they lead to."""
    linked = set()

    def moved(match: re.Match[str]) -> str:
        target = _resolved(page, match["target"])
        if target is None:
            return match["target"]
        linked.add(target)
        return posixpath.relpath(_place(target), posixpath.dirname(_place(page)) or ".")

    text = (ROOT / page).read_text(encoding="utf-8")
    pieces, end = [], 0
    for block in FENCED.finditer(text):
        pieces += [LINK.sub(moved, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*pieces, LINK.sub(moved, text[end:])]), linked


def _resolved(page: str, target: str) -> str | None:
    """Return the path in the repository that a page's link leads to, of a folder its README; None where none is."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    return path if (ROOT / path).is_file() else None


def _place(path: str) -> str:
    """Return where a file of the repository stands on the site."""
    return RENAMED.get(path, path.removeprefix("docs/"))


def main() -> int:
    """Build the site; return 0 where all is well, and 1 where a link or a name leads nowhere."""
    copy_pages()
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=ROOT, check=False)
    if built.returncode == 0:
        print(f"open {ROOT / 'build' / 'site' / 'index.html'}")
    return min(built.returncode, 1)


if __name__ == "__main__":
    sys.exit(main())
