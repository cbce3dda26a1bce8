"""Where the mass of one token goes over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import ShapeError
from liegroup_attn.plots._chain import check_source, check_tokens, mixing, rate_matrix, some_times
from liegroup_attn.plots._style import OKABE_ITO, figure_of, lighten, new_figure, place_legend, shorten

__all__ = ["plot_token_flow"]

OTHERS = "#D5D5D5"


def plot_token_flow(
    generator: Any,
    source: int,
    times: Any = 5.0,
    *,
    ax: Axes | None = None,
    clock: Clock | None = None,
    tokens: Sequence[str] | None = None,
    top: int = 5,
    log: bool = False,
) -> tuple[Figure, Axes]:
    """Draw row ``source`` of P(t) over time as stacked areas: where the value that this token reads comes from.

    The source lies at the bottom; above it the ``top`` targets with the most mass, averaged over the drawn times, and
    the rest together as others. At every time the areas add up to 1.

    Args:
        generator: Q, (N, N) rates per unit of time: tensor, array, lists or a ``Generator``.
        source: number of the token, from 0; negative counts from the end.
        times: T > 0, the end of 200 times from 0 (with ``log`` from T/1000), or the times themselves, (points,),
            increasing.
        ax: axes to draw on; a new figure if None.
        clock: law of τ; None is the fixed clock, P(t) = exp(tQ).
        tokens: N names for the legend; numbers if None.
        top: how many targets besides the source are drawn by themselves, 0 to 11.
        log: a logarithmic time axis.

    Returns:
        (fig, ax). The legend is ordered as the areas lie, and stands beside new axes, inside given ones.

    Raises:
        ShapeError: Q is not (N, N), or ``source``, ``times``, ``tokens`` or ``top`` does not fit.
        GeneratorError: Q is no rate matrix, or a time is negative or not finite (with ``log`` also 0).

    Example:
        >>> fig, ax = plot_token_flow([[-1.0, 1.0], [1.0, -1.0]], 0, times=2.0, tokens=["the", "cat"])
        >>> [area.get_label() for area in ax.collections]
        ['the', 'cat']

    Source: [Norris1997]_, section 2.1.
    """
    Q = rate_matrix(generator)
    source, names = check_source(source, len(Q)), check_tokens(tokens, len(Q))
    when = _increasing(times, log)
    if not 0 <= top <= 2 * (len(OKABE_ITO) - 1) - 1:
        raise ShapeError(f"top: expected 0 to {2 * len(OKABE_ITO) - 3} targets, got {top}; more cannot be told apart")
    row = np.stack([P[source] for P in mixing(Q, when, clock)], axis=-1)  # (N, points)
    order = [i for i in np.argsort(-row.mean(-1), kind="stable") if i != source]
    shown, rest = [source, *order[:top]], order[top:]
    areas, labels = [row[i] for i in shown], [shorten(name) for name in _unique(names, shown)]
    colors = _colors(len(shown))
    if rest:
        areas.append(row[rest].sum(0))
        labels.append(f"{len(rest)} others" if len(rest) > 1 else shorten(names[rest[0]]))
        colors.append(OTHERS)
    own = ax is None
    if ax is None:
        ax = new_figure(5.0, 2.8).add_subplot()
    ax.stackplot(when, areas, labels=labels, colors=colors, edgecolor="white", linewidth=0.5)
    ax.set(xlim=(when[0], when[-1]), ylim=(0, 1), xscale="log" if log else "linear")
    ax.set_xlabel("time t", fontsize=9)
    ax.set_ylabel(f"P(t) from “{shorten(names[source])}”", fontsize=9)
    lighten(ax)
    ax.grid(False)
    handles = ax.collections[-len(areas) :][::-1]
    inside = (
        {} if own else {"loc": "upper right", "frameon": True, "framealpha": 0.85, "edgecolor": "none", "fontsize": 7}
    )
    place_legend(ax, own=own, handles=handles, **inside)
    return figure_of(ax), ax


def _increasing(times: Any, log: bool) -> np.ndarray:
    when = some_times(times, points=200, log=log)
    if len(when) < 2 or not (np.diff(when) > 0).all():
        raise ShapeError(
            f"times: expected an end > 0 or at least two increasing times, got {when.shape}; sort them and drop repeats"
        )
    return when


def _unique(names: Sequence[str], shown: Sequence[int]) -> list[str]:
    """Names of some tokens; those that several tokens have get the token's number."""
    return [f"{names[i]} ({i})" if names.count(names[i]) > 1 else names[i] for i in shown]


def _colors(count: int) -> list[str]:
    """The palette without its black, then the same in lighter tints."""
    solid = list(OKABE_ITO[:-1])
    tints = ["#" + "".join(f"{(int(c[i : i + 2], 16) + 255) // 2:02X}" for i in (1, 3, 5)) for c in solid]
    return (solid + tints)[:count]
