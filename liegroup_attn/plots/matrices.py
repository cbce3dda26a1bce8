"""Heat maps of jump chains, generators and transition matrices, side by side."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from liegroup_attn.errors import ShapeError
from liegroup_attn.plots._style import GREY, figure_of, new_figure, shorten, to_array

__all__ = ["plot_matrices"]

MOST_LABELS = 40  # tokens: more labels than this cannot be read


def plot_matrices(
    matrices: Mapping[str, Any],
    *,
    axes: Sequence[Axes] | np.ndarray | None = None,
    tokens: Sequence[str] | None = None,
) -> tuple[Figure, np.ndarray]:
    """Draw square matrices as a row of heat maps: rows are sources, columns targets.

    Colours follow the square root of the entry, so that small weights show. Stochastic matrices share one scale
    from 0; other matrices without negative entries have their own; matrices with negative entries (generators)
    get a diverging scale centred on 0. NaN and inf are grey.

    Args:
        matrices: title → (N, N), tensors, arrays or lists.
        axes: one axes a matrix to draw on; a new figure if None.
        tokens: N names for the rows and columns, shown when N ≤ 40.

    Returns:
        (fig, axes), axes an array of one Axes a matrix.

    Raises:
        ShapeError: a matrix is not square, or ``axes`` or ``tokens`` has the wrong length.

    Example:
        >>> import torch
        >>> S = torch.tensor([[1.0, 0.0], [0.4, 0.6]])
        >>> fig, axes = plot_matrices({"S": S, "Q": S - torch.eye(2)}, tokens=["the", "cat"])
        >>> [ax.get_title() for ax in axes]
        ['S', 'Q']
    """
    arrays = {title: to_array(matrix) for title, matrix in matrices.items()}
    _check(arrays, axes, tokens)
    if axes is None:
        figure = new_figure(3.2 * len(arrays), 2.9)
        panels = figure.subplots(1, len(arrays), squeeze=False)[0]
    else:
        panels = np.array(axes, dtype=object)
    draw_panels(panels, list(arrays), list(arrays.values()), tokens)
    return figure_of(panels[0]), panels


def draw_panels(
    panels: np.ndarray,
    titles: Sequence[str],
    arrays: Sequence[np.ndarray],
    tokens: Sequence[str] | None,
    bars: Container[int] | None = None,
    apart: float = 0.16,
) -> None:
    """One heat map a panel; colour bars beside the panels of the numbers ``bars``, or beside all."""
    stochastic = [array.max() for array in arrays if _is_stochastic(array)]
    for index, (ax, title, array) in enumerate(zip(panels, titles, arrays, strict=True)):
        image = draw_image(ax, array, max(stochastic) if _is_stochastic(array) else None)
        ax.set_title(title, fontsize=10)
        _label_tokens(ax, len(array), tokens, leftmost=index == 0)
        if bars is None or index in bars:
            color_bar(ax, image, apart)


def _check(
    arrays: dict[str, np.ndarray], axes: Sequence[Axes] | np.ndarray | None, tokens: Sequence[str] | None
) -> None:
    if not arrays:
        raise ShapeError("matrices: expected at least one, got none; pass {title: matrix}")
    for title, array in arrays.items():
        if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
            raise ShapeError(f"{title}: expected shape (N, N), got {array.shape}; choose one, as in P[batch, head]")
        if tokens is not None and len(tokens) != len(array):
            raise ShapeError(f"tokens: expected {len(array)} names, as {title} has, got {len(tokens)}; name every row")
    if axes is not None and len(axes) != len(arrays):
        raise ShapeError(f"axes: expected {len(arrays)}, one a matrix, got {len(axes)}; pass as many")


def _is_stochastic(array: np.ndarray) -> bool:
    """Rows of probabilities up to bfloat16's rounding."""
    return bool(array.min() >= -1e-6 and np.abs(array.sum(-1) - 1).max() < 2e-2)


def draw_image(ax: Axes, array: np.ndarray, top: float | None) -> AxesImage:
    """A heat map in square-root colours, from 0 to ``top`` (None: its own largest entry) or centred on 0."""
    finite = array[np.isfinite(array)]
    largest = float(np.abs(finite).max(initial=0.0)) or 1.0
    signed = finite.min(initial=0.0) < -1e-6 * largest
    top = top or largest
    norm = FuncNorm((_signed_sqrt, _signed_square), vmin=-top if signed else 0.0, vmax=top)
    cmap = matplotlib.colormaps["RdBu_r" if signed else "Blues"].with_extremes(bad="#BBBBBB")
    image = ax.imshow(np.ma.masked_invalid(array), cmap=cmap, norm=norm, interpolation="nearest")
    ax.spines[:].set(color=GREY, linewidth=0.6)
    return image


def _signed_sqrt(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def _label_tokens(ax: Axes, n: int, tokens: Sequence[str] | None, *, leftmost: bool) -> None:
    """Names along both axes where they can be read; rows are named on the leftmost panel only."""
    ax.set_xlabel("target", fontsize=8, color=GREY)
    if leftmost:
        ax.set_ylabel("source", fontsize=8, color=GREY)
    ax.tick_params(labelsize=7, length=2, width=0.6, color=GREY)
    if tokens is None:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    elif n <= MOST_LABELS:
        tokens = [shorten(token) for token in tokens]
        size = label_size(n)
        ax.set_xticks(range(n), tokens, rotation=90, fontsize=size)
        ax.set_yticks(range(n), tokens if leftmost else [""] * n, fontsize=size)
        ax.tick_params(length=0)
    else:
        ax.set(xticks=[], yticks=[])


def label_size(n: int) -> int:
    """Points for the names of n tokens along one axis."""
    return 8 if n <= 12 else 6 if n <= 24 else 4


def color_bar(ax: Axes, image: AxesImage, apart: float = 0.16) -> None:
    """A bar as high as the map, with round ticks that stand ``apart``, in square roots of the largest entry."""
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.04, 0.0, 0.05, 1.0)))
    low, top = np.asarray(image.get_clim(), dtype=float)
    rounded = [digit * 10.0**power for power in range(4, -9, -1) for digit in (5, 2, 1)]
    ticks = [0.0]
    last = np.inf
    for tick in rounded:
        root = np.sqrt(tick / top)
        if tick <= top * (1 + 1e-9) and last - root >= apart and root >= apart:
            ticks.append(tick)
            last = root
    ticks = sorted([-tick for tick in ticks[1:] if low < 0] + ticks)
    bar.set_ticks(ticks, labels=[f"{tick:g}".replace("-", "−") for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7, length=2, width=0.6, color=GREY)
    bar.outline.set(linewidth=0.6, edgecolor=GREY)
