"""Numbers as people read them, always with a unit."""

import math


def seconds(value: float) -> str:
    """Return a duration with three significant digits: 12.3 s, 45.6 ms, 789 µs."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if abs(value) * factor >= 0.9995:
            return f"{significant(value * factor)} {unit}"
    return f"{significant(value * 1e6)} µs"


def percent(share: float) -> str:
    """Return a share of one as a percentage with one decimal."""
    return f"{share * 100:.1f} %"


def relative(value: float) -> str:
    """Return a number of the size of one as a ratio, the same wherever it stands: 0.62."""
    return f"{value:.2f}"


def count(value: float) -> str:
    """Return a large number with a thousands separator and no decimals: 1,234,567."""
    return f"{value:,.0f}"


def visits_text(visits: int, relayed: int) -> str:
    """Return how many microbatches a node computes for, and how many it only relays where it does: 3 + 1 relayed."""
    return f"{visits} + {relayed} relayed" if relayed else str(visits)


def significant(value: float, digits: int = 3) -> str:
    """Return `value` with about `digits` significant digits, never in exponent form for ordinary sizes."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{decimals}f}"
