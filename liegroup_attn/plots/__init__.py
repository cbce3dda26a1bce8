"""Figures: ``(data, *, ax=None) -> (fig, ax)``, no show, no global style; the only door to matplotlib."""

from liegroup_attn.plots.animation import animate_token_flow
from liegroup_attn.plots.curves import plot_accuracy_by_depth, plot_curves
from liegroup_attn.plots.flow import plot_flow
from liegroup_attn.plots.hops import plot_hop_laws
from liegroup_attn.plots.layers import plot_layers
from liegroup_attn.plots.matrices import plot_matrices
from liegroup_attn.plots.positions import plot_encoding, plot_score_decay, plot_similarity
from liegroup_attn.plots.spectrum import plot_spectrum
from liegroup_attn.plots.tokens import plot_token_flow

__all__ = [
    "animate_token_flow",
    "plot_accuracy_by_depth",
    "plot_curves",
    "plot_encoding",
    "plot_flow",
    "plot_hop_laws",
    "plot_layers",
    "plot_matrices",
    "plot_score_decay",
    "plot_similarity",
    "plot_spectrum",
    "plot_token_flow",
]
