"""The flow as a film: one token's mass, or the whole transition matrix, over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes

from liegroup_attn.clocks import Clock
from liegroup_attn.plots._chain import check_source, check_tokens, mixing, rate_matrix, some_times
from liegroup_attn.plots._style import OKABE_ITO, figure_of, lighten, new_figure, number, shorten
from liegroup_attn.plots.matrices import MOST_LABELS, draw_panels, label_size

__all__ = ["animate_token_flow"]


def animate_token_flow(
    generator: Any,
    source: int | None = None,
    times: Any = 5.0,
    *,
    ax: Axes | None = None,
    clock: Clock | None = None,
    tokens: Sequence[str] | None = None,
    frames: int = 60,
    interval: int = 80,
) -> FuncAnimation:
    """Animate row ``source`` of P(t) as bars, or the whole of P(t) as a heat map, over time.

    ``animation.save("flow.gif", writer="pillow")`` writes it; in a notebook, ``HTML(animation.to_jshtml())`` plays it.

    Args:
        generator: Q, (N, N) rates per unit of time: tensor, array, lists or a ``Generator``.
        source: number of the token, from 0; negative counts from the end; None animates the whole matrix, on the
            scale of its largest entry, in the colours of ``plot_matrices``.
        times: T > 0, the end of ``frames`` times from 0, or the times themselves, (frames,), one a frame.
        ax: axes to draw on; a new figure if None.
        clock: law of τ; None is the fixed clock, P(t) = exp(tQ).
        tokens: N names, shown when N ≤ 40.
        frames: how many, if ``times`` is a number.
        interval: milliseconds from frame to frame.

    Returns:
        The animation; keep it until it is saved or shown.

    Raises:
        ShapeError: Q is not (N, N), or ``source``, ``times`` or ``tokens`` does not fit.
        GeneratorError: Q is no rate matrix, or a time is negative or not finite.

    Example:
        >>> import tempfile
        >>> animation = animate_token_flow([[-1.0, 1.0], [1.0, -1.0]], 0, times=[0.0, 1.0], tokens=["the", "cat"])
        >>> with tempfile.NamedTemporaryFile(suffix=".gif") as file:
        ...     animation.save(file.name, writer="pillow")
        ...     file.read(4)
        b'GIF8'

    Source: [Norris1997]_, section 2.1.
    """
    Q = rate_matrix(generator)
    names = check_tokens(tokens, len(Q))
    if source is not None:
        source = check_source(source, len(Q))
    when = some_times(times, points=frames)
    film = list(mixing(Q, when, clock))
    if ax is None:
        width = 3.2 if source is None else min(7.0, max(3.4, 0.3 * len(Q)))
        ax = new_figure(width, 2.9 if source is None else 2.6).add_subplot()
    title = ax.set_title("", fontsize=10)
    if source is None:
        change = _matrix(ax, film, tokens)
    else:
        change = _bars(ax, [P[source] for P in film], source, names, tokens is not None)

    def update(frame: int) -> list[Any]:
        title.set_text(f"t = {number(float(when[frame]), 3)}")
        return [title, *change(frame)]

    update(0)
    return FuncAnimation(figure_of(ax), update, frames=len(when), init_func=lambda: update(0), interval=interval)


def _matrix(ax: Axes, film: list[np.ndarray], tokens: Sequence[str] | None) -> Callable[[int], Sequence[Any]]:
    brightest = max(film, key=lambda P: P.max())
    draw_panels(np.array([ax], dtype=object), [""], [brightest], tokens)  # the scale that holds every frame
    (image,) = ax.images[-1:]

    def change(frame: int) -> Sequence[Any]:
        image.set_data(film[frame])
        return [image]

    return change


def _bars(
    ax: Axes, film: list[np.ndarray], source: int, names: Sequence[str], named: bool
) -> Callable[[int], Sequence[Any]]:
    n = len(names)
    colors = [OKABE_ITO[1] if i == source else OKABE_ITO[0] for i in range(n)]
    bars = ax.bar(range(n), film[0], color=colors, width=0.8)
    ax.set(xlim=(-0.6, n - 0.4), ylim=(0, 1.02))
    ax.set_xlabel("target", fontsize=9)
    ax.set_ylabel(f"P(t) from “{shorten(names[source])}”", fontsize=9)
    lighten(ax)
    if named and n <= MOST_LABELS:
        ax.set_xticks(range(n), [shorten(name) for name in names], rotation=90, fontsize=label_size(n))
        ax.tick_params(axis="x", length=0)

    def change(frame: int) -> Sequence[Any]:
        for bar, height in zip(bars, film[frame], strict=True):
            bar.set_height(height)
        return list(bars)

    return change
