"""Steps on every manifold: those of geoopt's Riemannian Adam, which knows nothing of charts; and what projects points."""

from __future__ import annotations

from functools import partial

import geoopt
import pytest
import torch
from manifold_cases import ROWS, Case

from liegroup_attn.lightning import RiemannianAdamW, RiemannianSGD
from liegroup_attn.manifolds import ManifoldParameter, OpenInterval, SpecialOrthogonal, off_manifold

# Adam's size of a step is then neither the sign of the gradient nor the gradient itself.
EPS = 0.3


def walk(case: Case, new: partial[torch.optim.Optimizer]) -> torch.Tensor:
    point = ManifoldParameter(case.x.clone(), manifold=case.manifold)
    optimizer = new([point], lr=0.03)
    for step in range(20):
        optimizer.zero_grad()
        (point - case.wild * (1 + step / 10)).square().sum().backward()
        optimizer.step()
    return point.detach()


@pytest.mark.parametrize("name", ROWS)
def test_adam_takes_geoopts_steps(name):
    case = Case(name, "float64", seed=5)
    ours = walk(case, partial(RiemannianAdamW, eps=EPS, stabilize=None))
    theirs = walk(case, partial(geoopt.optim.RiemannianAdam, eps=EPS))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("cls", [RiemannianAdamW, partial(RiemannianSGD, momentum=0.9)])
@pytest.mark.parametrize("name", ROWS)
def test_a_step_does_not_change_the_gradient(cls, name):
    """It may go on being accumulated."""
    case = Case(name, "float64", seed=5)
    point = ManifoldParameter(case.x.clone(), manifold=case.manifold)
    point.grad = case.wild.clone()
    optimizer = cls([point], lr=0.03)
    for _ in range(2):
        optimizer.step()
        assert torch.equal(point.grad, case.wild)


class Line(OpenInterval):
    """The chart is the identity, so the gradient by the chart is no new tensor."""

    def move(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x + c

    def chart_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_a_chart_that_is_the_identity_is_adam():
    one, two = ManifoldParameter(torch.ones(3), manifold=Line()), torch.nn.Parameter(torch.ones(3))
    gradient = torch.tensor([1.0, -2.0, 3.0])
    one.grad, two.grad = gradient.clone(), gradient.clone()
    optimizers = RiemannianAdamW([one], lr=0.1, stabilize=None), torch.optim.Adam([two], lr=0.1)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(one.grad, gradient)
    torch.testing.assert_close(one.detach(), two.detach())


@pytest.mark.parametrize("cls", [RiemannianAdamW, RiemannianSGD])
@pytest.mark.parametrize("every", [1, 3, None])
def test_points_are_projected_every_so_many_steps(cls, every):
    """A multiple of a rotation stays one under steps, until it is projected."""
    point = ManifoldParameter(torch.eye(3), manifold=SpecialOrthogonal(3))
    optimizer, projected = cls([point], lr=0.01, stabilize=every), []
    for step in range(1, 10):
        with torch.no_grad():
            point.copy_(1.01 * torch.eye(3))
        point.grad = torch.ones(3, 3).triu()
        optimizer.step()
        if off_manifold(point, point.manifold) < 1e-6:
            projected.append(step)
    assert projected == ([] if every is None else list(range(every, 10, every)))
