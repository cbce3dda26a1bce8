"""Stochastic matrices, positive vectors and rotations: closed forms, ends, reasons."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import linalg
from torch import Tensor, nn

from liegroup_attn.errors import GeneratorError
from liegroup_attn.lightning import RiemannianAdamW
from liegroup_attn.manifolds import ManifoldParameter, PositiveVectors, SpecialOrthogonal, StochasticMatrices, skew


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


# stochastic matrices


def test_the_fisher_distance_is_twice_the_angle_of_the_roots():
    m = StochasticMatrices()
    p, q = (plain(m.random(4, 3, 5, dtype=torch.float64)) for _ in range(2))
    angles = 2 * (p * q).sqrt().sum(-1).acos()
    torch.testing.assert_close(m.dist(p, q), angles.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_retraction_never_leaves_and_the_exponential_is_folded(dtype):
    m = StochasticMatrices()
    p = plain(m.origin(2, 3, dtype=dtype))
    u = m.proju(p, torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, 1.0]], dtype=dtype))
    assert m.check_point_on_manifold(m.retr(p, 1e30 * u), explain=True) == (True, None)
    full_turn = u * (2 * math.pi / m.component_inner(p, u).sqrt())  # p = z² comes back after half a circle
    torch.testing.assert_close(m.expmap(p, full_turn), p, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ([[0.5, 0.5]], None),
        ([[0.5, 0.75]], "rows must sum to 1, off by 0.25"),
        ([[1.5, -0.5]], "entries must be positive, got -0.5; start from positive entries"),
        ([[math.nan, 1.0]], "entries must be finite, got NaN or inf"),
        ([0.5, 0.5], "'x' must have shape (..., N, M) with M ≥ 1, got (2,)"),
    ],
)
def test_reasons_for_stochastic_matrices(point, reason):
    assert StochasticMatrices().check_point_on_manifold(torch.tensor(point), explain=True) == (reason is None, reason)


# positive vectors


def test_riemannian_adam_is_adam_on_the_logarithms():
    m = PositiveVectors()
    start = plain(m.random(3, 4, dtype=torch.float64))
    point, phi = ManifoldParameter(start.clone(), manifold=m), nn.Parameter(start.log())
    one, two = RiemannianAdamW([point], lr=0.1), torch.optim.Adam([phi], lr=0.1)
    for _ in range(30):
        for optimizer, x in ((one, point), (two, phi)):
            optimizer.zero_grad()
            ((x if x is point else x.exp()) - 2).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(point.detach().log(), phi.detach(), atol=1e-8, rtol=0)


# rotations


def test_the_logarithm_is_scipys():
    m = SpecialOrthogonal(4)
    eye = torch.eye(4, dtype=torch.float64)
    R = m.expmap(eye, skew(torch.randn(4, 4, dtype=torch.float64)))
    torch.testing.assert_close(m.logmap(eye, R), torch.from_numpy(linalg.logm(R.numpy()).real), atol=1e-12, rtol=1e-10)


def test_parallel_transport_follows_the_geodesic():
    m = SpecialOrthogonal(4)
    R = plain(m.random(4, 4, dtype=torch.float64))
    A, B = (0.5 * skew(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))
    half = torch.linalg.matrix_exp(torch.stack([A, A]) / 2)[0]
    torch.testing.assert_close(m.transp(R, m.expmap(R, R @ A), R @ B), R @ half @ B @ half)


def test_projection_gives_the_nearest_rotation():
    torch.manual_seed(0)
    m = SpecialOrthogonal(3)
    x = torch.randn(30, 3, 3, dtype=torch.float64)
    assert (torch.linalg.det(x) < 0).any()
    near = m.projx(x)
    torch.testing.assert_close(torch.linalg.det(near), torch.ones(30, dtype=torch.float64))
    others = plain(m.random(200, 1, 3, 3, dtype=torch.float64))
    assert ((x - near).square().sum((-2, -1)) <= (x - others).square().sum((-2, -1)) + 1e-12).all()


def test_random_rotations_are_uniform():
    """E R = 0 and E (tr R)² = 1 for Haar's measure on SO(3)."""
    torch.manual_seed(0)
    R = plain(SpecialOrthogonal(3).random(4000, 3, 3, dtype=torch.float64))
    assert R.mean(0).abs().max() < 0.05
    assert abs(float(R.diagonal(dim1=-2, dim2=-1).sum(-1).square().mean()) - 1) < 0.1


def test_a_turn_by_pi_has_no_logarithm_but_a_transport():
    m = SpecialOrthogonal(2)
    eye = torch.eye(2)
    with pytest.raises(GeneratorError, match="negative real axis"):
        m.dist(eye, -eye)
    u = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert m.check_vector_on_tangent(-eye, m.transp(eye, -eye, u))


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ([[0.0, 1.0], [-1.0, 0.0]], None),
        ([[0.0, 1.0], [1.0, 0.0]], "the determinant must be 1, off by -2"),
        ([[2.0, 0.0], [0.0, 0.5]], "RᵀR must be I, off by 3"),
        ([[math.nan, 0.0], [0.0, 1.0]], "entries must be finite, got NaN or inf"),
        ([[1.0]], "'x' must have shape (..., 2, 2), got (1, 1)"),
    ],
)
def test_reasons_for_rotations(point, reason):
    assert SpecialOrthogonal(2).check_point_on_manifold(torch.tensor(point), explain=True) == (reason is None, reason)


def test_a_vector_that_is_not_tangent():
    ok, reason = SpecialOrthogonal(2).check_vector_on_tangent(torch.eye(2), torch.eye(2), explain=True)
    assert not ok
    assert reason == "Rᵀu must be skew-symmetric, off by 2"


def test_bad_sizes():
    with pytest.raises(GeneratorError, match="n: expected an integer ≥ 1, got 0"):
        SpecialOrthogonal(0)
