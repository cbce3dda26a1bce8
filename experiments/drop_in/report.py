"""The table of models from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.drop_in.checks import BOUNDS
from experiments.markdown import says
from experiments.results import read_json, write_text

__all__ = ["FOLDER", "drop_in_tables", "load", "passed", "report"]

FOLDER = "drop_in"
LIBRARIES = ("torch.nn", "liegroup_attn", "transformers", "x_transformers", "litgpt")  # in the order of the table
SAYS = {"drop_in": "Models of several libraries after convert_attention: what must hold, and whether it does."}
Result = dict[str, Any]


def load(output: Path) -> list[Result]:
    """Every result, one a library."""
    paths = [output / FOLDER / "results" / f"{library}.json" for library in LIBRARIES]
    return [read_json(path, "library", "models", "versions", "hardware", "date") for path in paths if path.exists()]


def passed(title: str, number: float | None) -> bool | None:
    """Whether a number keeps within its bound; None where the property does not apply."""
    return None if number is None else number <= BOUNDS[title]


def report(output: Path) -> list[Path]:
    """Write table.md beside the results; returns what was written."""
    tables = drop_in_tables(output)
    if not tables:
        return []
    path = output / FOLDER / "table.md"
    write_text(path, says(SAYS, tables))
    return [path]


def drop_in_tables(output: Path) -> dict[str, str]:
    """Markdown by the name of its marker."""
    results = load(output)
    if not results:
        return {}
    lines = [f"| model | library | {' | '.join(BOUNDS)} |", f"|:--|:--|{'|'.join(['--:'] * len(BOUNDS))}|"]
    for result in results:
        for name, row in result["models"].items():
            lines.append(f"| {name} | {result['library']} | {' | '.join(_cell(t, row[t]) for t in BOUNDS)} |")
    return {"drop_in": "\n".join(lines) + f"\n\n{_provenance(results)}\n"}


def _cell(title: str, number: float | None) -> str:
    mark = {True: "✓", False: "✗", None: "·"}[passed(title, number)]
    # Counts are 0 where all is well; differences say how small they are.
    return mark if not number else f"{mark} {number:.0e}"


def _provenance(results: list[Result]) -> str:
    versions: dict[str, str] = {}
    for result in results:
        versions |= result["versions"]
    bounds = ", ".join(f"{title} {bound:g}" for title, bound in BOUNDS.items() if bound)
    hardware = ", ".join(sorted({result["hardware"] for result in results}))
    dates = ", ".join(sorted({result["date"] for result in results}))
    return (
        f"✓ within its bound, ✗ not, · does not apply; numbers are largest differences of float32 outputs (bounds: {bounds}), "
        f"0 where none is given; random weights, seed 0, {hardware}, one thread; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; {dates}. Written by `liegroup-attn drop-in` "
        "from `results/*.json`."
    )
