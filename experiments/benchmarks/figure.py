"""Time and memory over N, each line labelled where it ends."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.competitors import BASE
from experiments.benchmarks.measure import PHASES
from experiments.benchmarks.summary import Result, attention_cell, find, peak, seconds, slope, spread
from liegroup_attn.plots import plot_curves

__all__ = ["scaling_figure"]

Curves = dict[str, tuple[list[int], list[float]]]
# Okabe–Ito: one colour a family, dashed where causal.
COLORS = {
    BASE: "#000000",
    "softmax, SDPA, causal": "#000000",
    "softmax, eager": "#7F7F7F",
    "exp, torch.matrix_exp": "#CC79A7",
    "exp, dopri5 (GRAND-l)": "#E69F00",
    "exp, Uniformization": "#0072B2",
    "exp, Uniformization, formed S": "#56B4E9",
    "exp, ScalingSquaring": "#882255",
    "exp causal, Uniformization": "#56B4E9",
    "exp causal, CausalSweep": "#0072B2",
    "first hop + exponential, CausalSweep": "#D55E00",
    "first hop + exponential, TriangularSolve": "#D55E00",
    "exp low rank, closed form": "#009E73",
    "exp low rank, causal hops": "#009E73",
}
CAUSAL = ("causal", "first hop")


def scaling_figure(result: Result) -> Figure | None:
    """Forward + backward over N, a head: time on the left, peak memory on the right; None without measurements."""
    time, memory = _curves(result)
    if not time:
        return None
    figure = Figure(figsize=(13.5, 5.6), layout="constrained")
    axes = figure.subplots(1, 2)
    _panel(axes[0], time, "time of forward + backward, ms a head")
    _panel(axes[1], memory, "peak memory beyond the inputs, MiB a head")
    s = result["setting"]
    figure.supxlabel(
        f"{s['hardware']}, {s['threads']} threads, {s['dtype']}, d = {s['width']}; dashed: causal; powers of N fitted to the "
        "last four points of each line",
        fontsize=8,
        color="#555555",
    )
    return figure


def _curves(result: Result) -> tuple[Curves, Curves]:
    time: Curves = {}
    memory: Curves = {}
    tokens = sorted({cell["tokens"] for cell in find(result, part="attention", phase=PHASES[1])})
    for n in tokens:
        cell = attention_cell(result, n, PHASES[1])
        for name in cell["rows"]:
            if s := seconds(cell, name):
                _append(time, name, n, 1e3 * spread(s).median / cell["heads"])
            if (b := peak(result, name, n, PHASES[1])) is not None and b > 0:
                _append(memory, name, n, b / 2**20 / cell["heads"])
    return time, memory


def _append(curves: Curves, name: str, x: int, y: float) -> None:
    xs, ys = curves.setdefault(name, ([], []))
    xs.append(x)
    ys.append(y)


def _panel(ax: Axes, curves: Curves, label: str) -> None:
    plot_curves(curves, ax=ax, xlabel="tokens N", ylabel=label, colors=COLORS)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({n for xs, _ in curves.values() for n in xs})
    ax.set_xticks(ticks, [str(n) if n < 1024 or n % 1024 else f"{n // 1024}k" for n in ticks])
    ax.minorticks_off()
    if (legend := ax.get_legend()) is not None:
        legend.remove()
    for line in ax.lines:
        if any(word in str(line.get_label()) for word in CAUSAL):
            line.set_linestyle((0, (4, 2)))
    _label_ends(ax, curves)


def _label_ends(ax: Axes, curves: Curves) -> None:
    """Names and powers of N in a column at the right, in the order of the ends, apart from each other."""
    into = ax.transData + ax.transAxes.inverted()
    ax.set_ylim(ax.get_ylim())  # the labels must not move it
    ends = {name: into.transform((xs[-1], ys[-1])) for name, (xs, ys) in curves.items()}
    ordered = sorted(ends, key=lambda name: float(ends[name][1]))
    heights = _apart([float(ends[name][1]) for name in ordered], gap=0.058)
    for name, height in zip(ordered, heights, strict=True):
        power = slope(*curves[name])
        color = ax.lines[list(curves).index(name)].get_color()
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.7, "relpos": (0, 0.5)}
        ax.annotate(
            name if power is None else f"{name}  $N^{{{power:.1f}}}$",
            xy=(float(ends[name][0]), float(ends[name][1])),
            xytext=(1.09, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            color=color,
            arrowprops=arrow | {"shrinkA": 1, "shrinkB": 3},
        )


def _apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights, moved so that neighbours are ``gap`` apart and all lie in [0, 1] as far as they fit."""
    moved: list[float] = []
    for height in heights:  # up, then back down from the top
        moved.append(max(height, moved[-1] + gap) if moved else max(height, 0.0))
    top = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top)
        top = moved[i] - gap
    return moved
