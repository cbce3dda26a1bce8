"""The table of manifolds over which the laws run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import geoopt
import torch
from torch import Tensor

from liegroup_attn.manifolds import (
    DoublyBalancedRateMatrices,
    FlatManifold,
    FlatRateMatrices,
    OpenInterval,
    PositiveVectors,
    ProductManifold,
    RateMatrices,
    ReversibleRateMatrices,
    SpecialOrthogonal,
    StochasticMatrices,
    banded_support,
    block_support,
    causal_support,
)

RING = torch.eye(4, dtype=torch.bool).roll(1, 1)
CHORD = RING | (torch.arange(16).view(4, 4) == 8)  # 2 → 0 beside the ring


class Row(NamedTuple):
    """A manifold and what it promises."""

    make: Callable[[], geoopt.Manifold]
    shape: tuple[int, ...]  # of points, batch in front
    size: float = 1.0  # norm of tangent vectors within which logmap undoes expmap
    far: float = 1e30  # no step up to this norm leaves; rotations lose digits in proportion to the angle
    isometric: bool = True  # transp keeps inner products
    has_log: bool = True
    std: float | None = 0.5  # of random points


def product() -> ProductManifold:
    return ProductManifold(
        (RateMatrices(3, causal_support(3)), (3, 3)),
        (PositiveVectors(), 4),
        (StochasticMatrices(), (2, 3)),
        (DoublyBalancedRateMatrices(3), (3, 3)),
        (SpecialOrthogonal(3), (3, 3)),
        (OpenInterval(2.0), (2,)),
    )


ROWS = {
    "rates": Row(lambda: RateMatrices(5), (2, 3, 5, 5)),
    "rates-causal": Row(lambda: RateMatrices(4, causal_support(4)), (3, 4, 4)),
    "rates-banded": Row(lambda: RateMatrices(6, banded_support(6, 1)), (6, 6)),
    "rates-blocks": Row(lambda: RateMatrices(6, block_support([2, 1, 3])), (2, 6, 6)),
    "rates-1": Row(lambda: RateMatrices(1), (2, 1, 1)),
    "rates-2": Row(lambda: RateMatrices(2), (2, 2)),
    "flat": Row(lambda: FlatRateMatrices(5), (2, 3, 5, 5), size=0.05),
    "flat-causal": Row(lambda: FlatRateMatrices(4, causal_support(4)), (3, 4, 4), size=0.05),
    "flat-1": Row(lambda: FlatRateMatrices(1), (1, 1), size=0.05),
    "flat-2": Row(lambda: FlatRateMatrices(2), (2, 2, 2), size=0.05),
    "reversible": Row(lambda: ReversibleRateMatrices(5), (2, 3, 5, 5)),
    "reversible-banded": Row(lambda: ReversibleRateMatrices(6, banded_support(6, 2)), (6, 6)),
    "reversible-blocks": Row(lambda: ReversibleRateMatrices(6, block_support([3, 1, 2])), (2, 6, 6)),
    "reversible-1": Row(lambda: ReversibleRateMatrices(1), (1, 1)),
    "reversible-2": Row(lambda: ReversibleRateMatrices(2), (3, 2, 2)),
    "balanced": Row(lambda: DoublyBalancedRateMatrices(5), (2, 3, 5, 5)),
    "balanced-ring": Row(lambda: DoublyBalancedRateMatrices(4, CHORD), (4, 4)),
    "balanced-blocks": Row(lambda: DoublyBalancedRateMatrices(6, block_support([3, 1, 2])), (2, 6, 6)),
    "balanced-1": Row(lambda: DoublyBalancedRateMatrices(1), (1, 1)),
    "balanced-2": Row(lambda: DoublyBalancedRateMatrices(2), (3, 2, 2)),
    "stochastic": Row(StochasticMatrices, (2, 3, 4), size=0.2, far=1e9),
    "stochastic-2": Row(StochasticMatrices, (2, 2), size=0.2, far=1e9),
    "stochastic-1": Row(StochasticMatrices, (2, 1)),
    "positive": Row(PositiveVectors, (2, 3, 7)),
    "interval": Row(lambda: OpenInterval(2.0), (3, 4)),
    "rotations-3": Row(lambda: SpecialOrthogonal(3), (2, 2, 3, 3), far=10.0, std=None),
    "rotations-6": Row(lambda: SpecialOrthogonal(6), (6, 6), far=10.0, std=None),
    "rotations-2": Row(lambda: SpecialOrthogonal(2), (3, 2, 2), far=10.0, std=None),
    "rotations-1": Row(lambda: SpecialOrthogonal(1), (1, 1), std=None),
    "product": Row(product, (2, 39), size=0.2, far=10.0, std=None),
    "geoopt-stiefel": Row(
        lambda: geoopt.Stiefel(canonical=False), (2, 5, 3), far=10.0, isometric=False, has_log=False, std=None
    ),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Case:
    """Two points, tangent vectors at the first, and how exactly laws must hold."""

    def __init__(self, name: str, dtype: str, seed: int) -> None:
        self.name, self.row, self.dtype = name, ROWS[name], DTYPES[dtype]
        self.manifold = self.row.make()
        self.tol = 2e-4 if dtype == "float32" else 2e-9
        self.flat = isinstance(self.manifold, FlatManifold)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.x, self.y = self.point(), self.point()
            self.u, self.v, self.w = (self.tangent(self.x) for _ in range(3))
            # Random rotations may be a turn by π apart.
            if self.row.has_log and self.row.std is None:
                self.y = self.manifold.expmap(self.x, self.tangent(self.x))
            self.wild = torch.randn(self.row.shape, dtype=self.dtype)

    def point(self) -> Tensor:
        sampler = self.manifold
        if isinstance(sampler, FlatRateMatrices):  # inside, away from the walls
            sampler = RateMatrices(sampler.n, sampler.transitions | torch.eye(sampler.n, dtype=torch.bool))
        std = {} if self.row.std is None else {"std": self.row.std}
        return sampler.random(*self.row.shape, dtype=self.dtype, **std).as_subclass(Tensor)

    def tangent(self, x: Tensor) -> Tensor:
        """Of the row's size."""
        u = self.manifold.proju(x, torch.randn_like(x))
        norm = self.manifold.norm(x, u, keepdim=True)
        return u * (self.row.size / norm.clamp(min=1e-30))

    def norm_of(self, u: Tensor) -> Tensor:
        return self.manifold.norm(self.x, u)
