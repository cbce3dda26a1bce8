"""Eigenvalues of generators, or of their transition matrices, in the complex plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Polygon

from liegroup_attn.clocks import Clock, FixedClock
from liegroup_attn.errors import GeneratorError, ShapeError
from liegroup_attn.generators import Generator
from liegroup_attn.plots._chain import rate_matrix, some_times
from liegroup_attn.plots._style import (
    FAINT,
    GREY,
    MARKERS,
    assign_colors,
    figure_of,
    lighten,
    new_figure,
    number,
    place_legend,
    to_array,
)

__all__ = ["plot_spectrum"]

MOST_GAPS = 4  # more lines than this hide what they mark


def plot_spectrum(
    generators: Any,
    time: float | None = None,
    *,
    ax: Axes | None = None,
    clock: Clock | None = None,
    colors: Mapping[str, str] | None = None,
) -> tuple[Figure, Axes]:
    """Draw the eigenvalues of one or several generators in the complex plane, with the region that holds them.

    Eigenvalues μ of Q = Λ(S − I) lie in the disc with centre −Λ and radius Λ (grey; Λ here the largest exit rate). A
    dashed line marks the spectral gap, the rate at which the slowest mode dies out. With a time, the eigenvalues
    ν = e^{tμ} of P(t) are drawn instead, with the disc's image (grey) in the unit circle, and a dashed circle through
    the second largest modulus, abs ν₂.

    Args:
        generators: Q (N, N), several (H, N, N), or name → (N, N); tensors, arrays, lists or ``Generator``.
        time: None draws the spectrum of Q; t ≥ 0 that of P(t).
        ax: axes to draw on; a new figure if None.
        clock: law of τ for P(t) = E[exp(τQ)]; None is the fixed clock.
        colors: name → colour; names not in it get the Okabe–Ito palette in their order.

    Returns:
        (fig, ax). The legend holds every gap (or modulus); up to four of them are marked by dashed lines.

    Raises:
        ShapeError: not (N, N) each, or none.
        GeneratorError: not rate matrices, the time negative or not finite, or the clock without a closed form.

    Example:
        >>> fig, ax = plot_spectrum([[-1.0, 1.0], [3.0, -3.0]])
        >>> round(float(min(ax.lines[0].get_xdata())), 6)
        -4.0
        >>> ax.get_legend().get_texts()[0].get_text()
        'Q, gap 4'

    Source: [Levin2017]_, chapter 12; [Norris1997]_, section 2.1.
    """
    matrices = _named(generators)
    transform = _transform(time, clock)
    own = ax is None
    if ax is None:
        ax = new_figure(4.8, 3.0).add_subplot()
    bound = max(float(np.abs(np.diag(Q)).max()) for Q in matrices.values())
    handles = _draw_region(ax, bound, transform if time is not None else None)
    palette = assign_colors(matrices, colors)
    points = []
    for index, (name, Q) in enumerate(matrices.items()):
        values = transform(np.linalg.eigvals(Q).astype(complex))
        points += _draw_values(ax, name, values, palette[name], MARKERS[index % len(MARKERS)], time is not None)
        if len(matrices) <= MOST_GAPS and len(values) > 1:
            _draw_gap(ax, values, palette[name], time is not None)
    for cross in (ax.axhline, ax.axvline):
        cross(0, color="#C8C8C8", linewidth=0.6, zorder=0.5)
    letter, what = ("μ", "Q") if time is None else ("ν", f"P({number(float(time), 3)})")
    ax.set_xlabel(f"Re {letter}, eigenvalues of {what}", fontsize=9)
    ax.set_ylabel(f"Im {letter}", fontsize=9)
    lighten(ax)
    ax.grid(False)
    ax.set_aspect("equal", adjustable="box")
    columns = -(-(len(points) + len(handles)) // 14)
    if own and columns > 1:
        figure_of(ax).set_size_inches(4.8 + 1.5 * (columns - 1), 3.0)
    frame = {} if own else {"frameon": True, "framealpha": 0.8, "edgecolor": "none"}
    place_legend(ax, own=own, **frame, handles=[*points, *handles], ncols=columns)
    return figure_of(ax), ax


def _named(generators: Any) -> dict[str, np.ndarray]:
    """Name → Q; heads are numbered."""
    if isinstance(generators, list | tuple) and any(isinstance(Q, Generator) for Q in generators):
        generators = {f"head {i}": Q for i, Q in enumerate(generators)}
    if isinstance(generators, Mapping):
        found = {name: rate_matrix(Q, name) for name, Q in generators.items()}
    else:
        array = to_array(generators.dense() if isinstance(generators, Generator) else generators)
        if array.ndim == 3:
            found = {f"head {i}": rate_matrix(Q, f"head {i}") for i, Q in enumerate(array)}
        else:
            found = {"Q": rate_matrix(array, "generators")}
    if not found:
        raise ShapeError("generators: expected at least one, got none; pass Q, (H, N, N) or {name: Q}")
    return found


def _transform(time: float | None, clock: Clock | None) -> Any:
    """What the mixing matrix makes of an eigenvalue of Q; nothing without a time."""
    if time is None:
        return lambda mu: mu
    t = some_times(time)[0]
    law = clock or FixedClock()
    if isinstance(law, FixedClock):
        return lambda mu: np.exp(t * mu)
    if isinstance(law, Clock) and law.resolvents is not None:
        return lambda mu: (1 - t * mu / law.resolvents) ** -law.resolvents
    raise GeneratorError(f"clock: expected FixedClock, ExponentialClock or ErlangClock, got {clock!r}; choose one")


def _draw_region(ax: Axes, bound: float, transform: Any) -> list[Patch]:
    """The disc around −Λ, or the unit circle with the disc's image; handles for the legend."""
    edge: dict[str, Any] = {"edgecolor": GREY, "linewidth": 0.7, "zorder": 0}
    if transform is None:
        label = f"|μ + Λ| ≤ Λ, Λ = {number(bound, 3)}"
        patches: list[Patch] = [Circle((-bound, 0), bound, facecolor=FAINT, label=label, **edge)]
    else:
        # The image's boundary winds around each point as often as it is taken: filled is what is taken.
        image = transform(bound * (np.exp(2j * np.pi * np.linspace(0, 1, 2000)) - 1))
        corners = np.stack([image.real, image.imag], -1)
        patches = [
            Polygon(corners, facecolor="#E2E2E2", linewidth=0, zorder=0, label="image of |μ + Λ| ≤ Λ"),
            Circle((0, 0), 1, fill=False, label="unit circle", **edge),
        ]
    for patch in patches:
        ax.add_patch(patch)
    centre, radius = (-bound, bound) if transform is None else (0.0, 1.0)
    reach = 1.08 * radius or 1.0
    ax.set(xlim=(centre - reach, centre + reach), ylim=(-reach, reach))
    return patches


def _draw_values(ax: Axes, name: str, values: np.ndarray, color: str, marker: str, mixed: bool) -> list[Line2D]:
    label = name
    if len(values) > 1:
        label += (
            f", |ν₂| {number(_second(values, mixed), 3)}" if mixed else f", gap {number(_second(values, mixed), 3)}"
        )
    return ax.plot(
        values.real, values.imag, marker, color=color, label=label, markersize=4.5, markeredgecolor="white",
        markeredgewidth=0.4, alpha=0.9, clip_on=False,
    )  # fmt: skip


def _second(values: np.ndarray, mixed: bool) -> float:
    """The second largest modulus, or the spectral gap; 0 and no −1e−17 with several closed classes."""
    return float(np.sort(np.abs(values))[-2]) if mixed else max(0.0, float(np.sort(-values.real)[1]))


def _draw_gap(ax: Axes, values: np.ndarray, color: str, mixed: bool) -> None:
    dashed: dict[str, Any] = {"color": color, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
    second = _second(values, mixed)
    if mixed:
        ax.add_patch(Circle((0, 0), second, fill=False, **dashed))
    else:
        ax.axvline(-second, **dashed)
