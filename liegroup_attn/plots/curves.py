"""Curves over seeds: the mean as a line, one standard deviation as a band."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from liegroup_attn.errors import ShapeError
from liegroup_attn.plots._style import (
    GREY,
    MARKERS,
    assign_colors,
    figure_of,
    lighten,
    new_figure,
    place_legend,
    to_array,
)

__all__ = ["plot_accuracy_by_depth", "plot_curves"]


def plot_curves(
    curves: Mapping[str, tuple[Any, Any]],
    *,
    ax: Axes | None = None,
    xlabel: str = "",
    ylabel: str = "",
    colors: Mapping[str, str] | None = None,
) -> tuple[Figure, Axes]:
    """Draw mean ± standard deviation over seeds, one curve a name.

    Args:
        curves: name → (x, ys), tensors, arrays or lists; x is (points,), ys (seeds, points) or (points,). NaN is
            left out of mean and band; no band where fewer than two seeds have a value.
        ax: axes to draw on; a new figure if None.
        xlabel: label of the horizontal axis, with its unit.
        ylabel: label of the vertical axis, with its unit.
        colors: name → colour; names not in it get the Okabe–Ito palette in their order.

    Returns:
        (fig, ax). The legend is ordered as the curves end, and stands beside new axes, inside given ones.

    Raises:
        ShapeError: ys is not (seeds, len(x)).

    Example:
        >>> fig, ax = plot_curves({"softmax": ([1, 2, 3], [[2.1, 1.8, 1.6], [2.2, 1.8, 1.7]])}, ylabel="nats per byte")
        >>> len(ax.lines), ax.get_ylabel()
        (1, 'nats per byte')
    """
    own = ax is None
    if ax is None:
        ax = new_figure(4.8, 3.0).add_subplot()
    palette = assign_colors(curves, colors)
    lines, ends = [], []
    for index, (name, (x, ys)) in enumerate(curves.items()):
        x, mean, std = to_array(x), *_mean_and_std(name, x, ys)
        marker = MARKERS[index % len(MARKERS)] if len(x) <= 30 else None
        (line,) = ax.plot(x, mean, color=palette[name], label=name, linewidth=1.6, marker=marker, markersize=3.5)
        if np.isfinite(std).any():
            ax.fill_between(x, mean - std, mean + std, color=palette[name], alpha=0.18, linewidth=0)
        lines.append(line)
        seen = mean[np.isfinite(mean)]
        ends.append(seen[-1] if len(seen) else -np.inf)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    lighten(ax)
    if lines:
        ordered = [lines[i] for i in np.argsort(ends, kind="stable")[::-1]]
        place_legend(ax, own=own, handles=ordered)
    return figure_of(ax), ax


def plot_accuracy_by_depth(
    accuracy: Mapping[str, Any],
    *,
    ax: Axes | None = None,
    trained_depth: int | None = None,
    colors: Mapping[str, str] | None = None,
) -> tuple[Figure, Axes]:
    """Draw accuracy over depth, mean ± standard deviation over seeds, one curve a name.

    Args:
        accuracy: name → (seeds, depths) or (depths,), from 0 to 1, index = depth from 0, NaN where nothing was
            measured: what ``metrics.AccuracyByDepth`` computes. Names may differ in their number of depths.
        ax: axes to draw on; a new figure if None.
        trained_depth: the deepest depth in training; what is deeper is shaded.
        colors: as in ``plot_curves``.

    Returns:
        (fig, ax), the vertical axis in percent.

    Raises:
        ShapeError: an entry has more than two axes.

    Example:
        >>> fig, ax = plot_accuracy_by_depth({"softmax": [1.0, 0.6, 0.5]}, trained_depth=1)
        >>> ax.get_ylabel()
        'accuracy (%)'
    """
    percent = {name: 100 * np.atleast_1d(to_array(values)) for name, values in accuracy.items()}
    curves = {name: (np.arange(values.shape[-1]), values) for name, values in percent.items()}
    figure, ax = plot_curves(curves, ax=ax, xlabel="depth (hops to the answer)", ylabel="accuracy (%)", colors=colors)
    ax.set_ylim(0, 102)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    deepest = max((len(x) - 1 for x, _ in curves.values()), default=0)
    if trained_depth is not None and trained_depth < deepest:
        left, right = ax.get_xlim()
        edge = trained_depth + 0.5
        ax.axvspan(edge, right, color="#F0F0F0", linewidth=0, zorder=0)
        ax.axvline(edge, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        ax.set_xlim(left, right)
        ax.text(edge, 1.01, " deeper than trained", transform=ax.get_xaxis_transform(), fontsize=8, color=GREY)
    return figure, ax


def _mean_and_std(name: str, x: Any, ys: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the seeds, each (points,), NaN where there are too few values."""
    points, values = to_array(x), np.atleast_2d(to_array(ys))
    if points.ndim != 1 or values.ndim != 2 or values.shape[1] != len(points):
        raise ShapeError(
            f"{name}: expected x (points,) and ys (seeds, points), got {points.shape} and {values.shape}; "
            "put the seeds on the first axis"
        )
    seen = np.ma.masked_invalid(values)
    mean, std = seen.mean(axis=0), seen.std(axis=0, ddof=1)
    return np.ma.filled(mean, np.nan), np.ma.filled(std, np.nan)
