"""Positions: what an encoding is as a matrix, how scores fall with distance, which positions are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from liegroup_attn.errors import ShapeError
from liegroup_attn.plots._style import (
    GREY,
    assign_colors,
    figure_of,
    lighten,
    new_figure,
    place_legend,
    to_array,
)

__all__ = ["plot_encoding", "plot_score_decay", "plot_similarity"]


def plot_encoding(
    tables: Mapping[str, Any],
    *,
    axes: Sequence[Axes] | np.ndarray | None = None,
    xlabel: str = "feature",
    ylabel: str = "position",
    label: str = "",
    shared: bool = True,
) -> tuple[Figure, np.ndarray]:
    """Draw an encoding's numbers as a row of heat maps in linear colours.

    A table of vectors is (positions, features), R(m) is (features, features), a bias (queries, keys), one map a head.
    Where signs mix, colours diverge from 0; −inf and NaN are grey. Vector formats keep every entry; a bitmap needs more
    pixels than features to show each.

    Args:
        tables: title → (N, M), tensors, arrays or lists.
        axes: one axes a table to draw on; a new figure if None.
        xlabel: what columns are.
        ylabel: what rows are.
        label: of the colour bar, with its unit.
        shared: one scale for all; else one each, as for the heads of ALiBi, whose slopes differ by powers of 2.

    Returns:
        (fig, axes), axes an array of one Axes a table.

    Raises:
        ShapeError: a table is no matrix, or ``axes`` has the wrong length.

    Example:
        >>> import torch
        >>> fig, axes = plot_encoding({"sinusoidal": torch.randn(100, 512)})
        >>> axes[0].get_xlabel(), axes[0].get_ylabel()
        ('feature', 'position')
    """
    arrays = {title: to_array(table) for title, table in tables.items()}
    _check("tables", arrays, axes, square=False)
    every = np.concatenate([array.ravel() for array in arrays.values()])
    scales = [_scale(every if shared else array) for array in arrays.values()]
    return _row(arrays, axes, scales, (xlabel, ylabel, label), shared=shared)


def plot_similarity(
    maps: Mapping[str, Any], *, axes: Sequence[Axes] | np.ndarray | None = None
) -> tuple[Figure, np.ndarray]:
    """Draw similarity maps of positions side by side, all on the scale −1 to 1.

    Args:
        maps: title → (N, N), cosines as ``positional.position_similarity`` returns them.
        axes: one axes a map to draw on; a new figure if None.

    Returns:
        (fig, axes), axes an array of one Axes a map.

    Raises:
        ShapeError: a map is not square, or ``axes`` has the wrong length.

    Example:
        >>> import torch
        >>> fig, axes = plot_similarity({"one-hot": torch.eye(8)})
        >>> axes[0].images[0].get_clim()
        (-1.0, 1.0)
    """
    arrays = {title: to_array(table) for title, table in maps.items()}
    _check("maps", arrays, axes, square=True)
    scales = [("RdBu_r", -1.0, 1.0)] * len(arrays)
    return _row(arrays, axes, scales, ("position", "position", "cosine similarity"), shared=True)


def plot_score_decay(
    decays: Mapping[str, tuple[Any, Any]],
    *,
    ax: Axes | None = None,
    xlabel: str = "distance m − n (tokens)",
    ylabel: str = "mean score ⟨R(m)q, R(n)k⟩",
    colors: Mapping[str, str] | None = None,
) -> tuple[Figure, Axes]:
    """Draw scores against distance, one colour an encoding, and in it one line a head, the first the darkest.

    Args:
        decays: name → (distances, scores), tensors, arrays or lists; distances are (N,), scores (N,) or (H, N), as
            ``positional.score_decay`` returns them.
        ax: axes to draw on; a new figure if None.
        xlabel: label of the horizontal axis, with its unit.
        ylabel: label of the vertical axis, with its unit.
        colors: name → colour; names not in it get the Okabe–Ito palette in their order.

    Returns:
        (fig, ax).

    Raises:
        ShapeError: nothing to draw, or scores that do not fit their distances.

    Example:
        >>> fig, ax = plot_score_decay({"ALiBi": ([0, 1, 2], [[0.0, -0.5, -1.0], [0.0, -0.25, -0.5]])})
        >>> len(ax.lines)  # two heads and the zero line
        3
    """
    if not decays:
        raise ShapeError("decays: expected at least one, got none; pass {name: (distances, scores)}")
    arrays = {name: (to_array(x), np.atleast_2d(to_array(ys))) for name, (x, ys) in decays.items()}
    for name, (x, ys) in arrays.items():
        if x.ndim != 1 or ys.ndim != 2 or ys.shape[1] != len(x):
            raise ShapeError(
                f"{name}: expected distances (N,) and scores (N,) or (H, N), got {x.shape} and {ys.shape}; choose one axis"
            )
    own = ax is None
    if ax is None:
        ax = new_figure(4.4 if len(arrays) == 1 else 5.2, 2.9).add_subplot()
    palette = assign_colors(arrays, colors)
    styles = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))  # told apart in grey, too
    ax.axhline(0, color=GREY, linewidth=0.6, zorder=1)
    handles = []
    for index, (name, (x, ys)) in enumerate(arrays.items()):
        for head, line in enumerate(ys):
            faint = 1.0 - 0.7 * head / max(len(ys) - 1, 1)
            style = styles[index % len(styles)]
            (drawn,) = ax.plot(x, line, color=palette[name], linestyle=style, alpha=faint, linewidth=1.5, label=name)
            handles += [drawn] if head == 0 else []
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    lighten(ax)
    ax.margins(x=0.02)
    if len(handles) > 1:
        place_legend(ax, own=own, handles=handles)
    return figure_of(ax), ax


def _check(what: str, arrays: dict[str, np.ndarray], axes: Sequence[Axes] | np.ndarray | None, *, square: bool) -> None:
    if not arrays:
        raise ShapeError(f"{what}: expected at least one, got none; pass {{title: matrix}}")
    for title, array in arrays.items():
        if array.ndim != 2 or not array.size or (square and array.shape[0] != array.shape[1]):
            expected = "(N, N)" if square else "(N, M)"
            raise ShapeError(f"{title}: expected shape {expected}, got {array.shape}; choose one, as in bias[head]")
    if axes is not None and len(axes) != len(arrays):
        raise ShapeError(f"axes: expected {len(arrays)}, one a map, got {len(axes)}; pass as many")


def _scale(values: np.ndarray) -> tuple[str, float, float]:
    """Colours and their limits: from 0 one way, or both ways where signs mix."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    most = max(high, -low) or 1.0
    if low < -1e-6 * most and high > 1e-6 * most:
        return "RdBu_r", -most, most
    return ("Blues", 0.0, most) if high >= -low else ("Blues_r", -most, 0.0)


def _row(
    arrays: dict[str, np.ndarray],
    axes: Sequence[Axes] | np.ndarray | None,
    scales: Sequence[tuple[str, float, float]],
    labels: tuple[str, str, str],
    *,
    shared: bool,
) -> tuple[Figure, np.ndarray]:
    """Maps in a row; rows are named on the leftmost, a bar that is shared stands beside the last."""
    if axes is None:
        wide = max(array.shape[1] / array.shape[0] for array in arrays.values()) > 1.5
        each = (5.2 if wide else 2.3) + (0.0 if shared else 0.7)
        figure = new_figure(each * len(arrays) + (0.9 if shared else 0.2), 2.8)
        panels = figure.subplots(1, len(arrays), squeeze=False)[0]
    else:
        panels = np.array(axes, dtype=object)
    xlabel, ylabel, label = labels
    for index, (ax, (title, array), (colors, low, high)) in enumerate(zip(panels, arrays.items(), scales, strict=True)):
        cmap = matplotlib.colormaps[colors].with_extremes(bad="#BBBBBB")
        aspect = "equal" if array.shape[0] == array.shape[1] else "auto"
        image = ax.imshow(
            np.ma.masked_invalid(array), cmap=cmap, vmin=low, vmax=high, aspect=aspect, interpolation="none"
        )
        ax.spines[:].set(color=GREY, linewidth=0.6)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(xlabel, fontsize=9)
        if index == 0:
            ax.set_ylabel(ylabel, fontsize=9)
        ax.tick_params(labelsize=8, length=2, width=0.6, color=GREY)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        last = index == len(arrays) - 1
        if last or not shared:
            _bar(ax, image, label if last else "")
    return figure_of(panels[0]), panels


def _bar(ax: Axes, image: AxesImage, label: str) -> None:
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.03, 0.0, 0.05 if ax.get_aspect() == 1 else 0.025, 1.0)))
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=8, length=2, width=0.6, color=GREY)
    bar.outline.set(linewidth=0.6, edgecolor=GREY)
    if label:
        bar.set_label(label, fontsize=9)
