"""The page itself: sections of text, pictures and tables, written as one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skippipe_scheduler.files import write_atomically


@dataclass(frozen=True)
class Picture:
    """A plotly figure and the sentence that says what it shows and how that was measured."""

    figure: Any
    caption: str


@dataclass(frozen=True)
class Bar:
    """A table cell with a bar behind its text; `share` from 0 to 1 is the bar's length."""

    text: str
    share: float


@dataclass(frozen=True)
class Table:
    """A plain table; the first column is text, the others are numbers with units."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Bar]]


@dataclass(frozen=True)
class PageSection:
    """One heading of the page with what belongs below it."""

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """Everything that the template needs; `facts` are the few numbers shown largest."""

    title: str
    subtitle: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[PageSection] = ()


def write_report(path: Path, page: Page) -> None:
    """Write `page` as one HTML file, plotly.js inside. Raises `SkipPipeError` if it cannot be written."""
    write_atomically(path, render(page))


def render(page: Page) -> str:
    """Return the page's HTML. Text is escaped; scripts may not load anything (content security policy)."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from skippipe import __version__

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skippipe.monitor.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["bar"] = lambda cell: isinstance(cell, Bar)
    environment.filters["figure_json"] = lambda figure: Markup(figure_json(figure))
    template = environment.get_template("page.html.j2")
    return template.render(page=page, plotly=Markup(get_plotlyjs()), version=__version__)


def figure_json(figure: Any) -> str:
    """Return the figure as JSON that is safe inside a <script> element."""
    text: str = figure.to_json()
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
