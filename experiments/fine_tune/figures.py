"""Figures of the fine-tuning: losses, what the monitor saw, times by layer, and one head's matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from liegroup_attn.plots import plot_curves, plot_layers, plot_matrices

__all__ = ["figures"]

COLORS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#56B4E9")
PANELS = {
    "time": "time t",
    "expected_hops": "expected hops",
    "distance_to_softmax": "distance to softmax",
    "effective_rank": "effective rank of P",
}
Results = dict[str, list[dict[str, Any]]]


def figures(results: Results, titles: dict[str, str], unit: str) -> dict[str, Figure]:
    """Name → figure, those for which there are results."""
    colors = dict(zip(titles.values(), COLORS, strict=True))
    found = {"curves": _losses(results, titles, colors, unit), "monitor": _monitor(results, titles, colors)}
    for variant, runs in results.items():
        if variant == "softmax":
            continue
        first = runs[0]
        if variant == "fixed":
            layers = {name.removeprefix("gpt2.transformer."): times for name, times in first["times"].items()}
            found["times"] = plot_layers(layers)[0]
        if variant in ("fixed", "exponential") and first["matrices"]:
            found[f"matrices_{variant}"] = _matrices(first["matrices"])
    return found


def _losses(results: Results, titles: dict[str, str], colors: dict[str, str], unit: str) -> Figure:
    curves = {}
    for variant, runs in results.items():
        steps = [step for step, _ in runs[0]["validation"]]
        curves[titles[variant]] = (steps, [[loss for _, loss in run["validation"]] for run in runs])
    return plot_curves(curves, xlabel="steps after the conversion", ylabel=f"validation loss ({unit})", colors=colors)[
        0
    ]


def _monitor(results: Results, titles: dict[str, str], colors: dict[str, str]) -> Figure:
    """Each number over steps, mean over layers; the spread is over seeds."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", dpi=150)
    axes = figure.subplots(2, 2)
    for ax, (number, label) in zip(axes.flat, PANELS.items(), strict=True):
        curves = {}
        for variant, runs in results.items():
            series = [[s for name, s in run["monitor"].items() if name.endswith(f"/{number}")] for run in runs]
            if variant == "softmax" or not all(series):
                continue
            steps = [step for step, _ in series[0][0]]
            curves[titles[variant]] = (steps, np.mean([[[v for _, v in s] for s in run] for run in series], axis=1))
        plot_curves(curves, ax=ax, xlabel="step", ylabel=label, colors=colors)
        if ax is not axes.flat[0] and ax.get_legend() is not None:
            ax.get_legend().remove()
    return figure


def _matrices(stored: dict[str, Any]) -> Figure:
    titles = {"S": "S", "Q": "Q", "P(t)": f"S·P(t), t = {stored['time']:.2g}"}
    panels = {title: np.array(stored[name]) for name, title in titles.items()}
    figure, _ = plot_matrices(panels, tokens=stored["tokens"])
    return figure
