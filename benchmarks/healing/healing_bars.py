"""What a healed model is to reach, and the table that says whether it does."""

from typing import Any

from healing_ways import WAYS

from common.table import MARKS, Columns, Result

KEEPS = (1.0, 0.9, 0.75, 0.6, 0.5)
BAR_KEEP, BAR = 0.75, 1.4
"""At this share of the depth, perplexity is to be at most so many times that of the same model's full depth."""
BAR_MINUTES, BAR_GIB = 30, 3.0


def judged(result: Result) -> Result:
    """Add the ratio after each budget and whether the bars are met."""
    for leg in result["legs"]:
        leg["ratio"] = leg["perplexity"][str(BAR_KEEP)] / leg["perplexity"]["1.0"]
    in_time = [leg for leg in result["legs"] if leg["minutes"] <= BAR_MINUTES]
    healed = any(leg["ratio"] <= BAR for leg in in_time)
    fits = max(leg["peak_gib"] for leg in result["legs"]) <= BAR_GIB if WAYS[result["name"]].lora else None
    return result | {"healed": healed, "fits": fits}


def columns() -> Columns:
    """Return the columns of the table."""
    before_and_after: dict[str, Any] = {
        f"keep {keep}": lambda row, keep=str(keep): (
            f"{_cell(row['before'], keep)} → {_cell(row['legs'][-1], keep)}"  # perplexity (exact answers)
        )
        for keep in KEEPS
    }
    return {
        "way": lambda row: row["name"],
        "steps": lambda row: ", ".join(str(leg["steps"]) for leg in row["legs"]),
        "tokens": lambda row: ", ".join(f"{leg['trained']:,}" for leg in row["legs"]),
        "minutes": lambda row: ", ".join(f"{leg['minutes']:.1f}" for leg in row["legs"]),
        **before_and_after,
        f"{BAR_KEEP} by full depth": lambda row: ", ".join(f"{leg['ratio']:.2f}" for leg in row["legs"]),
        f"at most {BAR} in {BAR_MINUTES} min": lambda row: MARKS[row["healed"]],
        "peak": lambda row: f"{max(leg['peak_gib'] for leg in row['legs']):.2f} GiB",
        f"at most {BAR_GIB:.0f} GiB": lambda row: MARKS[row["fits"]],
    }


def _cell(measured: dict[str, Any], keep: str) -> str:
    """Return perplexity and, where questions were asked, the share of exact answers in brackets."""
    perplexity, exact = measured["perplexity"].get(keep), measured["exact"].get(keep)
    if perplexity is None:
        return "-"
    shown = f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.1e}"
    return shown if exact is None else f"{shown} ({exact:.0%})"
