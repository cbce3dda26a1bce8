"""geoopt manifolds for what must stay where it is: times in their interval. The only door to geoopt but the optimizer."""

from geoopt import ManifoldParameter

from liegroup_attn.manifolds.interval import OpenInterval

__all__ = ["ManifoldParameter", "OpenInterval"]
