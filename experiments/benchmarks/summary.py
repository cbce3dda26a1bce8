"""Numbers of a result file: which cell, how long, how many times over another row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Spread", "attention_cell", "find", "peak", "ratio", "seconds", "slope", "spread"]

Result = dict[str, Any]
SLOPE_POINTS = 4  # the last ones, where the leading power of N shows


class Spread(NamedTuple):
    """Median of several measurements, and their ends."""

    median: float
    low: float
    high: float

    def show(self, factor: float = 1.0) -> str:
        """``median (low–high)``, three digits."""
        median, low, high = (three_digits(factor * x) for x in self)
        return f"{median} ({low}–{high})"


def spread(values: Sequence[float]) -> Spread:
    """Median, least and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def find(result: Result, **facts: Any) -> list[dict[str, Any]]:
    """Cells that have these facts."""
    return [cell for cell in result["cells"].values() if all(cell.get(key) == fact for key, fact in facts.items())]


def attention_cell(result: Result, tokens: int, phase: str) -> dict[str, Any]:
    """Times of the part ``attention`` at one N; ``{}`` if it was not measured."""
    return next(iter(find(result, part="attention", tokens=tokens, phase=phase)), {})


def seconds(cell: dict[str, Any], row: str) -> list[float]:
    """Every repeat of a row; [] if it was left out or failed."""
    return cell.get("rows", {}).get(row, {}).get("seconds", [])


def ratio(cell: dict[str, Any], row: str, base: str) -> Spread | None:
    """Time of a row over that of another in the same round: median, least and largest over the rounds."""
    pairs = list(zip(seconds(cell, row), seconds(cell, base), strict=False))
    return spread([a / b for a, b in pairs]) if pairs else None


def peak(result: Result, row: str, tokens: int, phase: str) -> int | None:
    """Bytes beyond the inputs."""
    for cell in find(result, part="memory", tokens=tokens, phase=phase):
        if "bytes" in cell["rows"].get(row, {}):
            return cell["rows"][row]["bytes"]
    return None


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Least-squares power p of y ∝ xᵖ over the last points; None for fewer than two."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if b > 0][-SLOPE_POINTS:]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def three_digits(value: float) -> str:
    """Three significant digits, no exponent up to 10⁶."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
