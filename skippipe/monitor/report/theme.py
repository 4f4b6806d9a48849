"""Colours and the layout that all pictures share; the page's script adds the light or dark parts."""

import html
from typing import Any

OPERATION_COLOURS = {
    "F": "#4c8dff",
    "L": "#22b07d",
    "B": "#f2994a",
    "W": "#f7c59a",
    "RF": "#9b6bf2",
    "RB": "#c56bd6",
    "REDUCE": "#8b95a5",
}
OPERATION_NAMES = {
    "F": "Forward",
    "L": "Loss",
    "B": "Backward",
    "W": "Weight gradient",
    "RF": "Forward relay",
    "RB": "Backward relay",
    "REDUCE": "Gradient reduction",
}
RELAY_SYMBOLS = {"RF": "triangle-right", "RB": "triangle-left"}
"""Markers of the tasks that take no time, so that a bar would not be seen."""
FAINT = "rgba(128, 138, 155, 0.10)"
NEUTRAL = "#8b95a5"
PALETTE = (
    "#4c8dff",
    "#f2994a",
    "#22b07d",
    "#e05d8a",
    "#9b6bf2",
    "#1fb6c9",
    "#c9a227",
    "#d9534f",
    "#6fae3d",
    "#7a8cff",
    "#b9770e",
    "#5d9c97",
)

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagram")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def colour(index: int) -> str:
    """Return the colour of the group with this number; colours repeat after twelve groups."""
    return PALETTE[index % len(PALETTE)]


def symbol(index: int) -> str:
    """Return the marker of the group with this number; markers repeat after ten groups."""
    return SYMBOLS[index % len(SYMBOLS)]


def dash(index: int) -> str:
    """Return the line style of the group with this number; styles repeat after six groups."""
    return DASHES[index % len(DASHES)]


def fade(hexadecimal: str, opacity: float) -> str:
    """Return '#rrggbb' with an opacity between 0 and 1, as 'rgba(...)'."""
    red, green, blue = (int(hexadecimal[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def relay_marker(operation: str) -> dict[str, Any]:
    """Return the triangle of a relay, which stands out from what it lies upon."""
    outline = {"width": 1.5, "color": OPERATION_COLOURS[operation]}
    return {"symbol": RELAY_SYMBOLS[operation], "size": 10, "color": "#ffffff", "line": outline}


def label(text: str) -> str:
    """Return `text` so that plotly shows it as written (it reads some HTML tags in its labels)."""
    return html.escape(text, quote=False)


def base_layout(height: int) -> dict[str, Any]:
    """Return the layout shared by all pictures, `height` in pixels."""
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 64, "r": 24, "t": 40, "b": 52},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
        "hovermode": "closest",
    }
