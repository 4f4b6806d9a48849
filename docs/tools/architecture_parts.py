"""What docs/architecture.md has from the source itself: the picture of the layers, and a line for each package.

Layers are those that import-linter holds (pyproject.toml); what a package is for stands in its `__init__.py`.
"""

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parents[2]
PACKAGES: Final = {"skippipe": ROOT / "skippipe", "skippipe_scheduler": ROOT / "scheduler" / "skippipe_scheduler"}
BLOCK = re.compile(r"(?<=<!-- packages: written by generate.py -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)
"""The part of the page that is written anew."""
ROW, BOX, TOP, WIDTH = 50, 32, 56, 960
COLUMNS: Final = {"skippipe": (80, 450), "skippipe_scheduler": (640, 300)}
"""Left edge and width in the picture."""
WITH_TORCH, WITHOUT_TORCH, TEXT = "#4c78a8", "#54a24b", "#444"


def architecture_page(text: str) -> str:
    """Return the page with the lines about packages as the packages have them now."""
    rows = [row for package, folder in PACKAGES.items() for row in _rows(package, folder)]
    return BLOCK.sub("\n| package | what happens there |\n|---|---|\n" + "".join(rows) + "\n", text, count=1)


def layers_picture() -> str:
    """Return the layers of both packages as an SVG picture, the upper ones importing the lower ones."""
    layers = _layers()
    height = TOP + ROW * max(len(rows) for rows in layers.values()) + 60
    label = "The layers of skippipe and of skippipe_scheduler; imports go down, and from the first to the second"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'role="img" aria-label="{label}">',
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L10,5 L0,10 z" fill="#7b3fbf"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff" rx="10"/>',
    ]
    for package, rows in layers.items():
        parts += _column(package, rows)
    parts += _arrows(height)
    return "\n".join([*parts, "</svg>\n"])


def _column(package: str, rows: list[list[str]]) -> Iterator[str]:
    left, width = COLUMNS[package]
    yield _text(left + width / 2, 36, package, size=17)
    for row, names in enumerate(rows):
        top = TOP + row * ROW
        yield f'<rect x="{left}" y="{top}" width="{width}" height="{ROW - 8}" rx="10" fill="#7b3fbf" opacity="0.07"/>'
        wide = (width - 12 * (len(names) + 1)) / len(names)
        for index, name in enumerate(names):
            x = left + 12 + index * (wide + 12)
            free = {package, f"{package}.{name}"} & _without_torch()
            colour = WITHOUT_TORCH if free else WITH_TORCH
            yield f'<rect x="{x:.0f}" y="{top + 5}" width="{wide:.0f}" height="{BOX}" rx="8" fill="{colour}"/>'
            yield _text(x + wide / 2, top + 26, name, colour="#ffffff")


def _arrows(height: int) -> Iterator[str]:
    left, width = COLUMNS["skippipe"]
    right = COLUMNS["skippipe_scheduler"][0]
    bottom, middle = height - 76, TOP + 4 * ROW - 4
    line = '<path d="{}" fill="none" stroke="#7b3fbf" stroke-width="3" marker-end="url(#head)"/>'
    yield line.format(f"M{left - 20},{TOP + 8} L{left - 20},{bottom}")
    yield f'<g transform="rotate(-90 {left - 38} {(TOP + bottom) / 2:.0f})">'
    yield _text(left - 38, (TOP + bottom) / 2, "imports go down") + "</g>"
    yield line.format(f"M{left + width + 8},{middle} L{right - 10},{middle}")
    yield _text((left + width + right) / 2, middle - 12, "may import")
    for x, colour, words in ((left, WITH_TORCH, "with torch"), (left + 130, WITHOUT_TORCH, "never imports torch")):
        yield f'<circle cx="{x + 8}" cy="{height - 24}" r="6" fill="{colour}"/>'
        yield _text(x + 22, height - 19, words, size=13, anchor="start")


def _text(x: float, y: float, words: str, *, size: int = 14, anchor: str = "middle", colour: str = TEXT) -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{colour}">{escape(words)}</text>'


def _layers() -> Mapping[str, list[list[str]]]:
    """Return the layers of each package from top to bottom; each is a list of packages and modules."""
    contracts = {contract["containers"][0]: contract for contract in _contracts() if contract["type"] == "layers"}
    return {package: [re.split(r" [|:] ", layer) for layer in contracts[package]["layers"]] for package in PACKAGES}


def _without_torch() -> set[str]:
    """Return the packages that a contract keeps from importing torch."""
    return {
        module
        for contract in _contracts()
        if contract["type"] == "forbidden" and "torch" in contract["forbidden_modules"]
        for module in contract["source_modules"]
    }


def _contracts() -> list[dict[str, Any]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts: list[dict[str, Any]] = settings["tool"]["importlinter"]["contracts"]
    return contracts


def _rows(package: str, folder: Path) -> Iterator[str]:
    """Yield a row for each package below `folder`, in the order of the layers from the top."""
    order = [name for layer in _layers()[package] for name in layer]
    for name in order:
        for init in sorted((folder / name).rglob("__init__.py"), key=lambda path: path.parent):
            inside = init.parent.relative_to(folder)
            yield f"| `{(folder / inside).relative_to(ROOT)}` | {_purpose(init)} |\n"


def _purpose(init: Path) -> str:
    paragraph = (ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|")
