"""Tables and figures from result files alone: no training, no network."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.benchmarks import report as benchmarks
from experiments.drop_in import report as drop_in
from experiments.fine_tune import report as fine_tune
from experiments.markdown import says
from experiments.position_study import report as position_study
from experiments.positions import report as positions
from experiments.rate_recovery import report as rate_recovery
from experiments.results import EXPERIMENTS, ROOT, TITLES, load_results, write_figure, write_text
from experiments.tables import SAYS, Results, accuracy_at_depths, fill_tables, readmes, render_table
from liegroup_attn.plots import plot_accuracy_by_depth, plot_curves, plot_matrices

__all__ = ["draw"]

REPORTS = {
    module.FOLDER: module.report
    for module in (benchmarks, rate_recovery, drop_in, fine_tune, position_study, positions)
}
DRAWN = (*EXPERIMENTS, *REPORTS)
# One colour a variant in every figure (Okabe–Ito).
COLORS = {
    TITLES["softmax"]: "#000000",
    TITLES["softmax_2_blocks"]: "#7F7F7F",
    TITLES["softmax_4_blocks"]: "#B5B5B5",
    TITLES["exp"]: "#D55E00",
    TITLES["first_hop_fixed"]: "#E69F00",
    TITLES["first_hop_exponential"]: "#0072B2",
    TITLES["relative_rates"]: "#0072B2",
    TITLES["mixer"]: "#009E73",
    TITLES["mixer_balanced"]: "#CC79A7",
    TITLES["mixer_fixed"]: "#7F7F7F",
}
SCALED = 4  # of the time factors in the result files, the one that has a panel


def draw(output: Path, experiments: Sequence[str] = DRAWN) -> list[Path]:
    """Write table.md and figures/*.png of each experiment that has results.

    Args:
        output: holds ``<experiment>/results/*.json``; the repository's ``experiments`` folder also has its READMEs
            filled.
        experiments: names, also those of ``REPORTS``.

    Returns:
        The files written.
    """
    written = [path for name, report in REPORTS.items() if name in experiments for path in report(output)]
    for experiment in (name for name in experiments if name not in REPORTS):
        results = load_results(output, experiment)
        if not results:
            continue
        folder = output / experiment
        table = folder / "table.md"
        write_text(table, says(SAYS, {experiment: render_table(experiment, results)}))
        written.append(table)
        for name, figure in _figures(experiment, results).items():
            path = folder / "figures" / f"{name}.png"
            write_figure(path, figure)
            written.append(path)
    if output.resolve() == ROOT.resolve():
        written += [path for path in readmes() if path.exists() and fill_tables(path, output)]
    return written


def _figures(experiment: str, results: Results) -> dict[str, Figure]:
    if experiment == "reachability":
        found = {"curves": _curves(results, "validation/accuracy", "validation accuracy (%)", 100)}
        found |= {"accuracy_by_depth": _by_depth(results), "cost": _by_cost(results)}
        return found | {"mixing": _mixing(results, _forest_order)}
    if experiment == "digits":
        few = ("softmax", "exp", "relative_rates", "mixer", "mixer_fixed")
        shown: Results = {name: runs for name, runs in results.items() if name in few}
        found = {"curves": _curves(shown, "validation/accuracy", "validation accuracy (%)", 100)}
        return found | {"mixing": _mixing(results, _raster_order, ("exp", "mixer", "mixer_balanced"))}
    found = {"curves": _curves(results, "validation/loss", "validation loss (nats per byte)", 1)}
    return found | {"mixing": _mixing(results, _text_order)}


def _curves(results: Results, metric: str, label: str, factor: float) -> Figure:
    curves = {}
    for variant, runs in results.items():
        steps = [point["step"] for point in runs[0]["curve"]]
        values = [[factor * point[metric] for point in run["curve"]] for run in runs]
        curves[TITLES.get(variant, variant)] = (steps, values)
    figure, _ = plot_curves(curves, xlabel="training step", ylabel=label, colors=COLORS)
    return figure


def _by_depth(results: Results) -> Figure:
    """Left: trained as tested. Right: the same weights, Lie attention run for longer."""
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    trained = max(len(accuracy_at_depths(run, "test")) for runs in results.values() for run in runs) - 1
    for ax, scale, title in (
        (axes[0], "time x1", "time as learned"),
        (axes[1], f"time x{SCALED}", f"time × {SCALED} at test, nothing retrained"),
    ):
        accuracy = {
            TITLES.get(variant, variant): [accuracy_at_depths(run, "deeper", scale) for run in runs]
            for variant, runs in results.items()
            if scale in runs[0]["test"] or scale == "time x1"
        }
        plot_accuracy_by_depth(accuracy, ax=ax, trained_depth=trained, colors=COLORS)
        ax.set_title(title, fontsize=10, pad=16)
    axes[1].set_ylabel("")
    handles, labels = axes[0].get_legend_handles_labels()
    for ax in axes:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _by_cost(results: Results) -> Figure:
    """Accuracy against parameters, operations of the whole training and CPU seconds: filled as deep as trained, open deeper."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    costs: dict[str, Callable[[dict[str, Any]], float]] = {
        "parameters": lambda run: run["parameters"],
        "TFLOP of the training": lambda run: run["flops_per_step"] * run["steps"] / 1e12,
        "CPU seconds of the training": lambda run: run["cpu_seconds"],
    }
    for ax, (label, cost) in zip(axes, costs.items(), strict=True):
        for variant, runs in results.items():
            name = TITLES.get(variant, variant)
            x = statistics.fmean(map(cost, runs))
            for test, filled in (("test", True), ("deeper", False)):
                ys = [100 * run["test"]["time x1"][f"{test}/accuracy"] for run in runs]
                spread = statistics.stdev(ys) if len(ys) > 1 else 0.0
                face = COLORS[name] if filled else "none"
                shown = ax.errorbar(x, statistics.fmean(ys), spread, fmt="o", color=COLORS[name], markerfacecolor=face)
                if filled:
                    shown.set_label(name)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1e4 else f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(label, fontsize=9)
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy (%): ● as trained, ○ deeper", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _mixing(
    results: Results, order: Any, variants: Sequence[str] = ("softmax", "exp", "first_hop_exponential")
) -> Figure:
    """First block, every head, on the same input: one row a variant of one seed."""
    shown = [v for v in variants if v in results] or list(results)[:3]
    heads = len(results[shown[0]][0]["mixing"]["heads"])
    figure = Figure(figsize=(2.7 * heads + 0.6, 2.6 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), heads, squeeze=False)
    for row, variant in zip(grid, shown, strict=True):
        mixing = results[variant][0]["mixing"]
        places, names = order(mixing)
        for head, (ax, matrix) in enumerate(zip(row, mixing["heads"], strict=True)):
            sorted_matrix = [[matrix[i][j] for j in places] for i in places]
            title = f"{TITLES.get(variant, variant)}\nhead {head}"
            plot_matrices({title: sorted_matrix}, axes=[ax], tokens=names)
            ax.tick_params(labelsize=4.5)
    return figure


def _forest_order(mixing: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Tokens by tree, then by depth, so that a root stands before its tree."""
    order = sorted(range(len(mixing["labels"])), key=lambda i: (mixing["labels"][i], mixing["depth"][i]))
    return order, [f"{node}→{parent}" for node, parent in (mixing["tokens"][i] for i in order)]


def _raster_order(mixing: dict[str, Any]) -> tuple[list[int], list[str]]:
    n = len(mixing["tokens"])
    return list(range(n)), [f"{i // math.isqrt(n)},{i % math.isqrt(n)}" for i in range(n)]


def _text_order(mixing: dict[str, Any]) -> tuple[list[int], list[str]]:
    names = {10: "↵", 32: "␣", 9: "⇥"}
    return list(range(len(mixing["tokens"]))), [
        names.get(byte, chr(byte) if 32 < byte < 127 else "·") for byte in mixing["tokens"]
    ]


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn draw``."""
    parser = argparse.ArgumentParser(prog="liegroup-attn draw", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder with results; default the committed ones")
    parser.add_argument("--experiments", nargs="+", choices=DRAWN, default=list(DRAWN))
    args = parser.parse_args(argv)
    written = draw(args.output, args.experiments)
    if not written:
        raise FileNotFoundError(
            f"output: expected <experiment>/results/*.json in {args.output}, got none; run liegroup-attn compare or bench first"
        )
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
