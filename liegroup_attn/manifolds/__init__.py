"""geoopt manifolds for what must stay where it is: times in their interval. The only door to geoopt but the optimizer."""

from geoopt import ManifoldParameter

from liegroup_attn.manifolds.interval import OpenInterval
from liegroup_attn.manifolds.parameter import declared, hold, off_manifold, restore

__all__ = ["ManifoldParameter", "OpenInterval", "declared", "hold", "off_manifold", "restore"]
