"""RateMatrices: what its axioms do not say: Adam on log-rates, supports, rounding, reasons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liegroup_attn.lightning import RiemannianAdamW
from liegroup_attn.manifolds import (
    ManifoldParameter,
    RateMatrices,
    banded_support,
    block_support,
    causal_support,
)

SUPPORTS = {
    "all": None,
    "causal": causal_support(5),
    "banded": banded_support(5, 1),
    "blocks": block_support([2, 1, 2]),
}


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_riemannian_adam_is_adam_on_the_log_rates(support):
    m = RateMatrices(5, support)
    start = m.random(3, 5, 5, dtype=torch.float64).as_subclass(torch.Tensor)
    best = m.random(3, 5, 5, dtype=torch.float64).as_subclass(torch.Tensor)
    point, phi = ManifoldParameter(start.clone(), manifold=m), nn.Parameter(m.chart(start))
    one, two = RiemannianAdamW([point], lr=0.1), torch.optim.Adam([phi], lr=0.1)
    for _ in range(50):
        for optimizer, x in ((one, point), (two, phi)):
            optimizer.zero_grad()
            ((x if x is point else m.from_chart(x)) - best).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(m.chart(point).detach(), phi.detach(), atol=1e-8, rtol=0)
    assert m.check_point_on_manifold(point, explain=True) == (True, None)
