"""What ``liegroup_attn.manifolds`` shows; imports geoopt."""

from geoopt import (
    BirkhoffPolytope,
    Euclidean,
    ManifoldParameter,
    ManifoldTensor,
    ProductManifold,
    Sphere,
    Stiefel,
)

from liegroup_attn.manifolds.balanced import DoublyBalancedRateMatrices
from liegroup_attn.manifolds.checks import off_manifold
from liegroup_attn.manifolds.flat import FlatManifold
from liegroup_attn.manifolds.flat_rates import FlatRateMatrices
from liegroup_attn.manifolds.interval import OpenInterval
from liegroup_attn.manifolds.parameter import declared, hold, restore
from liegroup_attn.manifolds.positive import PositiveVectors
from liegroup_attn.manifolds.rate_matrices import RateMatrices
from liegroup_attn.manifolds.reversible import ReversibleRateMatrices
from liegroup_attn.manifolds.rotations import SpecialOrthogonal, skew
from liegroup_attn.manifolds.stochastic import StochasticMatrices
from liegroup_attn.manifolds.support import banded_support, block_support, causal_support

__all__ = [
    "BirkhoffPolytope",
    "DoublyBalancedRateMatrices",
    "Euclidean",
    "FlatManifold",
    "FlatRateMatrices",
    "ManifoldParameter",
    "ManifoldTensor",
    "OpenInterval",
    "PositiveVectors",
    "ProductManifold",
    "RateMatrices",
    "ReversibleRateMatrices",
    "SpecialOrthogonal",
    "Sphere",
    "Stiefel",
    "StochasticMatrices",
    "banded_support",
    "block_support",
    "causal_support",
    "declared",
    "hold",
    "off_manifold",
    "restore",
    "skew",
]
