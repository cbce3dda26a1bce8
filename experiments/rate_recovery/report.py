"""Table and figure of the recovery from its JSON alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments import markdown
from experiments.markdown import says
from experiments.rate_recovery.figure import recovery_figure
from experiments.results import read_runs, write_figure, write_text

__all__ = ["FOLDER", "TITLES", "load", "recovery_tables", "report"]

FOLDER = "rate_recovery"
# In the order of tables.
TITLES = {
    "reversible": "maximum likelihood, `ReversibleRateMatrices`",
    "likelihood": "maximum likelihood, `RateMatrices`",
    "softplus": "maximum likelihood, softplus and plain Adam",
    "projected": "matrix logarithm, projected on the cone",
    "logarithm": "matrix logarithm",
}
SAYS = {
    "rate_recovery": "How far estimated rates are from the truth.",
    "rate_recovery_way": "What estimates lose on new transitions, what they cost, and how often the matrix logarithm is no generator.",
}
Result = dict[str, Any]


def load(output: Path) -> list[Result]:
    """The results by seed.

    Raises:
        ValueError: a damaged file, or results of several settings.
    """
    return read_runs(output, FOLDER, "seed*.json", "cells")


def report(output: Path) -> list[Path]:
    """Write table.md and figures/recovery.png beside the results; returns what was written."""
    results, folder = load(output), output / FOLDER
    if not results:
        return []
    write_text(folder / "table.md", says(SAYS, recovery_tables(output)))
    write_figure(folder / "figures" / "recovery.png", recovery_figure(results), dpi=200)
    return [folder / "table.md", folder / "figures" / "recovery.png"]


def recovery_tables(output: Path) -> dict[str, str]:
    """Markdown by the names of its markers."""
    results = load(output)
    if not results:
        return {}
    note = f"\n{_provenance(results)}\n"
    return {"rate_recovery": _errors(results) + note, "rate_recovery_way": _way(results) + note}


def values(results: list[Result], estimator: str, transitions: int, key: str) -> list[Any]:
    """One value a seed."""
    return [
        cell[key]
        for result in results
        for cell in result["cells"]
        if cell["estimator"] == estimator and cell["transitions"] == transitions
    ]


def _errors(results: list[Result]) -> str:
    setting = results[0]["setting"]
    sizes = setting["transitions"]
    header = ["‖Q̂ − Q‖ / ‖Q‖, % from n transitions", *(f"n = {n:,}" for n in sizes)]
    rows = [
        [title, *(_spread(values(results, name, n, "error"), 100) for n in sizes)] for name, title in TITLES.items()
    ]
    names = {"reversible": "in detailed balance", "likelihood": "all rate matrices"}
    for name, bound in sorted(results[0]["bounds"].items(), reverse=True):
        rows.append([f"Cramér–Rao bound, {names[name]}", *(_percent(100 * bound / math.sqrt(n)) for n in sizes)])
    return markdown.table(header, rows)


def _way(results: list[Result]) -> str:
    """What estimates lose on new data, what they cost, and what is wrong with logarithms."""
    setting = results[0]["setting"]
    sizes = setting["transitions"]

    def row(title: str, estimator: str, key: str, show: Callable[[list[Any]], str]) -> list[str]:
        return [title, *(show(values(results, estimator, n, key)) for n in sizes)]

    rows = [
        row(f"{TITLES[name]}: nats lost on a new transition", name, "excess", _nats)
        for name in ("reversible", "likelihood", "projected")
    ]
    fitted = ("reversible", "likelihood", "softplus")
    rows += [row(f"{TITLES[name]}: steps", name, "steps", _mean) for name in fitted]
    rows += [row(f"{TITLES[name]}: CPU s", name, "cpu_seconds", _seconds) for name in fitted]
    for place, when in enumerate(setting["times"]):
        rows.append(row(f"no real logarithm of P̂({when:g}), % of seeds", "logarithm", "exists", partial(_lost, place)))
    rows.append(row("mean logarithm outside the cone, % of seeds", "logarithm", "in_cone", _outside))
    rows.append(row("its negative rates", "logarithm", "negative_rates", _mean))
    return markdown.table(["from n transitions", *(f"n = {n:,}" for n in sizes)], rows)


def _percent(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(found: list[float | None], factor: float) -> str:
    """Mean ± s.d. over the seeds that have a value."""
    numbers = [factor * x for x in found if x is not None]
    if not numbers:
        return "–"
    text = _percent(statistics.fmean(numbers))
    text += f" ± {_percent(statistics.stdev(numbers))}" if len(numbers) > 1 else ""
    return text if len(numbers) == len(found) else f"{text} ({len(numbers)} of {len(found)})"


def _nats(found: list[float | None]) -> str:
    numbers = [x for x in found if x is not None]
    text = f"{statistics.fmean(numbers):.1e}" if numbers else "∞"
    return text if len(numbers) in (0, len(found)) else f"{text} ({len(numbers)} of {len(found)})"


def _mean(found: list[float]) -> str:
    return f"{statistics.fmean(found):.0f}"


def _seconds(found: list[float]) -> str:
    return f"{statistics.fmean(found):.1f}"


def _outside(found: list[bool]) -> str:
    return f"{100 * (1 - statistics.fmean(found)):.0f}"


def _lost(place: int, found: list[list[bool]]) -> str:
    return _outside([exists[place] for exists in found])


def _provenance(results: list[Result]) -> str:
    setting = results[0]["setting"]

    def each(get: Callable[[Result], Any]) -> str:
        return ", ".join(sorted({str(get(result)) for result in results}))

    seeds = [result["seed"] for result in results]
    parts = [
        f"mean ± s.d. over {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}, no spread",
        f"truth {setting['q_file']}, {setting['states']} states, sha256 {setting['sha256'][:12]}…",
        f"n divided evenly among t = {', '.join(f'{t:g}' for t in setting['times'])}",
        f"{each(lambda r: r['hardware']['name'])}, one thread",
        f"torch {each(lambda r: r['versions']['torch'])}",
        each(lambda r: r["date"]),
    ]
    return f"{'; '.join(parts)}. Written by `liegroup-attn recover` from `results/*.json`."
