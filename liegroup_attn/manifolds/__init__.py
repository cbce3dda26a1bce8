"""geoopt manifolds for what must stay where it is: times in their interval, generators in their cone, frames, rotations.

The only door to geoopt but the optimizer; what geoopt already has is named here, not rewritten.
"""

from geoopt import (
    BirkhoffPolytope,
    Euclidean,
    ManifoldParameter,
    ManifoldTensor,
    ProductManifold,
    Sphere,
    Stiefel,
)

from liegroup_attn.manifolds.checks import off_manifold
from liegroup_attn.manifolds.flat import FlatManifold
from liegroup_attn.manifolds.interval import OpenInterval
from liegroup_attn.manifolds.parameter import declared, hold, restore
from liegroup_attn.manifolds.rate_matrices import RateMatrices
from liegroup_attn.manifolds.support import banded_support, block_support, causal_support

__all__ = [
    "BirkhoffPolytope",
    "Euclidean",
    "FlatManifold",
    "ManifoldParameter",
    "ManifoldTensor",
    "OpenInterval",
    "ProductManifold",
    "RateMatrices",
    "Sphere",
    "Stiefel",
    "banded_support",
    "block_support",
    "causal_support",
    "declared",
    "hold",
    "off_manifold",
    "restore",
]
