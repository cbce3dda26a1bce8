"""The rate-matrix Lie algebra 𝔤ₙ = {X : X1 = 0}, its cone of rate matrices, exp and log, and the chains they drive.

Functions of plain tensors (..., N, N), any batch, torch only; half precision is computed, and returned, in float32.
"""

from liegroup_attn.algebra.bases import basis, coordinates, elementary, from_coordinates
from liegroup_attn.algebra.brackets import Ad, ad, bch, bracket
from liegroup_attn.algebra.chains import exit_rates, expected_hops
from liegroup_attn.algebra.embedding import Embedding, embed
from liegroup_attn.algebra.equilibrium import detailed_balance_residual, is_reversible, stationary_distribution
from liegroup_attn.algebra.exponential import dexp, expm
from liegroup_attn.algebra.hitting import absorption_probabilities, hitting_probabilities, hitting_times
from liegroup_attn.algebra.logarithm import logm
from liegroup_attn.algebra.membership import in_algebra, is_rate_matrix, is_stochastic, project_algebra, project_cone
from liegroup_attn.algebra.mixing import mixing_time, spectral_gap

__all__ = [
    "Ad",
    "Embedding",
    "absorption_probabilities",
    "ad",
    "basis",
    "bch",
    "bracket",
    "coordinates",
    "detailed_balance_residual",
    "dexp",
    "elementary",
    "embed",
    "exit_rates",
    "expected_hops",
    "expm",
    "from_coordinates",
    "hitting_probabilities",
    "hitting_times",
    "in_algebra",
    "is_rate_matrix",
    "is_reversible",
    "is_stochastic",
    "logm",
    "mixing_time",
    "project_algebra",
    "project_cone",
    "spectral_gap",
    "stationary_distribution",
]
