"""One quantity per layer and head: what a model has learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from liegroup_attn.errors import ShapeError
from liegroup_attn.plots._style import GREY, figure_of, new_figure, number, shorten, to_array
from liegroup_attn.plots.matrices import color_bar, draw_image

__all__ = ["plot_layers"]

MOST_NUMBERS = 16  # heads, or layers: with more of them cells become too small for numbers and names


def plot_layers(values: Any, *, ax: Axes | None = None, label: str = "time t") -> tuple[Figure, Axes]:
    """Draw a quantity per layer and head, such as learned times, as a heat map with its numbers.

    Colours as in ``plot_matrices``: by the square root, from 0, or diverging around 0 if there are negative values.

    Args:
        values: layer → (heads,) or a number, or (layers, heads); tensors, arrays or lists. Layers may differ in
            their heads. NaN is grey: a layer without the quantity, as softmax attention has no time.
        ax: axes to draw on; a new figure if None.
        label: the quantity, with its unit, for the colour bar.

    Returns:
        (fig, ax): rows are layers, the first on top, columns heads. Numbers stand in the cells up to 16 heads.

    Raises:
        ShapeError: not (layers, heads), an entry not (heads,), or none.

    Example:
        >>> fig, ax = plot_layers({"block 0": [0.5, 1.0], "block 1": [float("nan"), 2.0]})
        >>> [text.get_text() for text in ax.texts]
        ['0.5', '1', '–', '2']
    """
    names, rows = _rows(values)
    heads = max(len(row) for row in rows)
    grid = np.full((len(rows), heads), np.nan)  # (layers, heads)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    labels = [shorten(name, 28) for name in names]
    if ax is None:
        margin = 1.3 + 0.06 * max(map(len, labels))
        cell = 0.42 if heads <= MOST_NUMBERS else 0.16
        ax = new_figure(
            max(2.6, margin + cell * heads), max(1.7, 0.75 + (0.24 if len(rows) <= MOST_NUMBERS else 0.16) * len(rows))
        ).add_subplot()
    image = draw_image(ax, grid, None)
    ax.set_aspect("auto")
    for index, row in enumerate(rows):  # where a layer has no such head is nothing, not even grey
        ax.add_patch(Rectangle((len(row) - 0.5, index - 0.5), heads - len(row), 1, color="white", linewidth=0))
    if heads <= MOST_NUMBERS:
        _write_numbers(ax, image, rows)
    size = 8 if len(rows) <= MOST_NUMBERS else 6
    ax.set_xlabel("head", fontsize=9)
    ax.set_yticks(range(len(rows)), labels, fontsize=size)
    ax.xaxis.set_major_locator(MaxNLocator(min(heads, 12), integer=True, min_n_ticks=1))
    ax.tick_params(labelsize=size, length=0)
    ax.spines[:].set_visible(False)
    color_bar(ax, image, 0.26 if len(rows) < 8 and (grid < 0).any() else 0.16)
    ax.child_axes[-1].set_ylabel(label, fontsize=9)
    return figure_of(ax), ax


def _rows(values: Any) -> tuple[list[str], list[np.ndarray]]:
    """Names of the layers, and (heads,) for each."""
    if isinstance(values, Mapping):
        names = [str(name) for name in values]
        rows = [np.atleast_1d(to_array(row)) for row in values.values()]
    else:
        array = to_array(values)
        if array.ndim != 2:
            raise ShapeError(
                f"values: expected (layers, heads), got {array.shape}; pass {{layer: (heads,)}} or a matrix"
            )
        names, rows = [f"layer {i}" for i in range(len(array))], list(array)
    for name, row in zip(names, rows, strict=True):
        if row.ndim != 1:
            raise ShapeError(f"{name}: expected (heads,), got {row.shape}; reduce it to one number a head")
    if not any(len(row) for row in rows):
        raise ShapeError("values: expected at least one layer and head, got none; pass {layer: (heads,)}")
    return names, rows


def _write_numbers(ax: Axes, image: AxesImage, rows: list[np.ndarray]) -> None:
    for index, row in enumerate(rows):
        for head, value in enumerate(row):
            seen = bool(np.isfinite(value))
            red, green, blue, _ = image.cmap(image.norm(value)) if seen else (0.73, 0.73, 0.73, 1)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = number(float(value)) if seen else "–"
            color = "white" if dark else "black" if seen else GREY
            ax.text(head, index, text, ha="center", va="center", fontsize=7, color=color)
