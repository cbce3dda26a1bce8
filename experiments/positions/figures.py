"""Figures of the comparison: bits per byte against length, and accuracies as dots."""

from __future__ import annotations

import math
import statistics
from typing import Any

from matplotlib.figure import Figure

from experiments.positions.encodings import ENCODINGS, MIXINGS, RESCALED
from liegroup_attn.plots import plot_curves

__all__ = ["dots", "lines"]

Rows = dict[str, dict[str, list[dict[str, Any]]]]
COLORS = {"softmax": "#000000", "first_hop": "#0072B2", "exp": "#D55E00"}  # Okabe–Ito, as in the other figures
MARKS = {"softmax": "s", "first_hop": "o", "exp": "D"}
# of none, sinusoidal, learned; RoPE, its scalings at test, XPos; biases; rates
PALETTE = (
    "#000000", "#7F7F7F", "#B5B5B5", "#0072B2", "#56B4E9", "#88CCEE", "#332288", "#009E73", "#D55E00", "#E69F00",
    "#8C2D04", "#CC79A7", "#7B3294", "#66C2A5", "#F4A582",
)  # fmt: skip
SHAPES = "osv^<>pPXhd"
PARTS = {"all": "all positions", "last": "last {} positions"}


def lines(rows: Rows, unit: str) -> Figure:
    """Against the context's length; a column a mixing, above all positions, below the last ones of each context."""
    setting = next(iter(next(iter(rows.values())).values()))[0]["setting"]
    lengths = setting["lengths"]
    mixings = [name for name in MIXINGS if any(name in by for by in rows.values())]
    figure = Figure(figsize=(3.4 * len(mixings) + 2.2, 6.2), layout="constrained")
    grid = figure.subplots(2, len(mixings), sharex=True, sharey=True, squeeze=False)
    titles = [choice.title for choice in ENCODINGS.values()]
    after = titles.index(ENCODINGS["rope"].title) + 1
    titles[after:after] = [choice.title for choice in RESCALED.values()]
    titles += [title for title in rows if title not in titles]
    colors = dict(zip(titles, PALETTE, strict=False))
    shown: list[float] = []
    for row, (key, part) in zip(grid, PARTS.items(), strict=True):
        for ax, mixing in zip(row, mixings, strict=True):
            curves = {
                title: (lengths, [[_value(run, length, key) for length in lengths] for run in by[mixing]])
                for title, by in rows.items()
                if mixing in by
            }
            shown += [x for _, runs in curves.values() for run in runs for x in run if not math.isnan(x)]
            plot_curves(curves, ax=ax, colors=colors)
            for line in ax.lines:
                alone = sum(math.isfinite(y) for y in line.get_ydata()) == 1  # one length makes no line
                mark = SHAPES[titles.index(line.get_label()) % len(SHAPES)]
                line.set(marker="D" if alone else mark, markersize=7 if alone else 4)
            if ax.get_legend() is not None:
                ax.get_legend().remove()
            ax.set_xscale("log", base=2)
            ax.set_xticks(lengths, [str(length) for length in lengths])
            ax.minorticks_off()
            ax.set_title(f"{MIXINGS[mixing].title}\n{part.format(lengths[0])}", fontsize=9)
        row[0].set_ylabel(f"test {unit}", fontsize=9)
    for ax in grid[-1]:
        ax.set_xlabel("context at test (bytes)", fontsize=9)
    if (beyond := _limit(grid[0][0], shown)) is not None:
        figure.supxlabel(
            f"up to {beyond:.1f} {unit} lie above the axes; they stand in the tables", fontsize=8, color="#555555"
        )
    handles: dict[str, Any] = {}
    for ax in grid.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ordered = [title for title in rows if title in handles]
    figure.legend([handles[t] for t in ordered], ordered, loc="outside right center", frameon=False, fontsize=8)
    return figure


def dots(rows: Rows, unit: str) -> Figure:
    """A line an encoding, a panel a test length, a colour a mixing; each seed faint, their mean full."""
    setting = next(iter(next(iter(rows.values())).values()))[0]["setting"]
    lengths, titles = setting["lengths"], list(rows)
    mixings = [name for name in MIXINGS if any(name in by for by in rows.values())]
    figure = Figure(figsize=(2.6 * len(lengths) + 2.6, 0.32 * len(titles) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, sharex=True, squeeze=False)[0]
    for at, (ax, length) in enumerate(zip(panels, lengths, strict=True)):
        for place, mixing in enumerate(mixings):
            shift = 0.22 * (place - (len(mixings) - 1) / 2)
            for line, title in enumerate(titles):
                found = [_value(run, length, "all") for run in rows[title].get(mixing, [])]
                found = [x for x in found if not math.isnan(x)]
                if found:
                    at_y, color, mark = line + shift, COLORS[mixing], MARKS[mixing]
                    ax.plot(found, [at_y] * len(found), mark, color=color, markersize=3, alpha=0.35, markeredgewidth=0)
                    ax.plot(statistics.fmean(found), at_y, mark, color=color, markersize=4)
        if len(lengths) > 1:
            ax.set_title(f"{length} tokens{', as trained' if not at else ''}", fontsize=9)
        ax.set_xlabel(f"test {unit}", fontsize=9)
        ax.set_ylim(len(titles) - 0.5, -0.5)
        ax.set_yticks(range(len(titles)), titles, fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(axis="y", color="#EEEEEE", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    for mixing in mixings:
        label, mark = MIXINGS[mixing].title, MARKS[mixing]
        panels[0].plot([], [], mark, color=COLORS[mixing], markersize=4, label=label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def _value(run: dict[str, Any], length: int, key: str) -> float:
    found = run["test"][str(length)]
    return math.nan if found is None else found[key]


def _limit(ax: Any, shown: list[float]) -> float | None:
    """Leave what is far above most of the numbers outside, and say how far it goes; None where all is inside."""
    low, middle = min(shown), statistics.median(shown)
    top = middle + max(4 * (middle - low), 0.1)
    top = max(shown) if max(shown) < 1.1 * top else top
    pad = 0.04 * (top - low) + 1e-3
    ax.set_ylim(low - pad, top + pad)
    return max(shown) if max(shown) > top else None
