"""The columns of the runtime's table."""

from common.table import MARKS, Columns, Result


def _figures(result: Result) -> str:
    if "error" in result:
        return str(result["error"])
    return "; ".join(
        f"{figure['value']:.2f} {figure['unit']} {figure['label']}".strip() for figure in result["figures"]
    )


def _spread(result: Result) -> str:
    quartiles = [figure["quartiles"] for figure in result.get("figures", ())]
    return "; ".join(f"{quartile[0]:.2f} to {quartile[1]:.2f}" for quartile in quartiles if quartile)


COLUMNS: Columns = {
    "row": lambda result: result["name"],
    "bar": lambda result: result["bar"],
    "measured (median)": _figures,
    "quartiles": _spread,
    "met": lambda result: MARKS[result["met"]],
    "note": lambda result: result.get("note", ""),
}
PAGE = ("Results of the runtime's benchmark", COLUMNS)
