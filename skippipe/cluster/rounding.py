"""Measured numbers keep the digits that mean something."""

DIGITS = 4


def rounded(number: float) -> float:
    """Return `number` with four significant digits."""
    return float(f"{number:.{DIGITS}g}")
