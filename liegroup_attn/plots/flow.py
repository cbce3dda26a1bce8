"""From the jump chain to the generator to its flow: S, Q and P(t) over several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from liegroup_attn.clocks import Clock
from liegroup_attn.errors import ShapeError
from liegroup_attn.plots._chain import check_tokens, jump_chain, mixing, rate_matrix, some_times
from liegroup_attn.plots._style import figure_of, new_figure, number, shorten
from liegroup_attn.plots.matrices import MOST_LABELS, draw_panels, label_size

__all__ = ["plot_flow"]


def plot_flow(
    generator: Any,
    times: Any = (0.5, 1.0, 4.0),
    *,
    axes: Sequence[Axes] | np.ndarray | None = None,
    clock: Clock | None = None,
    tokens: Sequence[str] | None = None,
) -> tuple[Figure, np.ndarray]:
    """Draw the jump chain S, the generator Q and the transition matrix P(t) at several times as a row of heat maps.

    Colours as in ``plot_matrices``: S and all P(t) share one scale, whose bar stands at the end of the row.

    Args:
        generator: Q, (N, N) rates per unit of time: tensor, array, lists or a ``Generator``. S is the generator's own;
            of a matrix it is the chain that always leaves, S_ij = Q_ij / −Q_ii.
        times: (T,) or a number, ≥ 0: a panel each.
        axes: 2 + T axes to draw on; a new figure if None.
        clock: law of τ; None is the fixed clock, P(t) = exp(tQ), any other shows its mean E[exp(τQ)].
        tokens: N names for the rows and columns, shown when N ≤ 40.

    Returns:
        (fig, axes), axes an array of 2 + T Axes. Everything is computed in float64.

    Raises:
        ShapeError: Q is not (N, N), or ``times``, ``axes`` or ``tokens`` has the wrong shape.
        GeneratorError: Q is no rate matrix, a time is negative or not finite, or ``clock`` is no clock.

    Example:
        >>> fig, axes = plot_flow([[-1.0, 1.0], [1.0, -1.0]], times=[0.5, 2.0], tokens=["the", "cat"])
        >>> [ax.get_title() for ax in axes]
        ['S', 'Q', 'P(0.5)', 'P(2)']

    Source: [Norris1997]_, sections 2.1 and 2.6.
    """
    Q = rate_matrix(generator)
    when = some_times(times)
    if tokens is not None:
        check_tokens(tokens, len(Q))
    count = 2 + len(when)
    if axes is not None and len(axes) != count:
        raise ShapeError(f"axes: expected {count}, one each for S, Q and every time, got {len(axes)}; pass as many")
    titles = ["S", "Q", *(f"P({number(time, 3)})" for time in when)]
    arrays = [jump_chain(generator), Q, *mixing(Q, when, clock)]
    if axes is None:
        room = 0.0  # inches for the names
        if tokens is not None and len(Q) <= MOST_LABELS:
            room = max(len(shorten(token)) for token in tokens) * 0.0085 * label_size(len(Q))
        figure = new_figure(1.55 * count + 0.9 + room, 2.15 + room)
        panels = figure.subplots(1, count, squeeze=False)[0]
    else:
        panels = np.array(axes, dtype=object)
    draw_panels(panels, titles, arrays, tokens, bars=(1, count - 1), apart=0.22)
    return figure_of(panels[0]), panels
