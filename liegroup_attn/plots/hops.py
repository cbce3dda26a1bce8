"""The law of the number of hops under several clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from liegroup_attn.clocks import Clock, ErlangClock, ExponentialClock, FixedClock
from liegroup_attn.errors import GeneratorError
from liegroup_attn.plots._chain import some_times
from liegroup_attn.plots._style import (
    GREY,
    MARKERS,
    assign_colors,
    figure_of,
    lighten,
    new_figure,
    number,
    place_legend,
)

__all__ = ["plot_hop_laws"]

LEAST = 1e-9  # on a logarithmic axis: tails beyond this would flatten all that matters
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def plot_hop_laws(
    mean_hops: Any = 4.0,
    *,
    ax: Axes | None = None,
    clocks: Mapping[str, Clock] | Sequence[Clock] | None = None,
    most_hops: int | None = None,
    log: bool = False,
    colors: Mapping[str, str] | None = None,
) -> tuple[Figure, Axes]:
    """Draw the probability of k hops over k: one colour a clock, one marker and dash a mean.

    Args:
        mean_hops: θ = Λt, (T,) or a number, ≥ 0: the mean number of hops, whatever the clock; marked by a vertical
            line in the dashes of its laws.
        ax: axes to draw on; a new figure if None.
        clocks: the laws of τ, or name → law; None compares the fixed clock (Poisson), the Erlang clock of shape 3
            (negative binomial) and the exponential clock (geometric).
        most_hops: the largest k drawn; None goes to where every law has less than 1 % left. Where more is left
            out, the legend says how much; nothing is lumped on the last k.
        log: a logarithmic vertical axis, which shows the tails.
        colors: name → colour; names not in it get the Okabe–Ito palette in their order.

    Returns:
        (fig, ax).

    Raises:
        ShapeError: ``mean_hops`` is no number and not (T,).
        GeneratorError: a mean is negative or not finite, or a clock is no clock.
        ConvergenceError: the axis would have to go beyond 100,000 hops; pass ``most_hops``.

    Example:
        >>> fig, ax = plot_hop_laws(1.0, clocks=[FixedClock()], most_hops=2)
        >>> [round(float(p), 4) for p in ax.lines[0].get_ydata()]  # e⁻¹/k!; 8 % have made more than two hops
        [0.3679, 0.3679, 0.1839]

    Source: [Jensen1953]_, [Norris1997]_.
    """
    means = some_times(mean_hops)
    laws = _named(clocks)
    if most_hops is None:
        most_hops = max((law.terms(float(mean), 1e-2) for law in laws.values() for mean in means), default=1)
    own = ax is None
    if ax is None:
        ax = new_figure(5.4, 2.8).add_subplot()
    hops = np.arange(most_hops + 1)
    palette = assign_colors(laws, colors)
    for name, law in laws.items():
        for index, mean in enumerate(means):
            weights = _law(law, float(mean), most_hops)
            ax.plot(
                hops,
                np.where(weights > 0, weights, np.nan) if log else weights,
                color=palette[name],
                label=_label(name, float(mean), len(means) > 1, 1 - weights.sum()),
                linestyle=DASHES[index % len(DASHES)],
                linewidth=0.9,
                marker=MARKERS[index % len(MARKERS)] if most_hops <= 60 else None,
                markersize=3,
            )
    _finish(ax, means, log)
    place_legend(ax, own=own)
    return figure_of(ax), ax


def _named(clocks: Mapping[str, Clock] | Sequence[Clock] | None) -> dict[str, Clock]:
    laws = (FixedClock(), ErlangClock(3), ExponentialClock()) if clocks is None else clocks
    pairs = laws.items() if isinstance(laws, Mapping) else [(None, law) for law in laws]
    found = {}
    for name, law in pairs:
        if not isinstance(law, Clock):
            raise GeneratorError(f"clocks: expected clocks such as ExponentialClock(), got {law!r}; pass an instance")
        found[_name(law) if name is None else name] = law
    return found


def _name(law: Clock) -> str:
    """As the documentation calls it, with the law of the hops."""
    if isinstance(law, FixedClock):
        return "fixed (Poisson)"
    if isinstance(law, ExponentialClock):
        return "exponential (geometric)"
    if isinstance(law, ErlangClock):
        return f"Erlang({law.resolvents}) (neg. binomial)"
    return repr(law)


def _law(law: Clock, mean: float, most_hops: int) -> np.ndarray:
    """p_0 … p_K; the clock's lump, all that is past K, is one term further and left out."""
    theta = torch.tensor(mean, dtype=torch.float64)
    return law.hop_weights(theta, most_hops + 1)[: most_hops + 1].numpy()


def _label(name: str, mean: float, several: bool, left: float) -> str:
    text = f"{name}, mean {number(mean, 3)}" if several else name
    return f"{text} ({100 * left:.0f} % beyond)" if left >= 0.01 else text


def _finish(ax: Axes, means: np.ndarray, log: bool) -> None:
    ax.set_xlabel("hops k", fontsize=9)
    ax.set_ylabel("probability of k hops", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    lighten(ax)
    if log:
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(ax.get_ylim()[0], LEAST))
    else:
        ax.set_ylim(bottom=0)
    left, right = ax.get_xlim()
    for index, mean in enumerate(means):
        if mean <= right:
            ax.axvline(mean, color=GREY, linewidth=0.8, linestyle=DASHES[index % len(DASHES)], zorder=1)
            if len(means) == 1:
                place: dict[str, Any] = {
                    "transform": ax.get_xaxis_transform(),
                    "ha": "center",
                    "fontsize": 8,
                    "color": GREY,
                }
                ax.text(mean, 1.01, f"mean {number(float(mean), 3)}", **place)
    ax.set_xlim(left, right)
