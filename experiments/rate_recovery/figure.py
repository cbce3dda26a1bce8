"""Error over the number of transitions, and one estimate beside the truth."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from liegroup_attn.plots import plot_curves

__all__ = ["recovery_figure"]

# Okabe–Ito, as in the other figures.
LABELS = {
    "reversible": "maximum likelihood, ReversibleRateMatrices",
    "likelihood": "maximum likelihood, RateMatrices",
    "projected": "matrix logarithm, projected",
    "logarithm": "matrix logarithm",
}
COLORS = dict(zip(LABELS.values(), ("#0072B2", "#D55E00", "#7F7F7F", "#000000"), strict=True))
SCATTERED = ("projected", "likelihood", "reversible")


def recovery_figure(results: list[dict[str, Any]]) -> Figure:
    """Left: relative error, mean ± s.d. over the seeds, and the Cramér–Rao bounds. Right: rates of the first seed."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _errors(left, results)
    _scatter(right, results[0])
    return figure


def _errors(ax: Axes, results: list[dict[str, Any]]) -> None:
    setting = results[0]["setting"]
    sizes = setting["transitions"]
    curves = {}
    for name, label in LABELS.items():
        rows = [[c["error"] for c in result["cells"] if c["estimator"] == name] for result in results]
        curves[label] = (sizes, [[math.nan if e is None else 100 * e for e in row] for row in rows])
    plot_curves(
        curves, ax=ax, xlabel="transitions n", ylabel="relative error $\\|\\hat Q - Q\\| / \\|Q\\|$ (%)", colors=COLORS
    )
    for name, bound in results[0]["bounds"].items():
        limit = [100 * bound / math.sqrt(n) for n in sizes]
        ax.plot(sizes, limit, color=COLORS[LABELS[name]], linewidth=1, linestyle=(0, (1, 2)))
    ax.plot([], [], color="#555555", linewidth=1, linestyle=(0, (1, 2)), label="Cramér–Rao bound of the family")
    ax.set(xscale="log", yscale="log")
    low, high = ax.get_ylim()
    ticks = [digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()
    ax.set_title(f"mean ± s.d. over {len(results)} seeds", fontsize=9)
    handles, labels = ax.get_legend_handles_labels()
    order = [labels.index(label) for label in (*reversed(LABELS.values()), labels[-1])]
    ax.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=8, loc="lower left")


def _scatter(ax: Axes, result: dict[str, Any]) -> None:
    rates = result["rates"]
    truth = rates["truth"]
    positive = [x for x in truth if x > 0]
    low, high = min(positive) / 3, 2 * max(positive)
    floor = low / 3  # estimates of 0 and below it stand here
    for name, marker in zip(SCATTERED, "Dso", strict=True):
        if name not in rates:
            continue
        shown = [max(x, floor) for x in rates[name]]
        color = COLORS[LABELS[name]]
        ax.scatter(truth, shown, s=9, marker=marker, color=color, alpha=0.55, linewidths=0, label=LABELS[name])
    ax.plot([low, high], [low, high], color="#555555", linewidth=0.8, zorder=0)
    ax.axhline(low, color="#555555", linewidth=0.6, linestyle=(0, (4, 3)))
    ax.text(high, low / 1.1, f"below {low:.0e}, or not positive", ha="right", va="top", fontsize=7, color="#555555")
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor / 1.6, high))
    ax.set_xlabel("true rate $Q_{ij}$", fontsize=9)
    ax.set_ylabel("estimated rate $\\hat Q_{ij}$", fontsize=9)
    ax.set_title(f"n = {rates['transitions']:,}, seed {result['seed']}", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8, loc="upper left")
