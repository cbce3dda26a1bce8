"""What all plots share: colours, arrays from tensors, axes without pyplot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's palette, safe for colour-blind readers; its yellow is too faint for lines on white and left out.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#555555"
FAINT = "#F0F0F0"
MARKERS = "osD^vP"  # told apart in grey, too; one fewer than colours, so that pairs repeat late


def to_array(data: Any) -> np.ndarray:
    """A float64 array from a tensor of any dtype and device, an array, or nested lists of either."""
    if isinstance(data, Tensor):
        return data.detach().cpu().double().numpy()  # by way of torch: NumPy has no bfloat16
    if isinstance(data, list | tuple):
        return np.array([to_array(entry) for entry in data], dtype=np.float64)
    return np.asarray(data, dtype=np.float64)


def new_figure(width: float, height: float) -> Figure:
    """A figure that pyplot does not know: nothing to close, safe in workers without a display."""
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def figure_of(ax: Axes) -> Figure:
    """The whole figure that ``ax`` stands in, also from inside a subfigure."""
    return ax.figure if isinstance(ax.figure, Figure) else ax.figure.figure


def assign_colors(names: Iterable[str], colors: Mapping[str, str] | None) -> dict[str, str]:
    """The given colour of each name, the next unused one of the palette for the others."""
    given = dict(colors or {})
    free = [color for color in OKABE_ITO if color not in given.values()] or list(OKABE_ITO)
    others = [name for name in names if name not in given]
    return given | {name: free[i % len(free)] for i, name in enumerate(others)}


def lighten(ax: Axes) -> None:
    """Leave only the left and the bottom spine, thin, and faint horizontal lines."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=GREY, linewidth=0.8)
    ax.tick_params(color=GREY, labelsize=8, width=0.8, length=3)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)


def number(value: float, digits: int = 2) -> str:
    """So many significant digits, without an exponent where it can be read without: 1200, 0.034, 1e−05."""
    text = f"{float(f'{value:.{digits}g}') + 0.0:g}"  # no −0
    mantissa, _, exponent = text.partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


def shorten(name: object, most: int = 18) -> str:
    """A name that leaves room for the figure: the middle of a long one is left out."""
    text = str(name).replace("$", r"\$")  # no mathematics in the names of tokens
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"


def place_legend(ax: Axes, *, own: bool, **kwargs: Any) -> None:
    """Beside axes of our own, inside given ones, whose neighbours are not known."""
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if own else {"loc": "best"}
    ax.legend(**{"frameon": False, "fontsize": 8, **place, **kwargs})
