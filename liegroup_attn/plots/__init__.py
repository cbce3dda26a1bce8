"""Figures: ``(data, *, ax=None) -> (fig, ax)``, no show, no global style; the only door to matplotlib."""

from liegroup_attn.plots.curves import plot_accuracy_by_depth, plot_curves
from liegroup_attn.plots.matrices import plot_matrices

__all__ = ["plot_accuracy_by_depth", "plot_curves", "plot_matrices"]
