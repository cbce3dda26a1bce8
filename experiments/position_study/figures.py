"""Figures of the study: which positions are alike, how likeness falls with distance, what each layer still knows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from liegroup_attn.plots import plot_curves, plot_similarity

__all__ = ["figures"]

Results = dict[tuple[str, str], list[dict[str, Any]]]  # (encoding, role) → runs by seed
COLORS = {"encoder": "#0072B2", "decoder": "#D55E00", "sinusoidal": "#000000"}
FAINT = {"encoder": "#9CCBE6", "decoder": "#F2B48C"}
LAYERS = {"r2": "position, R²", "order": "order right, share", "distance_r2": "distance, R²"}
LEAST = -0.1  # of the R² shown: fits that transfer worse than the mean would stretch the axis


def figures(results: Results) -> dict[str, Figure]:
    """Name → figure, those for which there are results."""
    found = {"layers": _layers(results)}
    if any(runs[0]["trained"]["table"] for runs in results.values()):
        found |= {"similarity": _similarity(results), "distance": _distance(results)}
    return found


def _tables(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Title → tables by seed: the learned ones, and the fixed one once."""
    found = {role: results[e, role] for e, role in results if e == "learned"}
    tables = {role: [run["trained"]["table"] for run in runs] for role, runs in found.items()}
    fixed = [runs[0]["trained"]["table"] for (encoding, _), runs in results.items() if encoding == "sinusoidal"]
    return tables | ({"sinusoidal": fixed[:1]} if fixed else {})


def _similarity(results: Results) -> Figure:
    """Of the first seed."""
    titles = {"encoder": "learned, encoder", "decoder": "learned, decoder", "sinusoidal": "sinusoidal, fixed"}
    return plot_similarity({titles[name]: _map(tables[0]) for name, tables in _tables(results).items()})[0]


def _map(table: dict[str, Any]) -> np.ndarray:
    """Of sinusoidal positions the curve says all: their similarity is a function of distance."""
    if "map" in table:
        return np.array(table["map"])
    places = np.arange(len(table["curve"]))
    return np.array(table["curve"])[abs(places[:, None] - places)]


def _distance(results: Results) -> Figure:
    curves, colors = {}, {}
    for name, tables in _tables(results).items():
        title = "sinusoidal, fixed" if name == "sinusoidal" else f"learned, {name}"
        curves[title] = (range(1, len(tables[0]["curve"])), [table["curve"][1:] for table in tables])
        colors[title] = COLORS[name]
    for runs in [runs for (encoding, _), runs in results.items() if encoding == "learned"][:1]:  # both start alike
        tables = [run["untrained"]["table"] for run in runs]
        curves["learned, untrained"] = (range(1, len(tables[0]["curve"])), [table["curve"][1:] for table in tables])
        colors["learned, untrained"] = "#999999"
    label = "mean cosine of two positions"
    return plot_curves(
        {title: (list(x), y) for title, (x, y) in curves.items()},
        xlabel="distance (tokens)",
        ylabel=label,
        colors=colors,
    )[0]


def _layers(results: Results) -> Figure:
    """Rows: what is read; columns: the encoding."""
    encodings = list(dict.fromkeys(encoding for encoding, _ in results))
    figure = Figure(figsize=(2.5 * len(encodings) + 1.9, 6.2), layout="constrained")
    grid = figure.subplots(len(LAYERS), len(encodings), squeeze=False, sharey="row", sharex=True)
    handles: dict[str, Any] = {}
    for i, (number, label) in enumerate(LAYERS.items()):
        for j, (ax, encoding) in enumerate(zip(grid[i], encodings, strict=True)):
            curves, colors = {}, {}
            for role in ("encoder", "decoder"):
                for when, palette in (("trained", COLORS), ("untrained", FAINT)):
                    runs = results.get((encoding, role), [])
                    values = [[max(layer[number], LEAST) for layer in run[when]["layers"]] for run in runs]
                    if values:
                        title = f"{role}, {when}"
                        curves[title] = (list(range(len(values[0]))), values)
                        colors[title] = palette[role]
            plot_curves(
                curves,
                ax=ax,
                xlabel="after block" if i == len(LAYERS) - 1 else "",
                ylabel=label if j == 0 else "",
                colors=colors,
            )
            for line in ax.lines:
                line.set(marker="", linestyle=(0, (3, 1.5)) if str(line.get_label()).endswith("untrained") else "-")
            handles |= {line.get_label(): line for line in ax.lines}
            if ax.get_legend() is not None:
                ax.get_legend().remove()
            blocks = len(next(iter(curves.values()))[0]) - 1
            ax.set_xticks(range(blocks + 1), ["input", *(str(b + 1) for b in range(blocks))])
            ax.set_ylim((0.45, 1.02) if number == "order" else (LEAST - 0.03, 1.03))
            if number == "r2":
                ax.set_title(encoding, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    return figure
